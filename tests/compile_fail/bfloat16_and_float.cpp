// error: diffattn: q is of bfloat16 and k of float; convert one of them with .template cast<>()

#include <diffattn/kernels/attention.hpp>

using Narrow = diffattn::Matrix<Eigen::bfloat16>;

#ifdef MISUSE
auto attend(const Narrow& q, const Eigen::MatrixXf& kv) { return diffattn::attention(q, kv, kv); }
#else
auto attend(const Narrow& q, const Eigen::MatrixXf& kv) {
  return diffattn::attention(q, kv.cast<Eigen::bfloat16>(), kv.cast<Eigen::bfloat16>());
}
#endif
