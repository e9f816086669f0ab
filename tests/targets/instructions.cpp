// One differential head over 960 tokens, or two standard heads with as many parameters: instructions.py counts the
// instructions of each. Usage: instructions difference | standard

#include <cstring>

#include "diffattn/diffattn.hpp"

namespace {

using M = diffattn::Matrix<float>;

constexpr diffattn::Index kTokens = 960, kWidth = 64;

struct Operands {
  M q1 = M::Random(kTokens, kWidth), k1 = M::Random(kTokens, kWidth), q2 = M::Random(kTokens, kWidth),
    k2 = M::Random(kTokens, kWidth), v1 = M::Random(kTokens, kWidth), v2 = M::Random(kTokens, kWidth),
    v = M::Random(kTokens, 2 * kWidth);
};

}  // namespace

// What callgrind counts, found by its name: one differential head, or two standard heads with as many parameters.
extern "C" {
__attribute__((noinline)) float counted_difference(const Operands& x) {
  return diffattn::diff_attention(x.q1, x.k1, x.q2, x.k2, x.v, 0.5f)(0, 0);
}
__attribute__((noinline)) float counted_standard(const Operands& x) {
  return diffattn::attention(x.q1, x.k1, x.v1)(0, 0) + diffattn::attention(x.q2, x.k2, x.v2)(0, 0);
}
}

int main(int argc, char** argv) {
  const Operands x;
  const char* what = argc > 1 ? argv[1] : "";
  float sum = 0;
  if (std::strcmp(what, "difference") == 0) sum = counted_difference(x);
  if (std::strcmp(what, "standard") == 0) sum = counted_standard(x);
  return sum == sum && sum != 0 ? 0 : 1;
}
