// The operator alone, which compiles fast.

#include <diffattn/kernels/diff_attention.hpp>

int main() {
  const diffattn::Matrix<float> x = diffattn::Matrix<float>::Ones(3, 4);
  const diffattn::Matrix<float> y = diffattn::diff_attention(x, x, x, x, x, 0.25f);
  return (y.array() - 0.75f).abs().maxCoeff() < 1e-5f ? 0 : 1;
}
