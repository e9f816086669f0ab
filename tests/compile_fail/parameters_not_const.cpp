// A model whose parameters can be listed only where they may change: a const one could not be saved.
// error: diffattn: visit(self, visitor) must take a const object too: make it a template on the type of self

#include <diffattn/layers/parameters.hpp>

struct Model {
  diffattn::Matrix<float> weight{2, 3};

#ifdef MISUSE
  template <typename Visitor>
  static void visit(Model& self, Visitor& visitor){
#else
  template <typename Self, typename Visitor>
  static void visit(Self& self, Visitor& visitor) {
#endif
      visitor("weight", self.weight);
}
}
;

int main() {
  Model model;
  diffattn::visit_part("model", model, [](std::string_view, auto& parameter) { parameter.setZero(); });
  return model.weight.isZero() ? 0 : 1;
}
