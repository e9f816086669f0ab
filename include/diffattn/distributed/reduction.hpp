#pragma once

// What all_reduce makes of the values that the ranks have (communicator.hpp).

namespace diffattn::inline v0_1 {

/// Their sum, added in the order of the ranks, or the largest of them.
enum class Reduction { sum, max };

}  // namespace diffattn::inline v0_1
