# `cmake --build … --target amalgamate` writes the library as one header, ${diffattn_one_file}. Not part of `all`.
find_package(Python3 COMPONENTS Interpreter)
if(Python3_FOUND)
  # In a folder of the same name, so that <diffattn/diffattn.hpp> finds either.
  set(diffattn_one_file_dir ${PROJECT_BINARY_DIR}/one_file)
  set(diffattn_one_file ${diffattn_one_file_dir}/diffattn/diffattn.hpp)
  add_custom_command(
    OUTPUT ${diffattn_one_file}
    COMMAND ${Python3_EXECUTABLE} ${PROJECT_SOURCE_DIR}/cmake/amalgamate.py ${PROJECT_SOURCE_DIR}/include ${diffattn_one_file}
    DEPENDS ${diffattn_headers} ${PROJECT_SOURCE_DIR}/cmake/amalgamate.py
    COMMENT "One header: ${diffattn_one_file}"
    VERBATIM)
  add_custom_target(amalgamate DEPENDS ${diffattn_one_file})
endif()
