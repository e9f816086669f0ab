#include "support/loss_curve.hpp"

#include <algorithm>
#include <cmath>
#include <fstream>
#include <stdexcept>

namespace example {

namespace {

std::ofstream open(const std::filesystem::path& path) {
  std::ofstream file(path);
  if (!file) throw std::runtime_error(path.string() + ": cannot be written");
  return file;
}

}  // namespace

void save_csv(const std::filesystem::path& path, const std::vector<LossCurve>& curves) {
  std::ofstream file = open(path);
  file << "model,step,training,validation\n";
  for (const LossCurve& curve : curves) {
    for (const CurvePoint& p : curve.points) {
      file << curve.name << ',' << p.step << ',' << p.training << ',' << p.validation << '\n';
    }
  }
}

void save_svg(const std::filesystem::path& path, const std::vector<LossCurve>& curves) {
  constexpr double kWidth = 640, kHeight = 400, kLeft = 60, kTop = 20, kRight = 620, kBottom = 350;
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
  svg << "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"" << kWidth << "\" height=\"" << kHeight
      << "\" font-family=\"sans-serif\" font-size=\"12\">\n<rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n";
  for (double loss = least; loss <= most + 1e-9; loss += 0.5) {
    svg << "<path d=\"M" << kLeft << ' ' << y(loss) << 'H' << kRight << "\" stroke=\"#ddd\"/><text x=\"" << kLeft - 8
        << "\" y=\"" << y(loss) + 4 << "\" text-anchor=\"end\">" << loss << "</text>\n";
  }
  for (int tick = 0; tick <= 4; ++tick) {
    const double step = std::round(last_step * tick / 4);
    svg << "<text x=\"" << x(step) << "\" y=\"" << kBottom + 18 << "\" text-anchor=\"middle\">" << step << "</text>\n";
  }
  svg << "<text x=\"" << (kLeft + kRight) / 2 << "\" y=\"" << kBottom + 38
      << "\" text-anchor=\"middle\">step</text>\n<text x=\"16\" y=\"" << (kTop + kBottom) / 2
      << "\" text-anchor=\"middle\" transform=\"rotate(-90 16 " << (kTop + kBottom) / 2
      << ")\">nats a byte: training (line), validation (dots)</text>\n";
  for (std::size_t c = 0; c < curves.size(); ++c) {
    const char* const color = colors[c % std::size(colors)];
    svg << "<polyline fill=\"none\" stroke-width=\"1.5\" stroke=\"" << color << "\" points=\"";
    for (const CurvePoint& p : curves[c].points) svg << x(static_cast<double>(p.step)) << ',' << y(p.training) << ' ';
    svg << "\"/>\n";
    for (const CurvePoint& p : curves[c].points) {
      svg << "<circle r=\"2.5\" fill=\"" << color << "\" cx=\"" << x(static_cast<double>(p.step)) << "\" cy=\""
          << y(p.validation) << "\"/>\n";
    }
    svg << "<text x=\"" << kRight - 8 << "\" y=\"" << kTop + 16 * static_cast<double>(c + 1)
        << "\" text-anchor=\"end\" fill=\"" << color << "\">" << curves[c].name << "</text>\n";
  }
  svg << "</svg>\n";
}

}  // namespace example
