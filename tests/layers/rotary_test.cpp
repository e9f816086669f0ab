#include <diffattn/layers/rotary.hpp>

#include "layers/layer_checks.hpp"
#include "support/scalars.hpp"

namespace {

using diffattn::Index;
using diffattn::Matrix;
using diffattn::Rotary;
using diffattn::RotaryConfig;
using diffattn::RotaryPairing;
using diffattn::RotaryScaling;
using Kind = diffattn::RotaryScaling::Kind;

template <typename S>
Matrix<S> rotated(const RotaryConfig& config, Matrix<S> x, Index head_dim, Index first_position = 0) {
  const Rotary<S> rotary(config, head_dim);
  rotary.apply(diffattn::detail::writable_view_of(x), x.cols() / head_dim, first_position);
  return x;
}

/// By how much each pair turns from one position to the next: (1, 0) turns to (cos, sin), times the attention factor.
std::vector<double> frequencies(const RotaryScaling& scaling, Index head_dim, double base, Index sequence = 2,
                                double attention_factor = 1) {
  const Rotary<double> rotary({.base = base, .scaling = scaling}, head_dim);
  Matrix<double> x = Matrix<double>::Zero(2, head_dim);
  for (Index i = 0; i < head_dim; i += 2) x(1, i) = 1;
  rotary.apply(diffattn::detail::writable_view_of(x), 1, 0, sequence);
  std::vector<double> result;
  for (Index i = 0; i < head_dim; i += 2) {
    result.push_back(std::atan2(x(1, i + 1), x(1, i)));
    CHECK(std::abs(x.block(1, i, 1, 2).norm() - attention_factor) < 1e-12);
  }
  return result;
}

}  // namespace

TEST_CASE("Scaled rotary frequencies are those of Hugging Face", "[layers][rotary]") {
  const Index head_dim = GENERATE(4, 8, 64);
  const double base = GENERATE(10000.0, 500000.0);
  const auto plain = frequencies({}, head_dim, base);
  for (std::size_t i = 0; i < plain.size(); ++i) {
    const double expected = std::pow(base, -2.0 * static_cast<double>(i) / static_cast<double>(head_dim));
    CHECK(std::abs(plain[i] / expected - 1) < 1e-12);
  }

  const auto linear = frequencies({.kind = Kind::linear, .factor = 4}, head_dim, base);
  for (std::size_t i = 0; i < plain.size(); ++i) CHECK(std::abs(linear[i] / (plain[i] / 4) - 1) < 1e-12);

  const RotaryScaling dynamic{.kind = Kind::dynamic, .factor = 2, .context = 100};
  CHECK(frequencies(dynamic, head_dim, base, 100) == plain);
  const double longer =
      base * std::pow(2.0 * 250 / 100 - 1, static_cast<double>(head_dim) / static_cast<double>(head_dim - 2));
  const auto expected = frequencies({}, head_dim, longer), extended = frequencies(dynamic, head_dim, base, 250);
  for (std::size_t i = 0; i < plain.size(); ++i) CHECK(std::abs(extended[i] / expected[i] - 1) < 1e-12);

  // Llama 3.2: its three bands, by the wavelength.
  const RotaryScaling llama3{
      .kind = Kind::llama3, .factor = 32, .context = 8192, .low_freq_factor = 1, .high_freq_factor = 4};
  const auto scaled = frequencies(llama3, head_dim, base);
  for (std::size_t i = 0; i < plain.size(); ++i) {
    const double wavelength = 2 * std::numbers::pi / plain[i];
    const double smooth = (8192 / wavelength - 1) / (4 - 1);
    const double expected_frequency = wavelength < 8192.0 / 4   ? plain[i]
                                      : wavelength > 8192.0 / 1 ? plain[i] / 32
                                                                : (1 - smooth) * plain[i] / 32 + smooth * plain[i];
    CHECK(std::abs(scaled[i] / expected_frequency - 1) < 1e-12);
  }
}

