#pragma once

// A small model of named parameters, for what is tested on parameters alone.

#include <string_view>

#include "diffattn/core/matrix.hpp"
#include "diffattn/layers/parameters.hpp"
#include "support/random.hpp"

/// A projection with a bias, a norm and a λ vector, under the names that layers give them.
template <typename Scalar>
struct SmallModel {
  explicit SmallModel(diffattn::Index rows = 3, diffattn::Index cols = 5)
      : weight(diffattn::Matrix<Scalar>::Zero(rows, cols)),
        bias(diffattn::Vector<Scalar>::Zero(rows)),
        norm(diffattn::Vector<Scalar>::Zero(cols)),
        lambda(diffattn::Vector<Scalar>::Zero(2)) {}

  template <typename Self, typename Visitor>
  static void visit(Self& self, Visitor& visitor) {
    visitor("layers.0.q_proj.weight", self.weight);
    visitor("layers.0.q_proj.bias", self.bias);
    visitor("final_norm.weight", self.norm);
    visitor("layers.0.lambda_q1", self.lambda);
  }

  diffattn::Matrix<Scalar> weight;
  diffattn::Vector<Scalar> bias, norm, lambda;
};

template <typename Scalar>
SmallModel<Scalar> random_model(support::Rng& rng, diffattn::Index rows = 3, diffattn::Index cols = 5) {
  SmallModel<Scalar> model(rows, cols);
  diffattn::visit_parameters(model, [&](std::string_view, auto& parameter) {
    parameter = support::random_matrix<Scalar>(parameter.rows(), parameter.cols(), rng);
  });
  return model;
}

/// The same numbers in every parameter; NaN is equal to nothing.
template <typename Model>
bool same_parameters(const Model& a, const Model& b) {
  std::vector<diffattn::Matrix<double>> values;
  diffattn::visit_parameters(a, [&](std::string_view, const auto& p) { values.push_back(p.template cast<double>()); });
  std::size_t index = 0;
  bool same = true;
  diffattn::visit_parameters(b, [&](std::string_view, const auto& p) {
    same = same && index < values.size() && values[index].rows() == p.rows() && values[index].cols() == p.cols() &&
           values[index] == diffattn::Matrix<double>(p.template cast<double>());
    ++index;
  });
  return same && index == values.size();
}
