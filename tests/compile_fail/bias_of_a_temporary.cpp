// error: deleted

#include <diffattn/kernels/attention.hpp>

Eigen::MatrixXf padding();

#ifdef MISUSE
auto mask() { return diffattn::with_bias(diffattn::CausalMask{}, diffattn::MatrixBias(padding())); }
#else
auto mask(Eigen::MatrixXf& m, const Eigen::MatrixXf& constant, const Eigen::Ref<const Eigen::MatrixXf>& ref) {
  const diffattn::MatrixBias<float> biases[] = {
      diffattn::MatrixBias(m),
      diffattn::MatrixBias(constant),
      diffattn::MatrixBias(ref),
      diffattn::MatrixBias(m.topRows(2)),
      diffattn::MatrixBias(m.transpose()),
      diffattn::MatrixBias(Eigen::Ref<Eigen::MatrixXf>(m)),
      diffattn::MatrixBias(Eigen::Map<const Eigen::MatrixXf>(m.data(), 2, 2)),
  };
  return diffattn::with_bias(diffattn::CausalMask{}, biases[0]);
}
#endif
