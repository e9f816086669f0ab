#include <diffattn/hugging_face/diffllama_config.hpp>
#include <diffattn/io/sharded_safetensors.hpp>

#include <ctime>

#include "io/files.hpp"
#include "support/catch.hpp"
#include "support/failing_allocations.hpp"
#include "support/throws.hpp"

namespace {

using diffattn::DiffLlamaConfig;
using diffattn::FormatError;
using Kind = diffattn::RotaryScaling::Kind;

DiffLlamaConfig parse(const std::string& fields) {
  return DiffLlamaConfig::parse(R"({"model_type": "diffllama")" + (fields.empty() ? "" : ", " + fields) + "}",
                                "c.json");
}

std::string error(const std::string& text) {
  return support::thrown_by<FormatError>([&] { DiffLlamaConfig::parse(text, "c.json"); });
}
std::string field_error(const std::string& fields) {
  return support::thrown_by<FormatError>([&] { parse(fields); });
}

}  // namespace

TEST_CASE("Fields that are absent or null have transformers' defaults", "[models][diffllama_config]") {
  for (const char* const fields : {"", R"("vocab_size": null, "num_key_value_heads": null, "rope_scaling": null)"}) {
    const DiffLlamaConfig c = parse(fields);
    CHECK(c.to_json() == DiffLlamaConfig().to_json());
    CHECK(c.num_key_value_heads == 32);
    CHECK(c.head_dim == 64);
  }
  CHECK(parse(R"("num_attention_heads": 8)").num_key_value_heads == 8);
  CHECK(parse(R"("num_attention_heads": 8)").head_dim == 256);
  CHECK(parse(R"("eos_token_id": [3, 4])").eos_token_ids == std::vector<diffattn::Index>{3, 4});
  CHECK(parse(R"("eos_token_id": null)").eos_token_ids.empty());
  CHECK(parse(R"("eos_token_id": -1)").eos_token_ids.empty());
  CHECK(parse(R"("hidden_size": 70, "num_attention_heads": 8)").head_dim == 8);  // rounded down
  CHECK(DiffLlamaConfig::parse(R"({"architectures": ["DiffLlamaForCausalLM"]})", "c").hidden_size == 2048);
  CHECK(parse(R"("hidden_size": 64, "hidden_size": 128)").hidden_size == 128);  // the last one, as in Python
  const DiffLlamaConfig c = parse(R"("is_causal": true, "sliding_window": null, "layer_types": ["full_attention"],
      "quantization_config": null, "transformers_weights": "model.safetensors", "pretraining_tp": 1, "mlp_bias": true,
      "auto_map": {"AutoConfig": "x", "y": [[[]]]}, "hidden_act": "swish", "partial_rotary_factor": 0.5)");
  CHECK(c.to_json() == DiffLlamaConfig().to_json());
  CHECK(parse(R"("sliding_window": 4096)").max_tokens() == 2048);  // never reached
}