TEST_CASE("yarn, longrope and proportional frequencies are those that transformers 5.12 printed", "[layers][rotary]") {
  const auto check = [](const RotaryScaling& scaling, double base, Index sequence, double attention_factor,
                        const std::vector<double>& expected) {
    const auto head_dim = 2 * static_cast<Index>(expected.size());
    const auto actual = frequencies(scaling, head_dim, base, sequence, attention_factor);
    for (std::size_t i = 0; i < expected.size(); ++i) {
      INFO("pair " << i << " of " << expected.size());
      CHECK(std::abs(actual[i] - expected[i]) <= 2e-6 * expected[i]);
    }
  };
  RotaryScaling yarn{.kind = Kind::yarn, .factor = 4, .context = 64};
  const std::vector<double> tail = {0.007905695, 0.0025, 0.0007905695, 0.00025, 7.905695e-05};
  std::vector<double> whole = {1, 0.2371708, 0.05}, fractions = {1, 0.1985835, 0.02559525};
  whole.insert(whole.end(), tail.begin(), tail.end());
  fractions.insert(fractions.end(), tail.begin(), tail.end());
  check(yarn, 10000, 2, 1.138629436111989, whole);
  check(yarn, 10000, 2000, 1.138629436111989, whole);  // whatever the length
  yarn.truncate = false;
  check(yarn, 10000, 2, 1.138629436111989, fractions);
  check({.kind = Kind::yarn, .factor = 4, .context = 5}, 10000, 2, 1.138629436111989, {1, 0.0025});  // both pairs are 0
  check({.kind = Kind::yarn, .factor = 4, .context = 1024, .beta_fast = 4, .beta_slow = 2, .attention_factor = 1.5},
        500000, 2, 1.5,
        {1, 0.1939228, 0.03760603, 0.001823166, 0.0003535534, 6.856205e-05, 1.329574e-05, 2.578346e-06});

  RotaryScaling longrope{.kind = Kind::longrope,
                         .factor = 4,
                         .context = 64,
                         .short_factors = {1, 1.5, 2, 3},
                         .long_factors = {2, 3, 5, 8}};
  check(longrope, 10000, 64, 1.1547005383792517, {1, 0.06666667, 0.005, 0.0003333333});
  check(longrope, 10000, 65, 1.1547005383792517, {0.5, 0.03333334, 0.002, 0.000125});
  longrope.factor = 2;
  check(longrope, 10000, 64, 1.0801234497346435, {1, 0.06666667, 0.005, 0.0003333333});

  check({.kind = Kind::proportional, .factor = 2, .proportion = 0.3}, 10000, 2, 1, {0.5, 0.1581139, 0, 0, 0, 0, 0, 0});
}

TEST_CASE("A position is the same from the table and beyond it, whatever the scaling", "[layers][rotary]") {
  auto rng = make_rng();
  const RotaryScaling scaling = GENERATE(RotaryScaling{.kind = Kind::yarn, .factor = 4, .context = 16},
                                         RotaryScaling{.kind = Kind::longrope,
                                                       .factor = 2,
                                                       .context = 64,
                                                       .short_factors = {1, 2, 3, 4},
                                                       .long_factors = {5, 6, 7, 8}},
                                         RotaryScaling{.kind = Kind::longrope,
                                                       .factor = 2,
                                                       .context = 16,
                                                       .short_factors = {1, 2, 3, 4},
                                                       .long_factors = {5, 6, 7, 8}},
                                         RotaryScaling{.kind = Kind::proportional, .factor = 2, .proportion = 0.5});
  const Matrix<float> x = random_matrix<float>(40, 16, rng);
  const Matrix<float> tabulated = rotated<float>({.scaling = scaling}, x, 8, 3);
  CHECK(identical(rotated<float>({.table_positions = 0, .scaling = scaling}, x, 8, 3), tabulated));
  CHECK(identical(rotated<float>({.table_positions = 20, .scaling = scaling}, x, 8, 3), tabulated));
}

TEST_CASE("Turning back is the transpose of turning, the attention factor included", "[layers][rotary]") {
  auto rng = make_rng();
  const Rotary<double> rotary({.scaling = {.kind = Kind::yarn, .factor = 4, .context = 16}}, 8);
  Matrix<double> x = random_matrix<double>(6, 8, rng), y = random_matrix<double>(6, 8, rng), turned = x, back = y;
  rotary.apply(diffattn::detail::writable_view_of(turned), 1, 7);
  rotary.apply(diffattn::detail::writable_view_of(back), 1, 7, 0, diffattn::Turn::back);
  CHECK(std::abs(turned.cwiseProduct(y).sum() - x.cwiseProduct(back).sum()) < 1e-12);
}

