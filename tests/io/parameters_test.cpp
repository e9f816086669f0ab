// load_parameters and save_parameters, for every layer.

#include <diffattn/io/parameters.hpp>
#include <diffattn/layers/multihead_attention.hpp>
#include <diffattn/layers/multihead_diff_attention.hpp>
#include <diffattn/layers/multihead_diff_attention_v2.hpp>

#include <cstring>
#include <filesystem>
#include <map>
#include <set>
#include <string>
#include <vector>

#include "io/files.hpp"
#include "support/catch.hpp"
#include "support/failing_allocations.hpp"
#include "support/random.hpp"
#include "support/throws.hpp"

namespace {

using diffattn::FormatError;
using diffattn::Index;
using diffattn::Matrix;
using diffattn::MultiheadAttention;
using diffattn::MultiheadDiffAttention;
using diffattn::MultiheadDiffAttentionV2;
using diffattn::Safetensors;
using diffattn::SafetensorsWriter;
using files::Scratch;
using support::thrown_by;

template <template <typename...> class Layer>
struct Of {
  template <typename Scalar>
  static Layer<Scalar> make(bool bias = true) {
    return Layer<Scalar>({.embed_dim = 16, .num_heads = 2, .num_kv_heads = 1, .bias = bias});
  }
};
using Baseline = Of<MultiheadAttention>;
using Differential = Of<MultiheadDiffAttention>;
using SecondVersion = Of<MultiheadDiffAttentionV2>;

/// N(0, 1) everywhere: two layers made alike have no parameter in common.
template <typename Layer>
void randomize(Layer& layer, support::Rng& rng) {
  diffattn::visit_parameters(layer, [&](std::string_view, auto& parameter) {
    using Scalar = typename std::remove_reference_t<decltype(parameter)>::Scalar;
    parameter = support::random_matrix<Scalar>(parameter.rows(), parameter.cols(), rng);
  });
}

/// Every parameter's name, shape and bytes.
template <typename Layer>
std::map<std::string, std::string> snapshot(const Layer& layer) {
  std::map<std::string, std::string> parameters;
  diffattn::visit_parameters(layer, [&](std::string_view name, const auto& parameter) {
    std::string bytes(static_cast<std::size_t>(parameter.size()) * sizeof(*parameter.data()), '\0');
    std::memcpy(bytes.data(), parameter.data(), bytes.size());
    parameters[std::string(name)] = std::to_string(parameter.cols()).append(":").append(bytes);
  });
  return parameters;
}

/// The parameters of a layer as a user of the writer would add them, but for those named in `except`.
template <typename Layer>
void add_parameters(SafetensorsWriter& writer, const Layer& layer, const std::string& prefix,
                    const std::set<std::string>& except = {}) {
  diffattn::visit_parameters(layer, [&](std::string_view name, const auto& parameter) {
    if (except.count(std::string(name)) == 0) writer.add(prefix + std::string(name), parameter);
  });
}

/// What load_parameters says of a file, after the words that begin every such message. The layer must stay as it was.
template <typename Layer>
std::string refusal(Layer& layer, const std::filesystem::path& path, const std::string& prefix = "") {
  const auto before = snapshot(layer);
  const Safetensors file(path);
  const std::string message = thrown_by<FormatError>([&] { load_parameters(layer, file, prefix); });
  CHECK(snapshot(layer) == before);
  const std::string opening = path.string() + ": does not hold the parameters of this layer";
  CHECK(message.substr(0, opening.size()) == opening);
  return message.substr(std::min(message.size(), opening.size()));
}

}  // namespace

TEMPLATE_TEST_CASE("A layer that is saved is loaded, bit for bit", "", Baseline, Differential, SecondVersion) {
  auto rng = support::make_rng();
  const Scratch folder;
  const auto check = [&](auto layer, auto other, const std::string& prefix) {
    randomize(layer, rng);
    randomize(other, rng);
    REQUIRE(snapshot(layer).size() == snapshot(other).size());
    for (const auto& [name, bytes] : snapshot(layer)) REQUIRE(snapshot(other).at(name) != bytes);
    save_parameters(layer, folder / "layer", prefix);
    CHECK(folder.list() == "layer");
    load_parameters(other, Safetensors(folder / "layer"), prefix);
    CHECK(snapshot(other) == snapshot(layer));
  };
  for (const std::string prefix : {"", "weight.", "model.layers.11.self_attn.", "größe\n"}) {
    CAPTURE(prefix);
    check(TestType::template make<float>(), TestType::template make<float>(), prefix);
    check(TestType::template make<double>(), TestType::template make<double>(), prefix);
    check(TestType::template make<float>(false), TestType::template make<float>(false), prefix);
  }
}

