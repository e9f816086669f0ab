#pragma once

// Attention maps as a PNG: panels side by side, one a map, query rows downwards and key columns to the right.

#include <Eigen/Core>
#include <string>
#include <vector>

namespace example {

enum class Palette {
  red,       ///< white 0 to dark red 1
  blue,      ///< white 0 to dark blue 1
  diverging  ///< dark blue −1, white 0, dark red 1
};

struct Panel {
  std::string title;
  Eigen::MatrixXd map;  ///< weights in [−1, 1]; keys above the diagonal are drawn as masked
  Palette palette;
};

/// Draws panels of one size in a row, each with its title and colour bar, `cell` pixels a weight. Colours follow the
/// square root of a weight, so that small ones can be seen. Throws std::runtime_error if the file cannot be written.
void save_picture(const std::string& path, const std::vector<Panel>& panels, int cell = 4);

}  // namespace example
