#include "support/loss_curve.hpp"

#include <algorithm>
#include <cmath>
#include <fstream>
#include <limits>
#include <sstream>
#include <stdexcept>

namespace example {

namespace {

std::ofstream open(const std::filesystem::path& path) {
  std::ofstream file(path);
  if (!file) throw std::runtime_error(path.string() + ": cannot be written");
  return file;
}

}  // namespace

std::string to_text(const std::vector<CurvePoint>& points) {
  std::ostringstream text;
  text.precision(std::numeric_limits<double>::max_digits10);
  for (const CurvePoint& p : points) text << p.step << ',' << p.training << ',' << p.validation << '\n';
  return text.str();
}

std::vector<CurvePoint> curve_from_text(const std::string& text) {
  std::istringstream lines(text);
  std::vector<CurvePoint> points;
  for (std::string line; std::getline(lines, line);) {
    std::istringstream numbers(line);
    CurvePoint p{};
    char comma[2] = {};
    numbers >> p.step >> comma[0] >> p.training >> comma[1] >> p.validation;
    if (!numbers || comma[0] != ',' || comma[1] != ',') {
      throw std::runtime_error("a loss curve must have lines of step,training,validation, got " + line);
    }
    points.push_back(p);
  }
  return points;
}

void save_csv(const std::filesystem::path& path, const std::vector<LossCurve>& curves) {
  std::ofstream file = open(path);
  file << "model,step,training,validation\n";
  for (const LossCurve& curve : curves) {
    for (const CurvePoint& p : curve.points) {
      file << curve.name << ',' << p.step << ',' << p.training << ',' << p.validation << '\n';
    }
  }
}

void save_svg(const std::filesystem::path& path, const std::string& title, const std::vector<LossCurve>& curves) {
  constexpr double kWidth = 720, kHeight = 440, kLeft = 70, kTop = 50, kRight = 700, kBottom = 380;
  const char* const colors[] = {"#c0392b", "#2c5fa8", "#3a7d44", "#8e5ea2"};
  double last_step = 1, least = 1e9, most = 0;
  for (const LossCurve& curve : curves) {
    for (const CurvePoint& p : curve.points) {
      last_step = std::max(last_step, static_cast<double>(p.step));
      least = std::min({least, p.training, p.validation});
      most = std::max({most, p.training, p.validation});
    }
  }
  least = std::floor(least * 2) / 2;
  most = std::max(std::ceil(most * 2) / 2, least + 0.5);
  const auto x = [&](double step) { return kLeft + (kRight - kLeft) * step / last_step; };
  const auto y = [&](double loss) { return kBottom - (kBottom - kTop) * (loss - least) / (most - least); };

  std::ofstream svg = open(path);
  const auto text = [&](double at_x, double at_y, const char* anchor, const auto& words, const char* more = "") {
    svg << "<text x=\"" << at_x << "\" y=\"" << at_y << "\" text-anchor=\"" << anchor << "\" " << more << '>' << words
        << "</text>\n";
  };
  svg << "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"" << kWidth << "\" height=\"" << kHeight
      << "\" font-family=\"sans-serif\" font-size=\"12\">\n<rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n";
  text((kLeft + kRight) / 2, 24, "middle", title, "font-size=\"15\"");
  for (double loss = least; loss <= most + 1e-9; loss += 0.5) {
    svg << "<path d=\"M" << kLeft - 5 << ' ' << y(loss) << 'H' << kRight << "\" stroke=\"#ddd\"/>\n";
    text(kLeft - 9, y(loss) + 4, "end", loss);
  }
  for (int tick = 0; tick <= 5; ++tick) {
    const double step = std::round(last_step * tick / 5);
    svg << "<path d=\"M" << x(step) << ' ' << kBottom << "v5\" stroke=\"#444\"/>\n";
    text(x(step), kBottom + 19, "middle", step);
  }
  svg << "<path d=\"M" << kLeft << ' ' << kTop << 'V' << kBottom << 'H' << kRight
      << "\" fill=\"none\" stroke=\"#444\"/>\n<g transform=\"rotate(-90 20 " << (kTop + kBottom) / 2 << ")\">";
  text(20, (kTop + kBottom) / 2, "middle", "loss, nats a byte");
  svg << "</g>\n";
  text((kLeft + kRight) / 2, kBottom + 42, "middle", "optimizer step");
  for (std::size_t c = 0; c < curves.size(); ++c) {
    const char* const color = colors[c % std::size(colors)];
    svg << "<polyline fill=\"none\" stroke-width=\"1.5\" stroke=\"" << color << "\" points=\"";
    for (const CurvePoint& p : curves[c].points) svg << x(static_cast<double>(p.step)) << ',' << y(p.training) << ' ';
    svg << "\"/>\n";
    const auto dot = [&](double at_x, double at_y) {
      svg << "<circle r=\"3\" fill=\"" << color << "\" cx=\"" << at_x << "\" cy=\"" << at_y << "\"/>\n";
    };
    for (const CurvePoint& p : curves[c].points) dot(x(static_cast<double>(p.step)), y(p.validation));
    const double row = kTop + 14 + 20 * static_cast<double>(c), begin = kRight - 280;  // of the legend
    svg << "<path d=\"M" << begin << ' ' << row - 4 << "h24\" stroke-width=\"1.5\" stroke=\"" << color << "\"/>\n";
    text(begin + 30, row, "start", curves[c].name + ", training");
    dot(begin + 180, row - 4);
    text(begin + 190, row, "start", "validation");
  }
  svg << "</svg>\n";
}

}  // namespace example
