// error: diffattn: q2 must have the scalar type of q1; convert with .template cast<>()

#include <diffattn/kernels/diff_attention.hpp>

#ifdef MISUSE
using Second = Eigen::MatrixXd;
#else
using Second = Eigen::MatrixXf;
#endif

auto attend(const Eigen::MatrixXf& x, const Second& q2) { return diffattn::diff_attention(x, x, q2, x, x, 0.5f); }
