#pragma once

// Loss curves: as CSV for programs, and as a picture (SVG, which any browser shows).

#include <diffattn/core/matrix.hpp>
#include <filesystem>
#include <string>
#include <vector>

namespace example {

struct CurvePoint {
  diffattn::Index step;
  double training;    ///< mean over the steps since the last point, nats a byte
  double validation;  ///< nats a byte
};

struct LossCurve {
  std::string name;
  std::vector<CurvePoint> points;
};

/// model,step,training,validation; throws std::runtime_error if it cannot be written.
void save_csv(const std::filesystem::path& path, const std::vector<LossCurve>& curves);

/// Training loss as lines, validation loss as dots, a colour a model.
void save_svg(const std::filesystem::path& path, const std::vector<LossCurve>& curves);

}  // namespace example
