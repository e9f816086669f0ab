#include "attention_picture.hpp"

#define STB_IMAGE_WRITE_IMPLEMENTATION
#include <stb/stb_easy_font.h>
#include <stb/stb_image_write.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <stdexcept>

namespace example {
namespace {

using Colour = Eigen::Array3d;  // red, green, blue in [0, 255]

const Colour kInk{40, 40, 40}, kMasked{236, 236, 236};
// ColorBrewer's RdBu, from white outwards (colorbrewer2.org, Cynthia Brewer).
const std::array<Colour, 6> kReds{
    {{255, 255, 255}, {253, 219, 199}, {244, 165, 130}, {214, 96, 77}, {178, 24, 43}, {103, 0, 31}}};
const std::array<Colour, 6> kBlues{
    {{255, 255, 255}, {209, 229, 240}, {146, 197, 222}, {67, 147, 195}, {33, 102, 172}, {5, 48, 97}}};

constexpr int kGap = 24, kTitle = 28, kBar = 10, kBarText = 32;  // pixels
constexpr int kText = 2;                                         // the scale of the font

Colour colour_of(double weight, Palette palette) {
  const auto& ramp = palette == Palette::blue || (palette == Palette::diverging && weight < 0) ? kBlues : kReds;
  const double at = std::sqrt(std::min(std::abs(weight), 1.0)) * static_cast<double>(ramp.size() - 1);
  const auto below = std::min(static_cast<std::size_t>(at), ramp.size() - 2);
  const double part = at - static_cast<double>(below);
  return (1 - part) * ramp[below] + part * ramp[below + 1];
}

class Canvas {
 public:
  Canvas(int width, int height) : pixels_(height, 3 * width) { pixels_.setConstant(255); }

  void fill(int x, int y, int width, int height, const Colour& colour) {
    for (int row = y; row < y + height; ++row) {
      for (int value = 0; value < 3 * width; ++value) {
        pixels_(row, 3 * x + value) = static_cast<std::uint8_t>(std::lround(colour[value % 3]));
      }
    }
  }

  void write(int x, int y, std::string text) {
    struct Vertex {
      float x, y, z;
      std::uint8_t colour[4];
    };
    std::vector<Vertex> corners(128 * (text.size() + 1));  // more than a character needs
    const int bytes = static_cast<int>(corners.size() * sizeof(Vertex));
    const int quads = stb_easy_font_print(0, 0, text.data(), nullptr, corners.data(), bytes);
    for (std::size_t corner = 0; corner < 4 * static_cast<std::size_t>(quads); corner += 4) {
      const Vertex& from = corners[corner];
      const Vertex& to = corners[corner + 2];
      fill(x + kText * static_cast<int>(from.x), y + kText * static_cast<int>(from.y),
           kText * static_cast<int>(to.x - from.x), kText * static_cast<int>(to.y - from.y), kInk);
    }
  }

  void draw(int x, int y, const Panel& panel, int cell) {
    const int n_q = static_cast<int>(panel.map.rows()), n_k = static_cast<int>(panel.map.cols());
    const int width = n_k * cell, bottom = y + kTitle + n_q * cell;
    write(x, y + 4, panel.title);
    fill(x - 1, y + kTitle - 1, width + 2, n_q * cell + 2, kInk);
    for (int i = 0; i < n_q; ++i) {
      for (int j = 0; j < n_k; ++j) {
        const bool masked = j > i + n_k - n_q;
        fill(x + j * cell, y + kTitle + i * cell, cell, cell,
             masked ? kMasked : colour_of(panel.map(i, j), panel.palette));
      }
    }
    const double lowest = panel.palette == Palette::diverging ? -1 : 0;
    for (int column = 0; column < width; ++column) {
      fill(x + column, bottom + 8, 1, kBar, colour_of(lowest + (1 - lowest) * column / (width - 1), panel.palette));
    }
    write(x, bottom + kBar + 12, lowest < 0 ? "-1" : "0");
    if (lowest < 0) write(x + width / 2 - 4, bottom + kBar + 12, "0");
    write(x + width - 10, bottom + kBar + 12, "1");
  }

  bool save(const std::string& path) const {
    const int height = static_cast<int>(pixels_.rows()), bytes = static_cast<int>(pixels_.cols());
    return stbi_write_png(path.c_str(), bytes / 3, height, 3, pixels_.data(), bytes) != 0;
  }

 private:
  Eigen::Matrix<std::uint8_t, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor> pixels_;  // red, green, blue; …
};

}  // namespace

void save_picture(const std::string& path, const std::vector<Panel>& panels, int cell) {
  const int step = static_cast<int>(panels.at(0).map.cols()) * cell + kGap;
  const int height = kGap + kTitle + static_cast<int>(panels[0].map.rows()) * cell + kBar + kBarText;
  Canvas canvas(static_cast<int>(panels.size()) * step + kGap, height);
  int x = kGap;
  for (const Panel& panel : panels) {
    canvas.draw(x, kGap / 2, panel, cell);
    x += step;
  }
  if (!canvas.save(path)) throw std::runtime_error(path + ": cannot be written");
}

}  // namespace example