TEST_CASE("The rotary embedding is read in the old spelling and the new", "[models][diffllama_config]") {
  const std::string factors = R"("factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                                 "original_max_position_embeddings": 8192)";
  for (const std::string& fields :
       {R"("rope_theta": 500000.0, "rope_scaling": {"rope_type": "llama3", )" + factors + "}",
        R"("rope_theta": 500000, "rope_scaling": {"type": "llama3", )" + factors + "}",
        R"("rope_parameters": {"rope_theta": 500000.0, "rope_type": "llama3", )" + factors + "}"}) {
    const DiffLlamaConfig c = parse(fields);
    CHECK(c.rope_theta == 500000);
    CHECK(c.rope_scaling.kind == Kind::llama3);
    CHECK(c.rope_scaling.factor == 32);
    CHECK(c.rope_scaling.context == 8192);
    CHECK(c.rope_scaling.low_freq_factor == 1);
    CHECK(c.rope_scaling.high_freq_factor == 4);
    CHECK(DiffLlamaConfig::parse(c.to_json(), "again").to_json() == c.to_json());
  }
  CHECK(parse(R"("rope_parameters": {"rope_type": "default", "rope_theta": 7.5})").rope_theta == 7.5);
  // rope_scaling hides rope_parameters, unless it is null or empty.
  const DiffLlamaConfig both = parse(R"("rope_scaling": {"rope_type": "linear", "factor": 3},
                                        "rope_parameters": {"rope_type": "dynamic", "factor": 2, "rope_theta": 7.5})");
  CHECK(both.rope_scaling.kind == Kind::linear);
  CHECK(both.rope_scaling.factor == 3);
  CHECK(both.rope_theta == 10000);
  for (const char* const nothing : {"null", "{}"}) {
    const DiffLlamaConfig c = parse(std::string(R"("rope_scaling": )") + nothing + R"(, "rope_theta": 9,
        "rope_parameters": {"type": "linear", "factor": 3})");
    CHECK(c.rope_scaling.kind == Kind::linear);
    CHECK(c.rope_theta == 9);
  }
  CHECK(parse(R"("rope_scaling": {"type": "linear", "factor": 2})").max_tokens() == 4096);
  const DiffLlamaConfig dynamic =
      parse(R"("rope_scaling": {"type": "dynamic", "factor": 2}, "max_position_embeddings": 9)");
  CHECK(dynamic.rope_scaling.context == 9);
  CHECK(dynamic.max_tokens() > 1'000'000);
}

TEST_CASE("What a kind of rotary embedding leaves out has transformers' defaults", "[models][diffllama_config]") {
  const auto rope = [](const std::string& fields) {
    const DiffLlamaConfig c =
        parse(R"("head_dim": 4, "max_position_embeddings": 64, "rope_parameters": {)" + fields + "}");
    CHECK(DiffLlamaConfig::parse(c.to_json(), "again").to_json() == c.to_json());
    return c;
  };
  DiffLlamaConfig c = rope(R"("rope_type": "yarn", "factor": 4)");
  CHECK(c.rope_scaling.context == 64);
  CHECK(c.rope_scaling.beta_fast == 32);
  CHECK(c.rope_scaling.beta_slow == 1);
  CHECK(c.rope_scaling.truncate);
  CHECK_FALSE(c.rope_scaling.attention_factor.has_value());
  CHECK(c.max_tokens() == 256);
  c = rope(R"("rope_type": "yarn", "factor": null, "beta_fast": 0, "beta_slow": null, "truncate": null,
              "original_max_position_embeddings": 16)");
  CHECK(c.rope_scaling.factor == 4);
  CHECK(c.rope_scaling.beta_fast == 32);
  CHECK_FALSE(c.rope_scaling.truncate);
  CHECK(c.max_tokens() == 64);
  c = rope(R"("rope_type": "longrope", "short_factor": [1, 2], "long_factor": [3, 4.5], "attention_factor": 2,
              "original_max_position_embeddings": 16)");
  CHECK(c.rope_scaling.factor == 4);
  CHECK(c.rope_scaling.short_factors == std::vector<double>{1, 2});
  CHECK(c.rope_scaling.long_factors == std::vector<double>{3, 4.5});
  CHECK(c.rope_scaling.attention_factor == 2);
  c = rope(R"("rope_type": "proportional", "partial_rotary_factor": 0.25)");
  CHECK(c.rope_scaling.factor == 1);
  CHECK(c.rope_scaling.proportion == 0.25);
  CHECK(
      rope(R"("rope_type": "llama3", "factor": 2, "low_freq_factor": 1, "high_freq_factor": 4)").rope_scaling.context ==
      64);
  CHECK(rope(R"("rope_type": "linear", "factor": 1e300)").max_tokens() == DiffLlamaConfig::kLargest);
  const DiffLlamaConfig top = parse(R"("original_max_position_embeddings": 8,
      "rope_scaling": {"rope_type": "yarn", "factor": 4, "original_max_position_embeddings": 16})");
  CHECK(top.rope_scaling.context == 8);
}

