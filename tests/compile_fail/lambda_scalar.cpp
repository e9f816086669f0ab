// error: diffattn: lambda must be a number or a matrix of the scalar type of the queries

#include <diffattn/kernels/diff_attention.hpp>

#ifdef MISUSE
using Lambda = Eigen::VectorXd;
#else
using Lambda = Eigen::VectorXf;
#endif

auto attend(const Eigen::MatrixXf& x, const Lambda& lambda) { return diffattn::diff_attention(x, x, x, x, x, lambda); }
