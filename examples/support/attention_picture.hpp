#pragma once

// Attention maps as a PNG: panels side by side, one a map, query rows downwards and key columns to the right; or what one
// query attends to, over the pixels of an image.

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
  Eigen::MatrixXd image = {};  ///< of the map's size: brightness from 0 to 1 of pixels, whose weights the map has
};

/// What a picture of the maps of one head is called.
std::string picture_title(long layer, long head, double lambda);

/// Draws panels of one size in a row under a title, each with its own title, axes with ticks and a colour bar, `cell`
/// pixels a weight, and returns where it is. Colours follow the square root of a weight, so that small ones can be
/// seen. Throws std::runtime_error if the file cannot be written.
std::string save_picture(const std::string& path, const std::string& title, const std::vector<Panel>& panels,
                         int cell = 4);

}  // namespace example
