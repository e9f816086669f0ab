// error: diffattn: the gradients must have the scalar type of the queries

#include <diffattn/kernels/backward.hpp>

#ifdef MISUSE
using Gradients = diffattn::AttentionGradients<double>;
#else
using Gradients = diffattn::AttentionGradients<float>;
#endif

void attend(Gradients& gradients, const Eigen::MatrixXf& x) {
  diffattn::attention_backward_into(gradients, x, x, x, x);
}
