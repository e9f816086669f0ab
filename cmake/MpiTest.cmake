# diffattn_add_mpi_test(name ranks target [argument...]): runs a program of ours on so many ranks of this machine, however
# few processors it has, also as root. OpenMPI asks for a word about both; other MPIs do not read the variables.
function(diffattn_add_mpi_test name ranks target)
  add_test(NAME ${name} COMMAND ${MPIEXEC_EXECUTABLE} ${MPIEXEC_NUMPROC_FLAG} ${ranks} ${MPIEXEC_PREFLAGS}
                                $<TARGET_FILE:${target}> ${MPIEXEC_POSTFLAGS} ${ARGN})
  set_tests_properties(
    ${name}
    PROPERTIES
      PROCESSORS 2 TIMEOUT 300 ENVIRONMENT
      "OMPI_ALLOW_RUN_AS_ROOT=1;OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1;OMPI_MCA_rmaps_base_oversubscribe=1;OMPI_MCA_hwloc_base_binding_policy=none;OMPI_MCA_mpi_yield_when_idle=1;PRTE_MCA_rmaps_default_mapping_policy=:oversubscribe"
  )
endfunction()
