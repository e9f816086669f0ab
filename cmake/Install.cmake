include(CMakePackageConfigHelpers)

# Everything is headers and text, so all of it goes to the architecture-independent folders.
set(package_dir ${CMAKE_INSTALL_DATADIR}/cmake/diffattn)

install(TARGETS diffattn EXPORT diffattn_targets FILE_SET HEADERS)
install(EXPORT diffattn_targets FILE diffattnTargets.cmake NAMESPACE diffattn:: DESTINATION ${package_dir})

set(diffattn_components "")
# diffattn::io has an export of its own, loaded only when the component `io` is asked for.
if(TARGET diffattn_io)
  list(APPEND diffattn_components io)
  install(TARGETS diffattn_io EXPORT diffattn_io_targets FILE_SET HEADERS)
  install(EXPORT diffattn_io_targets FILE diffattnIoTargets.cmake NAMESPACE diffattn:: DESTINATION ${package_dir})
endif()

# So has diffattn::mpi, for the component `mpi`.
if(TARGET diffattn_mpi)
  list(APPEND diffattn_components mpi)
  install(TARGETS diffattn_mpi EXPORT diffattn_mpi_targets FILE_SET HEADERS)
  install(EXPORT diffattn_mpi_targets FILE diffattnMpiTargets.cmake NAMESPACE diffattn:: DESTINATION ${package_dir})
endif()

configure_package_config_file(cmake/diffattnConfig.cmake.in diffattnConfig.cmake INSTALL_DESTINATION ${package_dir})
write_basic_package_version_file(diffattnConfigVersion.cmake COMPATIBILITY SameMinorVersion ARCH_INDEPENDENT)
install(FILES ${CMAKE_CURRENT_BINARY_DIR}/diffattnConfig.cmake ${CMAKE_CURRENT_BINARY_DIR}/diffattnConfigVersion.cmake
        DESTINATION ${package_dir})

# The .pc files find the headers from where they lie themselves, so an installed tree can be moved.
set(pc_dir ${CMAKE_INSTALL_FULL_DATADIR}/pkgconfig)
file(RELATIVE_PATH pc_to_include ${pc_dir} ${CMAKE_INSTALL_FULL_INCLUDEDIR})
set(modules diffattn)
if(TARGET diffattn_io)
  list(APPEND modules diffattn-io)
endif()
foreach(module IN LISTS modules)
  configure_file(cmake/${module}.pc.in ${module}.pc @ONLY)
  install(FILES ${CMAKE_CURRENT_BINARY_DIR}/${module}.pc DESTINATION ${CMAKE_INSTALL_DATADIR}/pkgconfig)
endforeach()

if(PROJECT_IS_TOP_LEVEL)
  include(cmake/Package.cmake)
endif()
