# `cpack` in the build folder makes a tarball and, where dpkg is, a Debian package of what is installed.
set(CPACK_PACKAGE_CONTACT "the diffattn authors <diffattn@localhost>")
set(CPACK_RESOURCE_FILE_LICENSE ${PROJECT_SOURCE_DIR}/LICENSE)
set(CPACK_PACKAGE_FILE_NAME diffattn-${PROJECT_VERSION}) # headers: not of any system
set(CPACK_GENERATOR TGZ)
find_program(DPKG_DEB dpkg-deb)
mark_as_advanced(DPKG_DEB)
if(DPKG_DEB)
  list(APPEND CPACK_GENERATOR DEB)
endif()

set(CPACK_DEBIAN_PACKAGE_NAME libdiffattn-dev)
set(CPACK_DEBIAN_FILE_NAME libdiffattn-dev_${PROJECT_VERSION}_all.deb)
set(CPACK_DEBIAN_PACKAGE_ARCHITECTURE all)
set(CPACK_DEBIAN_PACKAGE_SECTION libdevel)
set(CPACK_DEBIAN_PACKAGE_DEPENDS "libeigen3-dev (>= 3.4)")
# Only diffattn::io and diffattn::mpi need them.
set(CPACK_DEBIAN_PACKAGE_RECOMMENDS "nlohmann-json3-dev (>= 3.9)")
set(CPACK_DEBIAN_PACKAGE_SUGGESTS "libopenmpi-dev | libmpich-dev")
install(FILES LICENSE DESTINATION ${CMAKE_INSTALL_DATADIR}/doc/libdiffattn-dev RENAME copyright)
include(CPack)
