// A model that does not say what its parameters are.
// error: diffattn: the class must list its parameters: template <typename Self, typename Visitor> static void visit(Self& self, Visitor& visitor), as layers/parameters.hpp says

#include <diffattn/layers/parameters.hpp>

struct Model {
  diffattn::Matrix<float> weight{2, 3};

#ifndef MISUSE
  template <typename Self, typename Visitor>
  static void visit(Self& self, Visitor& visitor) {
    visitor("weight", self.weight);
  }
#endif
};

int main() { return diffattn::parameter_count(Model{}) == 6 ? 0 : 1; }