TEMPLATE_TEST_CASE("A layer is loaded from another scalar type", "", Baseline, Differential, SecondVersion) {
  auto rng = support::make_rng();
  const Scratch folder;
  auto in_double = TestType::template make<double>();
  auto in_float = TestType::template make<float>();
  randomize(in_double, rng);
  save_parameters(in_double, folder / "double");
  load_parameters(in_float, Safetensors(folder / "double"));
  std::map<std::string, Matrix<float>> expected;
  diffattn::visit_parameters(in_double, [&](std::string_view name, const auto& parameter) {
    expected[std::string(name)] = parameter.template cast<float>();
  });
  diffattn::visit_parameters(in_float, [&](std::string_view name, const auto& parameter) {
    INFO(name);
    CHECK(parameter == expected.at(std::string(name)));
  });

  save_parameters(in_float, folder / "float");
  load_parameters(in_double, Safetensors(folder / "float"));
  auto again = TestType::template make<float>();
  save_parameters(in_double, folder / "double");
  load_parameters(again, Safetensors(folder / "double"));
  CHECK(snapshot(again) == snapshot(in_float));
}

TEST_CASE("F16 and BF16 weights are loaded, as published models have them") {
  MultiheadAttention<float> layer({.embed_dim = 2, .num_heads = 1});
  const Matrix<float> weight{{1, -0.5F}, {0.25F, 3}};
  SafetensorsWriter writer;
  writer.add("q_proj.weight", weight.cast<Eigen::half>());
  writer.add("k_proj.weight", weight.cast<Eigen::bfloat16>());
  writer.add("v_proj.weight", weight.cast<double>());
  writer.add("out_proj.weight", weight);
  const Scratch folder;
  writer.save(folder / "layer");
  load_parameters(layer, Safetensors(folder / "layer"));
  CHECK(layer.q_proj.weight == weight);
  CHECK(layer.k_proj.weight == weight);
  CHECK(layer.v_proj.weight == weight);
  CHECK(layer.out_proj.weight == weight);
}

TEST_CASE("A saved layer has the official names, PyTorch's shapes and its own type") {
  const Scratch folder;
  const auto saved = [&](const auto& layer, const std::string& prefix) {
    save_parameters(layer, folder / "layer", prefix, {{"depth", "3"}});
    const Safetensors file(folder / "layer");
    CHECK(file.metadata() == std::map<std::string, std::string>{{"depth", "3"}});
    std::string text;
    for (const auto& [name, info] : file.tensors()) {
      text += name + (info.dtype == diffattn::Dtype::F32 ? " F32 " : " ? ") + diffattn::detail::shape_text(info.shape) +
              "\n";
    }
    return text;
  };
  CHECK(saved(MultiheadDiffAttention<float>({.embed_dim = 24, .num_heads = 3, .num_kv_heads = 1}), "a.") ==
        "a.k_proj.weight F32 [8, 24]\na.lambda_k1 F32 [4]\na.lambda_k2 F32 [4]\na.lambda_q1 F32 [4]\n"
        "a.lambda_q2 F32 [4]\na.out_proj.weight F32 [24, 24]\na.q_proj.weight F32 [24, 24]\na.subln.weight F32 [8]\n"
        "a.v_proj.weight F32 [8, 24]\n");
  CHECK(saved(MultiheadDiffAttention<float>({.embed_dim = 4, .num_heads = 1, .norm_weight = false}), "") ==
        "k_proj.weight F32 [4, 4]\nlambda_k1 F32 [2]\nlambda_k2 F32 [2]\nlambda_q1 F32 [2]\nlambda_q2 F32 [2]\n"
        "out_proj.weight F32 [4, 4]\nq_proj.weight F32 [4, 4]\nv_proj.weight F32 [4, 4]\n");
  CHECK(
      saved(MultiheadDiffAttentionV2<float>({.embed_dim = 8, .num_heads = 2, .num_kv_heads = 1, .head_dim = 3}), "") ==
      "k_proj.weight F32 [3, 8]\nlambda_proj.weight F32 [2, 8]\no_proj.weight F32 [8, 6]\n"
      "q_proj.weight F32 [12, 8]\nv_proj.weight F32 [3, 8]\n");
  CHECK(saved(MultiheadAttention<float>({.embed_dim = 4, .num_heads = 2, .num_kv_heads = 1, .bias = true}), "") ==
        "k_proj.bias F32 [2]\nk_proj.weight F32 [2, 4]\nout_proj.bias F32 [4]\nout_proj.weight F32 [4, 4]\n"
        "q_proj.bias F32 [4]\nq_proj.weight F32 [4, 4]\nv_proj.bias F32 [2]\nv_proj.weight F32 [2, 4]\n");
}

