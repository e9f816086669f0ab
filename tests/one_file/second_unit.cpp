// A function that forgot to be inline is defined in both units, and the program does not link.

#include "one_file.hpp"

diffattn::Matrix<float> layer_output(const diffattn::Matrix<float>& x) {
  const diffattn::MultiheadDiffAttention<float> layer({.embed_dim = x.cols(), .num_heads = 2, .seed = 3});
  return layer.forward(x);
}