TEST_CASE("A hostile config.json is refused by name", "[models][diffllama_config]") {
  CHECK(error("").substr(0, 26) == "c.json: is not valid JSON:");
  CHECK(error("[]") == "c.json: is not valid JSON: an object is expected");
  CHECK(error("{").substr(0, 26) == "c.json: is not valid JSON:");
  CHECK(error(std::string(100000, '[')).substr(0, 26) == "c.json: is not valid JSON:");
  CHECK(error("{}") == "c.json: model_type is missing, must be \"diffllama\"");
  CHECK(error(R"({"model_type": "llama"})") == "c.json: model_type \"llama\" is not known, must be \"diffllama\"");
  CHECK(error(R"({"model_type": 3})") == "c.json: model_type must be a string, got 3");
  CHECK(field_error(R"("hidden_act": "gelu")") ==
        "c.json: hidden_act \"gelu\" is not supported, must be \"silu\" (or \"swish\", which is the same)");
  const std::string known = " is not known (known: default, linear, dynamic, llama3, yarn, longrope, proportional)";
  CHECK(field_error(R"("rope_scaling": {"rope_type": "su"})") == "c.json: rope_scaling.rope_type \"su\"" + known);
  CHECK(field_error(R"("rope_parameters": {"type": "x"})") == "c.json: rope_parameters.type \"x\"" + known);
  CHECK(field_error(R"("rope_scaling": {"type": "linear"})") == "c.json: rope_scaling.factor is missing");
  CHECK(field_error(R"("rope_scaling": {"type": "linear", "factor": -0.5})") ==
        "c.json: rope_scaling.factor must be a positive number, got -0.500000");
  CHECK(field_error(R"("rope_scaling": {"type": "yarn"})") == "c.json: rope_scaling.factor is missing");
  CHECK(field_error(R"("rope_scaling": {"type": "yarn", "factor": 2}, "rope_theta": 1)") ==
        "c.json: rope_scaling.rope_theta must not be 1 for yarn");
  CHECK(field_error(R"("rope_scaling": {"type": "yarn", "factor": 2, "beta_fast": -1})") ==
        "c.json: rope_scaling.beta_fast must be a positive number, got -1.000000");
  const std::string longrope = R"("head_dim": 4, "rope_scaling": {"type": "longrope", "short_factor": )";
  CHECK(field_error(longrope + "[1, 2]}") == "c.json: rope_scaling.long_factor is missing");
  CHECK(field_error(longrope + "[1]}") ==
        "c.json: rope_scaling.short_factor must have 2 numbers, half the head_dim, got 1");
  CHECK(field_error(longrope + "[1, 0]}") ==
        "c.json: rope_scaling.short_factor must be a list of positive numbers, got 0");
  CHECK(field_error(longrope + "7}") == "c.json: rope_scaling.short_factor must be a list of numbers, got 7");
  CHECK(field_error(longrope + R"([1, 2], "long_factor": [1, 2], "original_max_position_embeddings": 1})") ==
        "c.json: rope_scaling.original_max_position_embeddings must be more than 1 for longrope");
  CHECK(field_error(R"("rope_scaling": {"type": "linear", "factor": 2, "partial_rotary_factor": 0.5})") ==
        "c.json: rope_scaling.partial_rotary_factor must be 1, got 0.500000");
  CHECK(field_error(R"("rope_scaling": {"type": "proportional"}, "partial_rotary_factor": 1.5)") ==
        "c.json: partial_rotary_factor must be from 0 to 1, got 1.500000");
  CHECK(field_error(R"("rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 2}})") ==
        "c.json: rope_parameters has an object \"full_attention\", but the layers of DiffLlama share one rotary "
        "embedding: put its fields in rope_parameters");
  CHECK(field_error(R"("rope_scaling": 3)") == "c.json: rope_scaling must be an object, got 3");
  CHECK(field_error(R"("rope_scaling": {"type": "llama3", "factor": 2})") ==
        "c.json: rope_scaling.low_freq_factor is missing");
  CHECK(
      field_error(R"("quantization_config": {"bits": 4})") ==
      "c.json: quantization_config is not supported: save the model dequantized (model.dequantize() in transformers), "
      "as bfloat16");
  CHECK(field_error(R"("sliding_window": 512)") ==
        "c.json: sliding_window is not supported: DiffLlama attends to all tokens; remove it if the model was trained "
        "so");
  CHECK(field_error(R"("is_causal": false)") ==
        "c.json: is_causal must be true: attention to later tokens is not supported");
  CHECK(field_error(R"("is_causal": null)") == field_error(R"("is_causal": false)"));
  CHECK(field_error(R"("layer_types": ["full_attention", "sliding_attention"])") ==
        "c.json: layer_types must be all \"full_attention\", got \"sliding_attention\"");
  CHECK(field_error(R"("num_kv_shared_layers": 1)") == "c.json: num_kv_shared_layers must be 0");
  CHECK(field_error(R"("transformers_weights": "x.safetensors")") ==
        "c.json: transformers_weights \"x.safetensors\" is not supported: call the file model.safetensors and remove "
        "this field");
  CHECK(field_error(R"("num_attention_heads": 268435456, "num_key_value_heads": 1, "head_dim": 268435456)") ==
        "c.json: num_attention_heads x head_dim x hidden_size is too large: 268435456 x 268435456 x 2048");
  CHECK(error(std::string("{}\0{", 4)) == "c.json: is not valid JSON: there is a NUL in it");
  CHECK(field_error(R"("rope_theta": 0)") == "c.json: rope_theta must be a positive number, got 0.000000");
  for (const char* const value :
       {"0", "-1", "268435457", "4611686018427387904", "18446744073709551615", "1.5", "\"8\""}) {
    for (const char* const key :
         {"vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
          "num_key_value_heads", "head_dim", "max_position_embeddings"}) {
      CHECK(field_error(std::string("\"") + key + "\": " + value) ==
            std::string("c.json: ") + key + " must be a whole number from 1 to 2^28, got " + value);
    }
  }
  CHECK(field_error(R"("num_attention_heads": 3)") == "c.json: num_attention_heads must be even, got 3");
  CHECK(field_error(R"("num_attention_heads": 8, "num_key_value_heads": 3)") ==
        "c.json: num_key_value_heads = 3 must divide num_attention_heads = 8");
  CHECK(field_error(R"("hidden_size": 16)") ==
        "c.json: num_attention_heads = 32 must be at most hidden_size = 16, as no head_dim is given");
  CHECK(field_error(R"("head_dim": 7)") == "c.json: head_dim must be even, got 7");
  CHECK(field_error(R"("rms_norm_eps": -1)") == "c.json: rms_norm_eps must not be negative, got -1.000000");
  CHECK(field_error(R"("tie_word_embeddings": 1)") == "c.json: tie_word_embeddings must be true or false, got 1");
  CHECK(field_error(R"("eos_token_id": "x")") == "c.json: eos_token_id must be token ids, got \"x\"");
}

