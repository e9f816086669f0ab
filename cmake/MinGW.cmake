# For the preset mingw, on Debian. nlohmann-json and Catch2 lie in /usr/include, among the headers of Linux's C library,
# which a compiler for Windows must not see: both are linked into a folder of their own, and /usr/include is passed over.
set(headers ${CMAKE_BINARY_DIR}/mingw_headers)
file(MAKE_DIRECTORY ${headers})
foreach(library nlohmann catch2)
  if(EXISTS /usr/include/${library})
    file(CREATE_LINK /usr/include/${library} ${headers}/${library} SYMBOLIC)
  endif()
endforeach()
include_directories(SYSTEM ${headers})
list(APPEND CMAKE_CXX_IMPLICIT_INCLUDE_DIRECTORIES /usr/include)
# Programs are linked with -static, so that they run without MinGW's DLLs: no library whose code is in one may be found.
set(CMAKE_FIND_LIBRARY_SUFFIXES .a)