TEST_CASE("Dynamic scaling follows the last position when nobody says how long the sequence is", "[layers][rotary]") {
  auto rng = make_rng();
  const Rotary<float> rotary({.scaling = {.kind = Kind::dynamic, .factor = 2, .context = 10}}, 8);
  const Matrix<float> x = random_matrix<float>(15, 8, rng);
  Matrix<float> whole = x, told = x.topRows(5), untold = x.topRows(5);
  rotary.apply(diffattn::detail::writable_view_of(whole), 1);
  rotary.apply(diffattn::detail::writable_view_of(told), 1, 0, 15);
  rotary.apply(diffattn::detail::writable_view_of(untold), 1);
  CHECK(identical(told, whole.topRows(5)));
  CHECK_FALSE(identical(untold, whole.topRows(5)));
}

TEST_CASE("A scaling that cannot be is refused by name", "[layers][rotary]") {
  const auto message = [](const RotaryScaling& scaling, Index head_dim = 8) {
    return thrown_by<std::invalid_argument>([&] { Rotary<float>({.scaling = scaling}, head_dim); });
  };
  CHECK(message({.kind = Kind::linear, .factor = 0}) == "Rotary: scaling.factor must be positive, got 0.000000");
  CHECK(message({.kind = Kind::linear, .factor = std::numeric_limits<double>::infinity()}) ==
        "Rotary: scaling.factor must be positive, got inf");
  CHECK(message({.kind = Kind::dynamic, .factor = 2}) == "Rotary: scaling.context must be at least 1, got 0.000000");
  CHECK(message({.kind = Kind::dynamic, .factor = 2, .context = 8}, 2) ==
        "Rotary: dynamic scaling needs a dim of at least 4, got 2");
  CHECK(message({.kind = Kind::llama3, .factor = 2, .context = 8, .low_freq_factor = 0}) ==
        "Rotary: scaling.low_freq_factor must be positive, got 0.000000");
  CHECK(message({.kind = Kind::llama3, .factor = 2, .context = 8, .high_freq_factor = -4}) ==
        "Rotary: scaling.high_freq_factor must be positive, got -4.000000");
  CHECK(message({.kind = Kind::yarn, .factor = 2}) == "Rotary: scaling.context must be at least 1, got 0.000000");
  CHECK(message({.kind = Kind::yarn, .factor = 2, .context = 8, .beta_fast = 0}) ==
        "Rotary: scaling.beta_fast must be positive, got 0.000000");
  CHECK(message({.kind = Kind::yarn, .factor = 2, .context = 8, .beta_slow = -1}) ==
        "Rotary: scaling.beta_slow must be positive, got -1.000000");
  CHECK(message({.kind = Kind::yarn, .factor = 2, .context = 8, .attention_factor = std::nan("")})
            .starts_with("Rotary: scaling.attention_factor must be a number, got "));
  CHECK(thrown_by<std::invalid_argument>([] {
          Rotary<float>({.base = 1, .scaling = {.kind = Kind::yarn, .factor = 2, .context = 8}}, 8);
        }) == "Rotary: yarn scaling needs a base other than 1");
  const std::vector<double> four = {1, 2, 3, 4}, three = {1, 2, 3}, zero = {1, 2, 3, 0};
  const auto longrope = [&](const std::vector<double>& factors, const std::vector<double>& long_factors) {
    return message(
        {.kind = Kind::longrope, .factor = 2, .context = 8, .short_factors = factors, .long_factors = long_factors});
  };
  CHECK(longrope(three, four) == "Rotary: scaling.short_factors must be one a pair, 4, got 3");
  CHECK(longrope(four, three) == "Rotary: scaling.long_factors must be one a pair, 4, got 3");
  CHECK(longrope(four, zero) == "Rotary: scaling.long_factors must be positive, got 0.000000");
  CHECK(message({.kind = Kind::longrope, .factor = 2, .context = 1, .short_factors = four, .long_factors = four}) ==
        "Rotary: scaling.attention_factor must be a number, got inf");
  CHECK(message({.kind = Kind::proportional, .proportion = 1.5}) ==
        "Rotary: scaling.proportion must be from 0 to 1, got 1.500000");
}