TEST_CASE("A config.json of 200,000 fields is read in linear time", "[models][diffllama_config]") {
  const auto seconds = [](int count, const std::string& begin, const std::string& end) {
    std::string fields;
    for (int i = 0; i < count; ++i) fields += (i == 0 ? "\"x" : ", \"x") + std::to_string(i) + "\": 1";
    const std::clock_t start = std::clock();
    CHECK(parse(begin + fields + end).vocab_size == 32000);
    return static_cast<double>(std::clock() - start) / CLOCKS_PER_SEC;
  };
  for (const auto& [begin, end] : {std::pair("", ""),
                                   {R"("nested": {)", "}"},
                                   {R"("list": [{"a": {)", "}}]"},
                                   {R"("rope_scaling": {"factor": 2, )", "}"}}) {
    const double few = seconds(50'000, begin, end), many = seconds(200'000, begin, end);
    INFO(begin << few << " s for 50,000, " << many << " s for 200,000");
    CHECK(many < 8 * few + 0.5);
    CHECK(many < 20);
  }
}

TEST_CASE("A configuration is read and written where memory may fail", "[models][diffllama_config]") {
  const std::string text = R"({"model_type": "diffllama", "head_dim": 4, "rope_scaling": {"type": "longrope",
      "short_factor": [1, 2], "long_factor": [3, 4]}, "eos_token_id": [1, 2, 3], "unknown": [[{"deep": [1]}], {}]})";
  for (const auto failures : {support::Failures::one, support::Failures::all_later}) {
    const std::size_t failed = support::for_every_failing_allocation(
        [&] { DiffLlamaConfig::parse(text, "a name that is no small string").to_json(); },
        [](bool threw) { CHECK(threw); }, failures);
    CHECK(failed >= (support::fails_allocations() ? 30U : 0U));
  }
}

