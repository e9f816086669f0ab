#pragma once

// Images to recognise, made of random numbers: one large digit somewhere, small digits and noise that have nothing to
// say. As many as you like, none twice.

#include <algorithm>
#include <array>
#include <cstdint>
#include <diffattn/core/matrix.hpp>
#include <diffattn/core/random.hpp>
#include <vector>

namespace example {

inline constexpr diffattn::Index kImageSize = 24, kPatchSize = 4;  // pixels, of squares
inline constexpr diffattn::Index kPatches = (kImageSize / kPatchSize) * (kImageSize / kPatchSize);

/// One image a row, patch after patch, each with its pixels row by row; brightness around 0 to 1.
struct DigitImages {
  diffattn::Matrix<float> patches;                          ///< images · kPatches x kPatchSize²
  std::vector<diffattn::Index> digits;                      ///< the large one of each image, 0 to 9
  std::vector<std::vector<diffattn::Index>> digit_patches;  ///< those that it touches, of kPatches
};

/// The pixels of one image, kImageSize x kImageSize.
inline Eigen::MatrixXd image_of(const DigitImages& images, diffattn::Index number) {
  constexpr diffattn::Index kAcross = kImageSize / kPatchSize;
  Eigen::MatrixXd image(kImageSize, kImageSize);
  for (diffattn::Index y = 0; y < kImageSize; ++y) {
    for (diffattn::Index x = 0; x < kImageSize; ++x) {
      const diffattn::Index patch = number * kPatches + y / kPatchSize * kAcross + x / kPatchSize;
      image(y, x) = double(images.patches(patch, y % kPatchSize * kPatchSize + x % kPatchSize));
    }
  }
  return image;
}

/// Draws images from one stream of random numbers.
class DigitPainter {
 public:
  using Index = diffattn::Index;

  explicit DigitPainter(std::uint64_t seed) : random_(seed) {}

  DigitImages paint(Index count) {
    DigitImages images{diffattn::Matrix<float>(count * kPatches, kPatchSize * kPatchSize), {}, {}};
    for (Index i = 0; i < count; ++i) {
      const diffattn::Matrix<float> pixels = paint_one(images);
      for (Index patch = 0; patch < kPatches; ++patch) {
        constexpr Index kAcross = kImageSize / kPatchSize;
        const diffattn::Matrix<float> square =
            pixels.block(patch / kAcross * kPatchSize, patch % kAcross * kPatchSize, kPatchSize, kPatchSize);
        images.patches.row(i * kPatches + patch) = square.reshaped<Eigen::RowMajor>().transpose();
      }
    }
    return images;
  }

 private:
  static constexpr Index kGlyphWidth = 5, kGlyphHeight = 7, kSmallDigits = 4;
  static constexpr float kNoise = 0.4f;

  diffattn::Matrix<float> paint_one(DigitImages& images) {
    diffattn::Matrix<float> pixels = diffattn::Matrix<float>::Zero(kImageSize, kImageSize);
    for (Index i = 0; i < kSmallDigits; ++i) draw(pixels, random_.below(10), 1);
    images.digits.push_back(random_.below(10));
    images.digit_patches.push_back(draw(pixels, images.digits.back(), 2));
    for (float& pixel : pixels.reshaped()) pixel += kNoise * static_cast<float>(2 * random_.unit() - 1);
    return pixels;
  }

  /// At a place of its own, each pixel of the glyph `scale` pixels wide. Returns the patches that it touches.
  std::vector<Index> draw(diffattn::Matrix<float>& pixels, Index digit, Index scale) {
    // Five pixels a row, the leftmost the highest bit.
    static constexpr std::array<std::array<std::uint8_t, kGlyphHeight>, 10> kGlyphs{{{14, 17, 19, 21, 25, 17, 14},
                                                                                     {4, 12, 4, 4, 4, 4, 14},
                                                                                     {14, 17, 1, 2, 4, 8, 31},
                                                                                     {31, 2, 4, 2, 1, 17, 14},
                                                                                     {2, 6, 10, 18, 31, 2, 2},
                                                                                     {31, 16, 30, 1, 1, 17, 14},
                                                                                     {6, 8, 16, 30, 17, 17, 14},
                                                                                     {31, 1, 2, 4, 8, 8, 8},
                                                                                     {14, 17, 17, 14, 17, 17, 14},
                                                                                     {14, 17, 17, 15, 1, 2, 12}}};
    const Index width = scale * kGlyphWidth, height = scale * kGlyphHeight;
    const Index left = scale * random_.below((kImageSize - width) / scale + 1);
    const Index top = scale * random_.below((kImageSize - height) / scale + 1);
    for (Index y = 0; y < height; ++y) {
      for (Index x = 0; x < width; ++x) {
        const int row = kGlyphs[static_cast<std::size_t>(digit)][static_cast<std::size_t>(y / scale)];
        const bool inked = (row >> (kGlyphWidth - 1 - x / scale) & 1) != 0;
        // A large digit hides what lies under it; small ones add up.
        float& pixel = pixels(top + y, left + x);
        pixel = inked ? 1.0f : scale == 1 ? pixel : std::min(pixel, 0.5f);
      }
    }
    std::vector<Index> patches;
    for (Index y = top / kPatchSize; y <= (top + height - 1) / kPatchSize; ++y) {
      for (Index x = left / kPatchSize; x <= (left + width - 1) / kPatchSize; ++x) {
        patches.push_back(y * kImageSize / kPatchSize + x);
      }
    }
    return patches;
  }

  diffattn::SplitMix64 random_;
};

}  // namespace example
