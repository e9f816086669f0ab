// What you learn here: how to run a layer and a whole model on a stream that does not end, in memory that does not grow.
// A cache with a window keeps what the next frame sees; frames come one at a time in fixed-size vectors, and once the
// window is full nothing is allocated. What comes out is what the whole stream at once would give.

#include <algorithm>
#include <array>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <diffattn/diffattn.hpp>
#include <diffattn/hugging_face/diffllama.hpp>
#include <exception>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

using namespace diffattn;

namespace {

using Clock = std::chrono::steady_clock;

/// Microseconds a frame, in the middle of the stream and at the worst.
class FrameTimes {
 public:
  explicit FrameTimes(std::size_t frames) { times_.reserve(frames); }
  void add(Clock::time_point start) {
    times_.push_back(std::chrono::duration<double, std::micro>(Clock::now() - start).count());
  }
  double median() {
    std::nth_element(times_.begin(), times_.begin() + static_cast<std::ptrdiff_t>(times_.size() / 2), times_.end());
    return times_[times_.size() / 2];
  }
  double longest() const { return *std::max_element(times_.begin(), times_.end()); }

 private:
  std::vector<double> times_;
};

/// Two tones that drift, and noise: frames of features as an encoder of sound or of a sensor makes them.
template <Index kWidth>
Matrix<float> make_frames(Index count) {
  Matrix<float> frames(count, kWidth);
  std::uint32_t noise = 1;
  for (Index t = 0; t < count; ++t) {
    for (Index c = 0; c < kWidth; ++c) {
      noise = noise * 1664525u + 1013904223u;
      const double phase = 0.02 * static_cast<double>(t) * static_cast<double>(c + 1);
      frames(t, c) = static_cast<float>(std::sin(phase) + 0.3 * (static_cast<double>(noise >> 8) / (1 << 23) - 1));
    }
  }
  return frames;
}

/// A layer on frames, keys and values in 16 bits. Returns whether memory stayed what it was and results are right.
bool stream_layer() {
  constexpr Index kWidth = 64, kWindow = 200, kFrames = 4000;
  using Frame = Eigen::Matrix<float, 1, kWidth>;
  const MultiheadDiffAttention<float> layer(
      {.embed_dim = kWidth, .num_heads = 4, .num_kv_heads = 2, .rotary = RotaryConfig{}});
  const Matrix<float> frames = make_frames<kWidth>(kFrames);

  KvCache<Eigen::bfloat16> cache({.window = kWindow, .page_size = 64});
  Workspace workspace;  // scratch for every call
  Matrix<float> results(kFrames, kWidth);
  FrameTimes times(kFrames);
  std::size_t full = 0;
  bool bounded = true;
  std::printf("A layer of %ld columns, window of %ld frames in pages of %ld, keys and values in 16 bits\n\n", kWidth,
              kWindow, cache.options().page_size);
  std::printf("%10s%14s\n", "frames", "cache, KB");
  for (Index t = 0; t < kFrames; ++t) {
    const Frame frame = frames.row(t);
    Frame result;
    const auto start = Clock::now();
    layer.forward_into(result, frame, cache, workspace);
    times.add(start);
    results.row(t) = result;
    if (t + 1 == kWindow) full = cache.memory_bytes();
    if (t + 1 >= kWindow) bounded = bounded && cache.memory_bytes() == full;
    if (t + 1 == 1 || t + 1 == kWindow || t + 1 == 10 * kWindow || t + 1 == kFrames) {
      std::printf("%10ld%14.1f\n", t + 1, static_cast<double>(cache.memory_bytes()) / 1024);
    }
  }
  const Matrix<float> whole = layer.forward(frames, SlidingWindowMask{kWindow});
  const float error = (results - whole).cwiseAbs().maxCoeff() / whole.cwiseAbs().maxCoeff();
  std::printf("\n%.1f us a frame, %.1f us the longest; off by %.1e of the whole stream at once, in 32 bits\n\n",
              times.median(), times.longest(), static_cast<double>(error));
  return bounded && error < 2e-2f;
}

/// A model of text on a text that is longer than it was trained for: it reads on through a window.
bool stream_model(const std::string& directory, const std::string& text_path) {
  const auto model = DiffLlama<float>::load(directory);
  constexpr Index kWindow = 128, kBytes = 1500, kVocabulary = 256;
  std::ifstream file(text_path, std::ios::binary);
  std::vector<Index> text;
  for (auto byte = std::istreambuf_iterator<char>(file); text.size() < kBytes && byte != decltype(byte)(); ++byte) {
    text.push_back(static_cast<unsigned char>(*byte));
  }
  if (text.size() < kBytes || model.config().vocab_size != kVocabulary) return false;

  // The decoder itself: a DiffLlama takes no more tokens than it has positions, which a window has no need of.
  const auto& decoder = model.decoder();
  auto cache = decoder.make_cache({.window = kWindow, .page_size = 32});
  Workspace workspace;
  Serial executor;
  Eigen::Matrix<float, 1, kVocabulary> logits;
  Matrix<float> all(kBytes, kVocabulary);
  FrameTimes times(text.size());
  std::size_t full = 0;
  bool bounded = true;
  double loss = 0;
  std::printf("%ld bytes of text through a model that sees the last %ld\n\n%10s%14s%24s\n", kBytes, kWindow, "bytes",
              "cache, KB", "nats a byte so far");
  for (std::size_t i = 0; i < text.size(); ++i) {
    const std::array<Index, 1> token = {text[i]};
    const auto start = Clock::now();
    decoder.logits_into(logits, token, cache, workspace, executor);
    times.add(start);
    all.row(static_cast<Index>(i)) = logits;
    const Index fed = cache.position();
    if (fed == kWindow) full = cache.memory_bytes();
    if (fed >= kWindow) bounded = bounded && cache.memory_bytes() == full;
    if (i + 1 < text.size()) {
      const double largest = logits.maxCoeff();
      const double sum = (logits.cast<double>().array() - largest).exp().sum();
      loss += largest + std::log(sum) - logits(text[i + 1]);
    }
    if (fed == kWindow || fed % 500 == 0) {
      std::printf("%10ld%14.1f%24.3f\n", fed, static_cast<double>(cache.memory_bytes()) / 1024,
                  loss / static_cast<double>(fed));
    }
  }
  const Matrix<float> whole = decoder.logits(text, SlidingWindowMask{kWindow});
  const float error = (all - whole).cwiseAbs().maxCoeff() / whole.cwiseAbs().maxCoeff();
  std::printf("\n%.0f us a byte, %.0f us the longest; off by %.1e of the whole text at once\n", times.median(),
              times.longest(), static_cast<double>(error));
  return bounded && error < 1e-4f && loss < 2 * kBytes;
}

}  // namespace

int main() try {
  const std::string data = DIFFATTN_EXAMPLE_DATA;
  const bool layer_is_right = stream_layer();
  return layer_is_right && stream_model(data + "/diffllama-bytes", data + "/kjv.txt") ? EXIT_SUCCESS : EXIT_FAILURE;
} catch (const std::exception& error) {
  std::printf("%s\n", error.what());
  return EXIT_FAILURE;
}
