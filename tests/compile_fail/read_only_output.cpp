// error: diffattn: the output must be a writable Matrix, Map, Ref or Block

#include <diffattn/kernels/attention.hpp>

#ifdef MISUSE
using Out = Eigen::Map<const Eigen::MatrixXf>;
#else
using Out = Eigen::Map<Eigen::MatrixXf>;
#endif

void attend(Out out, const Eigen::MatrixXf& x) { diffattn::attention_into(out, x, x, x); }
