// A layer in float, and x in double.
// error: diffattn: x and y must have the scalar type of the layer; convert with .template cast<>()

#include <diffattn/layers/multihead_attention.hpp>

int main() {
#ifdef MISUSE
  using Scalar = double;
#else
  using Scalar = float;
#endif
  const diffattn::MultiheadAttention<float> layer({.embed_dim = 8, .num_heads = 2});
  return layer.forward(diffattn::Matrix<Scalar>::Ones(3, 8)).rows() == 3 ? 0 : 1;
}
