# diffattn_own_target(target): the flags of our own tests, examples and benchmarks. Users of the library see none of it.

add_library(diffattn_own_flags INTERFACE)
target_compile_options(
  diffattn_own_flags
  INTERFACE
    -Wall -Wextra -Wpedantic -Wconversion -Wshadow
    # GCC 12 takes the undefined operands inside its own AVX-512 intrinsics for a mistake of ours.
    $<$<CXX_COMPILER_ID:GNU>:-Wno-uninitialized;-Wno-maybe-uninitialized>
    $<$<BOOL:${DIFFATTN_NATIVE}>:-march=native>)
if(DIFFATTN_PACKET_BYTES)
  # Packets that are wider than the target's are passed in memory; GCC says so at each of them.
  target_compile_options(diffattn_own_flags INTERFACE -Wno-psabi)
  target_compile_definitions(diffattn_own_flags INTERFACE DIFFATTN_PACKET_BYTES=${DIFFATTN_PACKET_BYTES})
endif()
if(DIFFATTN_SANITIZE)
  # pointer-overflow finds what Eigen does with an empty matrix, an offset to a null pointer; vptr and object-size cost
  # compile time for what AddressSanitizer mostly sees.
  target_compile_options(
    diffattn_own_flags
    INTERFACE -fsanitize=address,undefined -fno-sanitize=vptr,object-size,pointer-overflow -fno-sanitize-recover=all)
  target_link_options(diffattn_own_flags INTERFACE -fsanitize=address,undefined)
endif()
if(DIFFATTN_SANITIZE_THREADS)
  target_compile_options(diffattn_own_flags INTERFACE -fsanitize=thread)
  target_link_options(diffattn_own_flags INTERFACE -fsanitize=thread)
endif()

function(diffattn_own_target target)
  target_link_libraries(${target} PRIVATE diffattn::diffattn diffattn_own_flags)
  # The property, not -Werror: `cmake --compile-no-warning-as-error` then gets past the warnings of a future compiler.
  set_target_properties(${target} PROPERTIES CXX_EXTENSIONS OFF COMPILE_WARNING_AS_ERROR ON)
endfunction()
