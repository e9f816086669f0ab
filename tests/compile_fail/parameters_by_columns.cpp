// A parameter that files would hold transposed.
// error: diffattn: a parameter must be row-major, as diffattn::Matrix is

#include <diffattn/io/parameters.hpp>

struct Model {
#ifdef MISUSE
  Eigen::MatrixXf weight{2, 3};
#else
  diffattn::Matrix<float> weight{2, 3};
#endif

  template <typename Self, typename Visitor>
  static void visit(Self& self, Visitor& visitor) {
    visitor("weight", self.weight);
  }
};

void load(Model& model, const diffattn::Safetensors& file) { load_parameters(model, file); }
