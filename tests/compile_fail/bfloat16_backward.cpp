// error: diffattn: gradients are computed of float or double, not of bfloat16; convert with .template cast<>()

#include <diffattn/kernels/backward.hpp>

using Narrow = diffattn::Matrix<Eigen::bfloat16>;

#ifdef MISUSE
auto differentiate(const Narrow& x) { return diffattn::diff_attention_backward(x, x, x, x, x, 0.5f, x); }
#else
auto differentiate(const Narrow& x) {
  const diffattn::Matrix<float> wide = x.cast<float>();
  return diffattn::diff_attention_backward(wide, wide, wide, wide, wide, 0.5f, wide);
}
#endif
