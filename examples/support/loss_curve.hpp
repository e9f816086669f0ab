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

/// "step,training,validation" for each point, a line each: what a checkpoint keeps of the curve.
std::string to_text(const std::vector<CurvePoint>& points);

/// The points that to_text wrote; throws std::runtime_error for anything else.
std::vector<CurvePoint> curve_from_text(const std::string& text);

/// model,step,training,validation; throws std::runtime_error if it cannot be written.
void save_csv(const std::filesystem::path& path, const std::vector<LossCurve>& curves);

/// Training loss as lines, validation loss as dots, a colour a model.
void save_svg(const std::filesystem::path& path, const std::string& title, const std::vector<LossCurve>& curves);

}  // namespace example
