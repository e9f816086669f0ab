#pragma once

// The scalars that a test is repeated for. Under packets of the compilers' vectors, which CI compiles with sanitizers at
// two widths more, one of them: float with 64 bytes, which has the most lanes, double with 16, which has the fewest.
// Both run at 32 bytes, and with the machine's own packets.

#if !defined(DIFFATTN_PACKET_BYTES) || DIFFATTN_PACKET_BYTES == 32
#define DIFFATTN_TEST_SCALARS float, double
#elif DIFFATTN_PACKET_BYTES == 64
#define DIFFATTN_TEST_SCALARS float
#else
#define DIFFATTN_TEST_SCALARS double
#endif