TEST_CASE("Layers side by side in a file are told apart by their prefixes") {
  auto rng = support::make_rng();
  auto first = Differential::make<float>(), second = first, loaded = first;
  randomize(first, rng);
  randomize(second, rng);
  SafetensorsWriter writer;
  add_parameters(writer, first, "layers.1.");
  add_parameters(writer, second, "layers.10.");
  writer.add("embedding", Matrix<float>{{1}});
  const Scratch folder;
  writer.save(folder / "model");

  const Safetensors file(folder / "model");
  load_parameters(loaded, file, "layers.1.");
  CHECK(snapshot(loaded) == snapshot(first));
  load_parameters(loaded, file, "layers.10.");
  CHECK(snapshot(loaded) == snapshot(second));

  const std::string message = refusal(loaded, folder / "model", "layers.1");  // as it is: no dot is put in
  CHECK(message.find("missing: \"layers.1q_proj.weight\"") != std::string::npos);
  CHECK(message.find("surplus: \"layers.10.q_proj.weight\"") != std::string::npos);
  CHECK(message.find("embedding") == std::string::npos);
}

TEST_CASE("A prefix that was forgotten is named") {
  auto layer = Differential::make<float>(false);
  SafetensorsWriter writer;
  add_parameters(writer, layer, "weight.");
  writer.add("grad.q_proj.weight", Matrix<float>{{1}});
  const Scratch folder;
  writer.save(folder / "one");
  const std::string hint =
      ", but all of them with \"weight.\" before their names: load_parameters(layer, file, \"weight.\")\n  missing: "
      "\"q_proj.weight\"\n";
  CHECK(refusal(layer, folder / "one").substr(0, hint.size()) == hint);
  CHECK(refusal(layer, folder / "one", "weight").find("with \"weight.\" before") != std::string::npos);
  CHECK(refusal(layer, folder / "one", "grad.").find(" before their names") == std::string::npos);  // one is there

  add_parameters(writer, layer, "other.");
  writer.save(folder / "two");
  CHECK(
      refusal(layer, folder / "two")
          .find("with \"other.\" before their names, as with 1 other prefixes: load_parameters(layer, file, \"other") !=
      std::string::npos);

  // A part of the layer is not it.
  SafetensorsWriter part;
  add_parameters(part, layer, "weight.", {"lambda_q1"});
  part.save(folder / "part");
  CHECK(refusal(layer, folder / "part").substr(0, 12) == "\n  missing: ");
}

TEST_CASE("Every missing, surplus and mis-shaped tensor is in one error") {
  auto layer = Differential::make<float>(false);
  SafetensorsWriter writer;
  add_parameters(writer, layer, "a.",
                 {"q_proj.weight", "k_proj.weight", "v_proj.weight", "lambda_q1", "lambda_k2", "subln.weight"});
  writer.add("a.k_proj.weight", Matrix<float>(Matrix<float>::Ones(16, 8)));              // transposed
  writer.add("a.lambda_q1", Matrix<float>(Matrix<float>::Ones(1, 4)));                   // a rank too many
  writer.add("a.lambda_k2", diffattn::Vector<float>(diffattn::Vector<float>::Ones(5)));  // too long
  writer.add("a.subln.weight", Eigen::Vector<std::int32_t, 8>(Eigen::Vector<std::int32_t, 8>::Ones()));
  writer.add("a.q_proj.bias", Matrix<float>{{1}});
  writer.add("a.\n", Matrix<float>{{1}});
  writer.add("b.x", Matrix<float>{{1}});
  const Scratch folder;
  writer.save(folder / "layer");
  CHECK(refusal(layer, folder / "layer", "a.") == R"(
  missing: "a.q_proj.weight"
  shape: "a.k_proj.weight" must be [8, 16], got [16, 8]
  missing: "a.v_proj.weight"
  shape: "a.lambda_q1" must be [4], got [1, 4]
  shape: "a.lambda_k2" must be [4], got [5]
  type: "a.subln.weight" must hold floating-point values, got I32
  surplus: "a.\n"
  surplus: "a.q_proj.bias")");
}

