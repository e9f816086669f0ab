# What is installed is used; what is not is fetched. GLOBAL lets a project that adds this one see the same targets.
include(FetchContent)

if(NOT TARGET Eigen3::Eigen AND DIFFATTN_EIGEN_DIR)
  # Eigen 5 has its version in a file of its own.
  set(version_file ${DIFFATTN_EIGEN_DIR}/Eigen/Version)
  if(NOT EXISTS ${version_file})
    set(version_file ${DIFFATTN_EIGEN_DIR}/Eigen/src/Core/util/Macros.h)
  endif()
  if(NOT EXISTS ${version_file})
    message(FATAL_ERROR "DIFFATTN_EIGEN_DIR must be the folder that holds Eigen/Core, got ${DIFFATTN_EIGEN_DIR}")
  endif()
  file(STRINGS ${version_file} version REGEX "^#define EIGEN_(WORLD|MAJOR|MINOR)_VERSION ")
  list(TRANSFORM version REPLACE "^.* ([0-9]+).*$" "\\1")
  list(JOIN version "." version)
  if(version VERSION_LESS 3.4)
    message(FATAL_ERROR "diffattn needs Eigen 3.4 or newer, found ${version} in DIFFATTN_EIGEN_DIR, ${DIFFATTN_EIGEN_DIR}")
  endif()
  add_library(Eigen3::Eigen INTERFACE IMPORTED GLOBAL)
  target_include_directories(Eigen3::Eigen INTERFACE ${DIFFATTN_EIGEN_DIR})
endif()
if(NOT TARGET Eigen3::Eigen)
  # Eigen's version file calls 5 incompatible with a request for 3.4, so it is found without one and checked below.
  # SOURCE_SUBDIR names a folder without a CMakeLists.txt: of a fetched Eigen only the headers are wanted.
  FetchContent_Declare(
    Eigen3
    GIT_REPOSITORY https://gitlab.com/libeigen/eigen.git
    GIT_TAG 3147391d946bb4b6c68edd901f2add6ac1f31f8c # 3.4.0
    SOURCE_SUBDIR Eigen
    FIND_PACKAGE_ARGS CONFIG GLOBAL)
  FetchContent_MakeAvailable(Eigen3)
  if(NOT Eigen3_FOUND)
    add_library(Eigen3::Eigen INTERFACE IMPORTED GLOBAL)
    target_include_directories(Eigen3::Eigen INTERFACE ${eigen3_SOURCE_DIR})
  elseif(Eigen3_VERSION VERSION_LESS 3.4)
    message(FATAL_ERROR "diffattn needs Eigen 3.4 or newer, found ${Eigen3_VERSION} in ${Eigen3_DIR}")
  endif()
endif()

if(NOT TARGET nlohmann_json::nlohmann_json)
  if(DIFFATTN_IO)
    set(JSON_Install ${DIFFATTN_INSTALL} CACHE BOOL "Install a fetched nlohmann_json with diffattn")
    FetchContent_Declare(
      nlohmann_json
      URL https://github.com/nlohmann/json/releases/download/v3.11.3/json.tar.xz
      URL_HASH SHA256=d6c65aca6b1ed68e7a182f4757257b107ae403032760ed6ef121c9d55e81757d
      FIND_PACKAGE_ARGS 3.9 CONFIG GLOBAL)
    FetchContent_MakeAvailable(nlohmann_json)
  else()
    find_package(nlohmann_json 3.9 CONFIG QUIET GLOBAL)
  endif()
endif()

if(DIFFATTN_MPI AND NOT TARGET MPI::MPI_CXX)
  set(MPI_CXX_SKIP_MPICXX ON) # MPI's own C++ classes, which nothing of ours uses
  find_package(MPI COMPONENTS CXX GLOBAL)
  if(NOT MPI_CXX_FOUND AND NOT PROJECT_IS_TOP_LEVEL)
    message(FATAL_ERROR "diffattn: DIFFATTN_MPI is ON, and no MPI was found (Debian: libopenmpi-dev)")
  endif()
endif()
