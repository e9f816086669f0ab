// A whole directory: config.json, weights in one file or two with their index, generation_config.json. The input says
// what to write: first a checkpoint that is sound, whatever the bytes are, then edits of its files. Without edits it
// must load and run; with them it is refused with an exception that says why, or runs.

#include <diffattn/hugging_face/diffllama.hpp>

#include <cstdint>
#include <cstdlib>
#include <string>
#include <utility>
#include <vector>

#include "io/files.hpp"

namespace {

using diffattn::Index;

class Choices {
 public:
  Choices(const std::uint8_t* data, std::size_t size) : data_(data), size_(size) {}

  /// From 0 to count − 1; 0 when the input has ended.
  unsigned operator()(unsigned count) { return at_ < size_ ? data_[at_++] % count : 0; }
  bool ended() const { return at_ == size_; }

 private:
  const std::uint8_t* data_;
  std::size_t size_, at_ = 0;
};

struct Tensor {
  std::string name, dtype;
  std::vector<Index> shape;
  std::string bytes;
};

struct Directory {
  std::string config, generation, index;
  std::vector<std::string> headers, data;  // of the files with weights
};

std::string text(std::uint64_t number) { return std::to_string(number); }

template <typename T>
std::string random_values(Index count, unsigned seed) {
  std::string bytes;
  for (Index i = 0; i < count; ++i) {
    seed = seed * 1664525U + 1013904223U;
    bytes += files::bytes_of(static_cast<T>(static_cast<float>(seed >> 16) / 65536.0f - 0.5f));
  }
  return bytes;
}

Tensor tensor(Choices& choose, std::string name, std::vector<Index> shape) {
  Index count = 1;
  for (const Index extent : shape) count *= extent;
  const unsigned seed = choose(256);
  switch (choose(4)) {
    case 0:
      return {std::move(name), "F32", std::move(shape), random_values<float>(count, seed)};
    case 1:
      return {std::move(name), "F16", std::move(shape), random_values<Eigen::half>(count, seed)};
    case 2:
      return {std::move(name), "BF16", std::move(shape), random_values<Eigen::bfloat16>(count, seed)};
    default:
      return {std::move(name), "F64", std::move(shape), random_values<double>(count, seed)};
  }
}

std::string rope(Choices& choose, Index head_dim) {
  const std::string theta = choose(2) == 0 ? "" : ", \"rope_theta\": " + text(2 + choose(200));
  const std::string factor = ", \"factor\": " + text(1 + choose(9));
  const std::string original = choose(2) == 0 ? "" : ", \"original_max_position_embeddings\": " + text(2 + choose(9));
  const auto factors = [&] {
    std::string list;
    for (Index i = 0; i < head_dim / 2; ++i) list += (i == 0 ? "[" : ", ") + text(1 + choose(99)) + ".5";
    return list + "]";
  };
  const std::string type = choose(2) == 0 ? "{\"rope_type\": " : "{\"type\": ";
  switch (choose(7)) {
    case 0:
      return type + "\"default\"" + theta + "}";
    case 1:
      return type + "\"linear\"" + factor + theta + "}";
    case 2:
      return type + (head_dim > 2 ? "\"dynamic\"" : "\"linear\"") + factor + theta + "}";
    case 3:
      return type + "\"llama3\"" + factor + theta + original + ", \"low_freq_factor\": " + text(1 + choose(4)) +
             ", \"high_freq_factor\": " + text(1 + choose(9)) + "}";
    case 4:
      return type + "\"yarn\"" + factor + theta + original + (choose(2) == 0 ? "" : ", \"truncate\": false") +
             (choose(2) == 0 ? "" : ", \"mscale\": 0.5, \"mscale_all_dim\": 0.75") +
             ", \"beta_fast\": " + text(choose(40)) + "}";
    case 5:
      return type + "\"longrope\"" + theta + original + ", \"short_factor\": " + factors() +
             ", \"long_factor\": " + factors() + "}";
    default:
      return type + "\"proportional\"" + factor + theta + ", \"partial_rotary_factor\": 0." + text(choose(100)) + "}";
  }
}

/// A sound checkpoint.
Directory sound(Choices& choose) {
  const Index layers = 1 + choose(2), hidden = 1 + choose(8), vocab = 2 + choose(8), inner = 1 + choose(9);
  const Index head_dim = 2 * (1 + choose(3)), heads = choose(2) == 0 ? 2 : 4, kv_heads = heads >> choose(2);
  const bool bias = choose(2) == 1;
  const unsigned tie = choose(4), naming = choose(3), spelling = choose(3), files = 1 + choose(2);
  const std::string before[] = {"model.", "", "model.model."};

  std::vector<Tensor> tensors;
  const auto add = [&](const std::string& name, std::vector<Index> shape) {
    tensors.push_back(tensor(choose, name, std::move(shape)));
  };
  const std::string prefix = before[naming];
  add(tie == 2 ? "lm_head.weight" : prefix + "embed_tokens.weight", {vocab, hidden});
  if (tie == 3) tensors.push_back({"lm_head.weight", tensors[0].dtype, tensors[0].shape, tensors[0].bytes});
  if (tie == 0) add("lm_head.weight", {vocab, hidden});
  add(prefix + "norm.weight", {hidden});
  for (Index layer = 0; layer < layers; ++layer) {
    const std::string in = prefix + "layers." + std::to_string(layer) + ".", attention = in + "self_attn.";
    const auto project = [&](const char* name, Index rows, Index cols) {
      add(attention + name + ".weight", {rows, cols});
      if (bias) add(attention + name + ".bias", {rows});
    };
    add(in + "input_layernorm.weight", {hidden});
    add(in + "post_attention_layernorm.weight", {hidden});
    project("q_proj", heads * head_dim, hidden);
    project("k_proj", kv_heads * head_dim, hidden);
    project("v_proj", kv_heads * head_dim, hidden);
    project("o_proj", hidden, heads * head_dim);
    for (const char* const lambda : {"lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2"}) {
      add(attention + lambda, {head_dim});
    }
    add(in + "mlp.gate_proj.weight", {inner, hidden});
    add(in + "mlp.up_proj.weight", {inner, hidden});
    add(in + "mlp.down_proj.weight", {hidden, inner});
  }
  if (choose(2) == 1) tensors.push_back({"model.mask", "BOOL", {3}, std::string(3, '\1')});
  if (choose(2) == 1) add("model.rotary_emb.inv_freq", {head_dim / 2});

  Directory result;
  result.headers.resize(files, "{");
  result.data.resize(files);
  for (const Tensor& t : tensors) {
    const std::size_t file = choose(2) % files;
    std::string& header = result.headers[file];
    const std::size_t begin = result.data[file].size();
    result.data[file] += t.bytes;
    header += (header.size() == 1 ? "\"" : ",\"") + t.name + "\":{\"dtype\":\"" + t.dtype +
              "\",\"shape\":" + diffattn::detail::shape_text(t.shape) + ",\"data_offsets\":[" + text(begin) + "," +
              text(result.data[file].size()) + "]}";
    if (files == 2) {
      result.index += (result.index.empty() ? "{\"weight_map\": {\"" : ", \"") + t.name + "\": \"" + text(file) + "\"";
    }
  }
  for (std::string& header : result.headers) header += "}";
  if (files == 2) result.index += "}}";

  const char* const key = spelling == 1 ? "rope_parameters" : "rope_scaling";
  result.config =
      "{\"model_type\": \"diffllama\", \"vocab_size\": " + text(static_cast<std::uint64_t>(vocab)) +
      ", \"hidden_size\": " + std::to_string(hidden) + ", \"intermediate_size\": " + std::to_string(inner) +
      ", \"num_hidden_layers\": " + std::to_string(layers) + ", \"num_attention_heads\": " + std::to_string(heads) +
      ", \"num_key_value_heads\": " + std::to_string(kv_heads) + ", \"head_dim\": " + std::to_string(head_dim) +
      ", \"max_position_embeddings\": " + text(8 + choose(20)) + ", \"attention_bias\": " + (bias ? "true" : "false") +
      ", \"tie_word_embeddings\": " + (tie == 0 ? "false" : "true") + ", \"eos_token_id\": null";
  if (spelling != 0) result.config += std::string(", \"") + key + "\": " + rope(choose, head_dim);
  if (choose(2) == 1) result.config += ", \"unknown\": [{\"a\": [1.5, null, \"b\"]}]";
  result.config += "}";
  if (choose(3) == 1) result.generation = "{\"eos_token_id\": " + text(choose(9)) + "}";
  if (choose(3) == 1) result.generation = "{\"eos_token_id\": [" + text(choose(9)) + ", 3]}";
  return result;
}

/// Changes bytes, which may make it anything. Three inputs of four are left alone.
bool edit(Choices& choose, Directory& directory) {
  if (choose(4) != 3) return false;
  static const std::string kPieces[] = {
      "0",    "1", "9", "-", "1e9", "268435456", "null",
      "{",    "}", "[", "]", "\"",  ",",         "\"rope_scaling\":{\"type\":\"yarn\",\"factor\":1e300},",
      "true", ".5"};
  for (unsigned edits = 1 + choose(3); edits > 0 && !choose.ended(); --edits) {
    std::string* const texts[] = {&directory.config,         &directory.config, &directory.headers[0],
                                  &directory.headers.back(), &directory.index,  &directory.generation};
    std::string& target = *texts[choose(6)];
    if (target.empty()) continue;
    const std::size_t at = (256 * choose(256) + choose(256)) % target.size(), count = 1 + choose(8);
    switch (choose(3)) {
      case 0:
        target.erase(at, count);
        break;
      case 1:
        target.insert(at, kPieces[choose(16)]);
        break;
      default:
        target.replace(at, 1, kPieces[choose(16)]);
    }
  }
  return true;
}

void write(const std::filesystem::path& path, const std::string& bytes) {
  if (bytes.empty()) {
    std::filesystem::remove(path);
  } else {
    files::write(path, bytes);
  }
}

void check(bool holds) {
  if (!holds) std::abort();
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  static const files::Scratch scratch;
  Choices choose(data, size);
  Directory directory = sound(choose);
  const bool edited = edit(choose, directory);
  write(scratch / "config.json", directory.config);
  write(scratch / "generation_config.json", directory.generation);
  const bool sharded = directory.headers.size() == 2;
  write(scratch / "model.safetensors.index.json", directory.index);
  for (std::size_t i = 0; i < 2; ++i) {
    const std::string name = sharded ? text(i) : i == 0 ? "model.safetensors" : "0";
    write(scratch / name,
          i < directory.headers.size() ? files::safetensors(directory.headers[i], directory.data[i]) : "");
  }
  if (sharded) write(scratch / "model.safetensors", "");

  try {
    const auto model = diffattn::DiffLlama<float>::load(scratch / ".");
    const Index n = std::min<Index>(7, model.config().max_tokens());
    std::vector<Index> tokens;
    for (Index i = 0; i < n; ++i) tokens.push_back(i % model.config().vocab_size);
    const diffattn::Matrix<float> logits = model.logits(tokens);
    check(logits.rows() == n && logits.cols() == model.config().vocab_size);
    check(edited || logits.allFinite());
    const auto more = model.generate(std::vector<Index>{0}, {.max_new_tokens = 3});
    check(more.size() <= 3);
  } catch (const std::runtime_error& error) {
    check(edited && error.what()[0] != '\0');
  } catch (const std::invalid_argument& error) {
    check(edited && error.what()[0] != '\0');
  }
  return 0;
}
