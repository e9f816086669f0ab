// error: diffattn: the keys must have the scalar type of the queries; convert with .template cast<>()

#include <diffattn/kernels/attention.hpp>

#ifdef MISUSE
auto attend(const Eigen::MatrixXf& q, const Eigen::MatrixXd& kv) { return diffattn::attention(q, kv, kv); }
#else
auto attend(const Eigen::MatrixXf& q, const Eigen::MatrixXd& kv) {
  return diffattn::attention(q, kv.cast<float>(), kv.cast<float>());
}
#endif