TEMPLATE_TEST_CASE("Rotary turns each pair as a complex number", "[layers][rotary]", DIFFATTN_TEST_SCALARS) {
  using S = TestType;
  auto rng = make_rng();
  RotaryConfig config;
  config.pairing = GENERATE(RotaryPairing::interleaved, RotaryPairing::half);
  config.base = GENERATE(10000.0, 640000.0, 3.0);
  config.table_positions = GENERATE(Index(0), Index(10), Index(4096));
  for (const auto& [head_dim, dim] :
       {std::pair<Index, Index>{2, 0}, {8, 0}, {8, 2}, {8, 6}, {7, 4}, {64, 0}, {64, 32}}) {
    for (const Index first : {Index(0), Index(5), Index(1'000'000)}) {
      config.dim = dim;
      INFO("head_dim " << head_dim << ", dim " << dim << ", first " << first << ", base " << config.base
                       << ", interleaved " << (config.pairing == RotaryPairing::interleaved));
      const Matrix<S> x = random_matrix<S>(14, 3 * head_dim, rng);
      const Matrix<S> y = rotated(config, x, head_dim, first);

      Matrix<long double> exact = x.template cast<long double>();
      oracle::rotate(exact, head_dim, config, first);
      // Angles are computed in double: far out, their rounding is what is left.
      const double tolerance = 2.0 * std::numeric_limits<S>::epsilon() + 2e-16 * static_cast<double>(first + 14);
      CHECK((y.template cast<long double>() - exact).cwiseAbs().maxCoeff() <= tolerance * x.cwiseAbs().maxCoeff());
    }
  }
}

TEST_CASE("Rotary leaves position 0 and the columns past dim as they are", "[layers][rotary]") {
  auto rng = make_rng();
  const RotaryPairing pairing = GENERATE(RotaryPairing::interleaved, RotaryPairing::half);
  const Matrix<float> x = random_matrix<float>(4, 24, rng);
  const Matrix<float> y = rotated<float>({.pairing = pairing, .dim = 6}, x, 12);
  CHECK(identical(y.row(0), x.row(0)));
  for (const Index head : {0, 12}) {
    CHECK(identical(y.middleCols(head + 6, 6), x.middleCols(head + 6, 6)));
    CHECK_FALSE(identical(y.block(1, head, 3, 6), x.block(1, head, 3, 6)));
  }
}

TEST_CASE("A turned query and key meet at an angle that depends on their distance only", "[layers][rotary]") {
  auto rng = make_rng();
  const RotaryPairing pairing = GENERATE(RotaryPairing::interleaved, RotaryPairing::half);
  const RotaryConfig config{.pairing = pairing};
  const Matrix<double> q = random_matrix<double>(1, 16, rng), k = random_matrix<double>(1, 16, rng);
  const auto product = [&](Index query, Index key) {
    return rotated(config, q, 16, query).row(0).dot(rotated(config, k, 16, key).row(0));
  };
  CHECK(std::abs(product(9, 2) - product(107, 100)) < 1e-12);
  CHECK(std::abs(product(9, 2) - product(9, 3)) > 1e-6);
}

TEST_CASE("A position is the same from the table, beyond it, or one row at a time", "[layers][rotary]") {
  auto rng = make_rng();
  const Matrix<float> x = random_matrix<float>(40, 32, rng);
  const Matrix<float> whole = rotated<float>({}, x, 16, 3);
  CHECK(identical(rotated<float>({.table_positions = 0}, x, 16, 3), whole));
  CHECK(identical(rotated<float>({.table_positions = 20}, x, 16, 3), whole));
  for (Index i = 0; i < x.rows(); ++i) {
    CHECK(identical(rotated<float>({}, x.row(i), 16, 3 + i), whole.row(i)));
  }
}

TEST_CASE("Rotary refuses a width that cannot be paired, and a base that is not positive", "[layers][rotary]") {
  const auto message = [](RotaryConfig config, Index head_dim) {
    return thrown_by<std::invalid_argument>([&] { Rotary<float>(config, head_dim); });
  };
  CHECK(message({}, 7) == "Rotary: dim must be even and between 2 and the head_dim 7, got 7");
  CHECK(message({.dim = 3}, 8) == "Rotary: dim must be even and between 2 and the head_dim 8, got 3");
  CHECK(message({.dim = 10}, 8) == "Rotary: dim must be even and between 2 and the head_dim 8, got 10");
  CHECK(message({.dim = -2}, 8) == "Rotary: dim must be even and between 2 and the head_dim 8, got -2");
  CHECK(message({.base = 0}, 8) == "Rotary: base must be positive, got 0.000000");
  CHECK(message({.base = -1}, 8) == "Rotary: base must be positive, got -1.000000");
  CHECK(message({.base = std::nan("")}, 8) == "Rotary: base must be positive, got nan");
}
