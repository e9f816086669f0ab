#include "attention_picture.hpp"

#define STB_IMAGE_WRITE_IMPLEMENTATION
#include <stb/stb_easy_font.h>
#include <stb/stb_image_write.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <filesystem>
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

// Pixels. A panel is its title, the map with its axes, and the colour bar with its own.
constexpr int kMargin = 16, kHeading = 44, kTitle = 24, kLeft = 66, kRight = 30;
constexpr int kTickLength = 6, kAxis = 48, kBar = 12, kBarAxis = 52;
constexpr int kText = 2;         // the scale of the font
constexpr int kTextHeight = 14;  // of its capitals

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

  enum class Align { left, centre, right };

  /// x is the left end, the middle or the right end of the text, y the upper end of its capitals.
  void write(int x, int y, std::string text, Align align = Align::left) {
    const int width = kText * stb_easy_font_width(text.data());
    if (align != Align::left) x -= align == Align::centre ? width / 2 : width;
    for_each_stroke(text, [&](int left, int top, int stroke_width, int stroke_height) {
      fill(x + left, y + top, stroke_width, stroke_height, kInk);
    });
  }

  /// The same, from bottom to top, its middle at y; x is the upper end of its capitals.
  void write_upwards(int x, int y, std::string text) {
    const int bottom = y + kText * stb_easy_font_width(text.data()) / 2;
    for_each_stroke(text, [&](int left, int top, int stroke_width, int stroke_height) {
      fill(x + top, bottom - left - stroke_width, stroke_height, stroke_width, kInk);
    });
  }

  /// Draws from (x, y) on, where the title begins.
  void draw(int x, int y, const Panel& panel, int cell) {
    const int n_q = static_cast<int>(panel.map.rows()), n_k = static_cast<int>(panel.map.cols());
    const int width = n_k * cell, height = n_q * cell, left = x + kLeft, top = y + kTitle, bottom = top + height;
    write(left + width / 2, y, panel.title, Align::centre);
    fill(left - 1, top - 1, width + 2, height + 2, kInk);
    for (int i = 0; i < n_q; ++i) {
      for (int j = 0; j < n_k; ++j) {
        const bool masked = panel.image.size() == 0 && j > i + n_k - n_q;
        Colour colour = masked ? kMasked : colour_of(panel.map(i, j), panel.palette);
        if (panel.image.size() != 0) colour *= 1 - 0.7 * std::clamp(panel.image(i, j), 0.0, 1.0);
        fill(left + j * cell, top + i * cell, cell, cell, colour);
      }
    }
    for (int key = 0; key < n_k; key += kTickEvery) {
      const int at = left + key * cell + cell / 2;
      fill(at, bottom + 1, 1, kTickLength, kInk);
      write(at, bottom + kTickLength + 5, std::to_string(key), Align::centre);
    }
    for (int query = 0; query < n_q; query += kTickEvery) {
      const int at = top + query * cell + cell / 2;
      fill(left - 1 - kTickLength, at, kTickLength, 1, kInk);
      write(left - kTickLength - 5, at - kTextHeight / 2, std::to_string(query), Align::right);
    }
    write(left + width / 2, bottom + kTickLength + 5 + kTextHeight + 6, panel.image.size() == 0 ? "key" : "x",
          Align::centre);
    write_upwards(x, top + height / 2, panel.image.size() == 0 ? "query" : "y");
    draw_bar(left, bottom + kAxis + 8, width, panel.palette);
  }

  bool save(const std::string& path) const {
    const int height = static_cast<int>(pixels_.rows()), bytes = static_cast<int>(pixels_.cols());
    return stbi_write_png(path.c_str(), bytes / 3, height, 3, pixels_.data(), bytes) != 0;
  }

 private:
  static constexpr int kTickEvery = 20;  // tokens

  void draw_bar(int x, int y, int width, Palette palette) {
    const double lowest = palette == Palette::diverging ? -1 : 0;
    fill(x - 1, y - 1, width + 2, kBar + 2, kInk);
    for (int column = 0; column < width; ++column) {
      fill(x + column, y, 1, kBar, colour_of(lowest + (1 - lowest) * column / (width - 1), palette));
    }
    const auto tick = [&](double weight, const char* text) {
      const int at = x + static_cast<int>(std::lround((weight - lowest) / (1 - lowest) * (width - 1)));
      fill(at, y + kBar + 1, 1, kTickLength, kInk);
      write(at, y + kBar + kTickLength + 5, text, Align::centre);
    };
    if (lowest < 0) {
      tick(-1, "-1");
      tick(-0.5, "-0.5");
    }
    tick(0, "0");
    tick(0.5, "0.5");
    tick(1, "1");
    write(x + width / 2, y + kBar + kTickLength + 5 + kTextHeight + 6, "attention weight", Align::centre);
  }

  /// Calls f(x, y, width, height) for the rectangles that a text is made of.
  template <typename F>
  static void for_each_stroke(std::string& text, const F& f) {
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
      f(kText * static_cast<int>(from.x), kText * static_cast<int>(from.y), kText * static_cast<int>(to.x - from.x),
        kText * static_cast<int>(to.y - from.y));
    }
  }

  Eigen::Matrix<std::uint8_t, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor> pixels_;  // red, green, blue; …
};

}  // namespace

std::string picture_title(long layer, long head, double lambda) {
  char title[100];
  std::snprintf(title, sizeof title, "Differential attention, layer %ld, head %ld, lambda = %.4f (grey: masked)", layer,
                head, lambda);
  return title;
}

std::string save_picture(const std::string& path, const std::string& title, const std::vector<Panel>& panels,
                         int cell) {
  const int map_width = static_cast<int>(panels.at(0).map.cols()) * cell;
  const int map_height = static_cast<int>(panels[0].map.rows()) * cell;
  const int step = kLeft + map_width + kRight, width = 2 * kMargin + static_cast<int>(panels.size()) * step;
  Canvas canvas(width, kMargin + kHeading + kTitle + map_height + kAxis + 8 + kBar + kBarAxis + kMargin);
  canvas.write(width / 2, kMargin, title, Canvas::Align::centre);
  int x = kMargin;
  for (const Panel& panel : panels) {
    canvas.draw(x, kMargin + kHeading, panel, cell);
    x += step;
  }
  if (!canvas.save(path)) throw std::runtime_error(path + ": cannot be written");
  return std::filesystem::absolute(path).string();
}

}  // namespace example
