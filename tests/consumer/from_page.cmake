# cmake -DPAGE=… -DFENCE=… -DPROJECT=… -P from_page.cmake: the FENCE-th block of `cmake` of a page, as it stands, in a
# project of its own in the folder PROJECT, beside a short program called app. third_party/ there holds Eigen and diffattn, what
# would be cloned is SOURCE, and what is installed lies in PREFIX.
include(${CMAKE_CURRENT_LIST_DIR}/../../docs/Snippets.cmake)
set(PROJECT_SOURCE_DIR ${SOURCE})
fence_of(${PAGE} cmake ${FENCE} block)

file(REMOVE_RECURSE ${PROJECT})
file(MAKE_DIRECTORY ${PROJECT}/third_party/eigen)
file(CREATE_LINK ${EIGEN}/Eigen ${PROJECT}/third_party/eigen/Eigen SYMBOLIC)
file(CREATE_LINK ${SOURCE} ${PROJECT}/third_party/diffattn SYMBOLIC)
file(WRITE ${PROJECT}/app.cpp "#include <diffattn/core/matrix.hpp>
int main() { return diffattn::Matrix<float>::Zero(2, 3).cols() == 3 ? 0 : 1; }
")
file(
  WRITE ${PROJECT}/CMakeLists.txt
  "cmake_minimum_required(VERSION 3.25)
project(page LANGUAGES CXX)
add_executable(app app.cpp)
${block}")

function(run)
  execute_process(COMMAND ${ARGN} RESULT_VARIABLE status)
  if(NOT status EQUAL 0)
    message(FATAL_ERROR "${PAGE}, block ${FENCE}: failed")
  endif()
endfunction()
run(${CMAKE_COMMAND} -S ${PROJECT} -B ${PROJECT}/build -G ${GENERATOR} -DCMAKE_CXX_COMPILER=${COMPILER}
    -DCMAKE_PREFIX_PATH=${PREFIX} -DFETCHCONTENT_SOURCE_DIR_DIFFATTN=${SOURCE})
run(${CMAKE_COMMAND} --build ${PROJECT}/build)
run(${PROJECT}/build/app)