TEST_CASE("A hostile index is refused by name", "[models][sharded_safetensors]") {
  const files::Scratch scratch;
  files::write(scratch / "one.safetensors",
               files::safetensors(R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},)"
                                  R"("b":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}})",
                                  std::string(8, '\0')));
  const auto index = scratch / "model.safetensors.index.json";
  const auto refused = [&](const std::string& text) {
    files::write(index, text);
    const std::string message = support::thrown_by<FormatError>([&] { diffattn::ShardedSafetensors(scratch / "."); });
    return message.substr(message.find("index.json: ") + 12);
  };
  CHECK(refused("").substr(0, 18) == "is not valid JSON:");
  CHECK(refused("[]") == "has no weight_map that is an object");
  CHECK(refused(R"({"weight_map": 1})") == "has no weight_map that is an object");
  CHECK(refused(R"({"weight_map": {}})") == "has a weight_map without tensors");
  CHECK(refused(R"({"weight_map": {"a": 1}})") == "weight_map gives \"a\" no file name");
  for (const char* const name : {"../one.safetensors", "/etc/passwd", "", ".", "..", "x\\\\y"}) {
    CHECK(refused(std::string(R"({"weight_map": {"a": ")") + name + "\"}}")
              .find("which is not a plain name: put the file beside the index") != std::string::npos);
  }
  CHECK(refused(R"({"weight_map": {"a": "one.safetensors", "c": "one.safetensors"}})") ==
        "tensor \"c\" is not in \"one.safetensors\"");
  files::write(scratch / "b.safetensors",
               files::safetensors(R"({"b":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}})", std::string(4, '\0')));
  CHECK(refused(R"({"weight_map": {"a": "one.safetensors", "b": "b.safetensors"}})") ==
        "tensor \"b\" of \"one.safetensors\" is also in another file: which of the two is meant?");
  files::write(index, R"({"weight_map": {"a": "two.safetensors"}})");
  CHECK(support::thrown_by<std::runtime_error>([&] {
          diffattn::ShardedSafetensors(scratch / ".");
        }).find("two.safetensors: cannot be opened") != std::string::npos);
  files::write(index, R"({"weight_map": {"a": "one.safetensors", "b": "one.safetensors"}})");
  CHECK(diffattn::ShardedSafetensors(scratch / ".").tensors().size() == 2);
  files::write(index, R"({"weight_map": {"a": "two.safetensors", "a": "one.safetensors"}})");  // the last one
  CHECK(diffattn::ShardedSafetensors(scratch / ".").contains("b"));  // in the file, if not in the index
}