TEMPLATE_TEST_CASE("One tensor at fault is enough, whichever it is", "", Baseline, Differential, SecondVersion) {
  auto layer = TestType::template make<float>();
  const Scratch folder;
  diffattn::visit_parameters(layer, [&](std::string_view visited, const auto& parameter) {
    const std::string name(visited);
    const auto said = [&](const auto& add) {
      SafetensorsWriter writer;
      add_parameters(writer, TestType::template make<float>(), "", {name});
      add(writer);
      writer.save(folder / "layer");
      return refusal(layer, folder / "layer");
    };
    const auto zeros = Matrix<float>(Matrix<float>::Zero(parameter.rows(), parameter.cols()));
    const std::vector<Index> shape = diffattn::detail::stored_shape(parameter);
    std::vector<Index> flat{parameter.size(), 1};
    const std::string in_quotes = "\"" + name + "\"";
    CHECK(said([](auto&) {}) == "\n  missing: " + in_quotes);
    CHECK(said([&](auto& writer) { writer.add(name, zeros, flat); }) ==
          "\n  shape: " + in_quotes + " must be " + diffattn::detail::shape_text(shape) + ", got " +
              diffattn::detail::shape_text(flat));
    CHECK(said([&](auto& writer) { writer.add(name, zeros.template cast<std::int64_t>().eval(), shape); }) ==
          "\n  type: " + in_quotes + " must hold floating-point values, got I64");
    CHECK(said([&](auto& writer) {
            writer.add(name, zeros, shape);
            writer.add(name + "x", zeros);
          }) == "\n  surplus: \"" + name + "x\"");
  });
}

TEST_CASE("A file of another configuration or another layer does not fit") {
  const Scratch folder;
  auto plain = Differential::make<float>(false), biased = Differential::make<float>(true);
  save_parameters(biased, folder / "biased");
  save_parameters(plain, folder / "plain");
  CHECK(refusal(plain, folder / "biased") == R"(
  surplus: "k_proj.bias"
  surplus: "out_proj.bias"
  surplus: "q_proj.bias"
  surplus: "v_proj.bias")");
  CHECK(refusal(biased, folder / "plain") == R"(
  missing: "q_proj.bias"
  missing: "k_proj.bias"
  missing: "v_proj.bias"
  missing: "out_proj.bias")");
  auto baseline = Baseline::make<float>(false);
  CHECK(refusal(baseline, folder / "plain").find("surplus: \"lambda_q1\"") != std::string::npos);
}

TEMPLATE_TEST_CASE("A layer that cannot be saved leaves the old file whole", "", Baseline, Differential,
                   SecondVersion) {
  const auto failures = GENERATE(support::Failures::one, support::Failures::all_later);
  auto rng = support::make_rng();
  auto old = TestType::template make<float>(), layer = old, loaded = old;
  randomize(old, rng);
  randomize(layer, rng);
  const Scratch folder;
  save_parameters(old, folder / "layer");
  support::for_every_failing_allocation([&] { save_parameters(layer, folder / "layer"); },
                                        [&](bool threw) {
                                          if (threw) {
                                            load_parameters(loaded, Safetensors(folder / "layer"));
                                            CHECK(snapshot(loaded) == snapshot(old));
                                          } else {  // it did without
                                            save_parameters(old, folder / "layer");
                                          }
                                          CHECK(folder.list() == "layer");
                                        },
                                        failures);

  save_parameters(old, folder / "layer");
  CHECK(thrown_by<std::runtime_error>([&] { save_parameters(layer, folder / "nowhere/layer"); }) ==
        (folder / "nowhere/layer").string() + ": cannot be written: No such file or directory");
  CHECK(folder.list() == "layer");
}

TEMPLATE_TEST_CASE("A layer that cannot be loaded for lack of memory is as it was", "", Baseline, Differential,
                   SecondVersion) {
  const auto failures = GENERATE(support::Failures::one, support::Failures::all_later);
  auto rng = support::make_rng();
  auto stored = TestType::template make<double>();
  auto layer = TestType::template make<float>();  // values are converted
  randomize(stored, rng);
  randomize(layer, rng);
  const auto before = layer;
  auto after = layer;
  const Scratch folder;
  save_parameters(stored, folder / "layer", "a.");
  load_parameters(after, Safetensors(folder / "layer"), "a.");
  const std::size_t failed =
      support::for_every_failing_allocation([&] { load_parameters(layer, Safetensors(folder / "layer"), "a."); },
                                            [&](bool threw) {
                                              CHECK(snapshot(layer) == snapshot(threw ? before : after));
                                              layer = before;
                                            },
                                            failures);
  CHECK(failed >= (support::fails_allocations() ? 50U : 0U));
}
