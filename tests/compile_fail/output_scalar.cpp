// error: diffattn: the output and all gradients must have the scalar type of the queries

#include <diffattn/kernels/attention.hpp>

#ifdef MISUSE
using Out = Eigen::MatrixXd;
#else
using Out = Eigen::MatrixXf;
#endif

void attend(Out& out, const Eigen::MatrixXf& x) { diffattn::attention_into(out, x, x, x); }
