# The port's version is a copy.
file(READ ${CMAKE_CURRENT_LIST_DIR}/../../cmake/packaging/vcpkg/diffattn/vcpkg.json manifest)
string(JSON version GET "${manifest}" version)
if(NOT version STREQUAL VERSION)
  message(FATAL_ERROR "vcpkg.json has version ${version}, core/version.hpp ${VERSION}")
endif()
