#include <diffattn/io/sharded_safetensors.hpp>
#include <diffattn/models/diffllama_config.hpp>

#include "io/files.hpp"
#include "support/catch.hpp"
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
  CHECK(parse(R"("rope_scaling": {"type": "linear", "factor": 2})").max_tokens() == 4096);
  const DiffLlamaConfig dynamic =
      parse(R"("rope_scaling": {"type": "dynamic", "factor": 2}, "max_position_embeddings": 9)");
  CHECK(dynamic.rope_scaling.context == 9);
  CHECK(dynamic.max_tokens() > 1'000'000);
}

TEST_CASE("A hostile config.json is refused by name", "[models][diffllama_config]") {
  CHECK(error("").substr(0, 26) == "c.json: is not valid JSON:");
  CHECK(error("[]") == "c.json: is not valid JSON: an object is expected");
  CHECK(error("{").substr(0, 26) == "c.json: is not valid JSON:");
  CHECK(error(std::string(100000, '[')).substr(0, 26) == "c.json: is not valid JSON:");
  CHECK(error("{}") == "c.json: model_type is missing, must be \"diffllama\"");
  CHECK(error(R"({"model_type": "llama"})") == "c.json: model_type \"llama\" is not known, must be \"diffllama\"");
  CHECK(error(R"({"model_type": 3})") == "c.json: model_type must be a string, got 3");
  CHECK(field_error(R"("hidden_act": "gelu")") == "c.json: hidden_act \"gelu\" is not known, must be \"silu\"");
  CHECK(field_error(R"("rope_scaling": {"rope_type": "yarn", "factor": 2})") ==
        "c.json: rope_scaling.rope_type \"yarn\" is not known (known: default, linear, dynamic, llama3)");
  CHECK(field_error(R"("rope_parameters": {"type": "x"})") ==
        "c.json: rope_parameters.type \"x\" is not known (known: default, linear, dynamic, llama3)");
  CHECK(field_error(R"("rope_scaling": {"type": "linear"})") == "c.json: rope_scaling.factor is missing");
  CHECK(field_error(R"("rope_scaling": {"type": "linear", "factor": 0.5})").substr(0, 50) ==
        "c.json: rope_scaling.factor must be a number, at l");
  CHECK(field_error(R"("rope_scaling": 3)") == "c.json: rope_scaling must be an object, got 3");
  CHECK(field_error(R"("rope_scaling": {"type": "llama3", "factor": 2})") ==
        "c.json: rope_scaling.original_max_position_embeddings is missing");
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
  CHECK(field_error(R"("hidden_size": 100)") ==
        "c.json: num_attention_heads = 32 must divide hidden_size = 100, as no head_dim is given");
  CHECK(field_error(R"("head_dim": 7)") == "c.json: head_dim must be even, got 7");
  CHECK(field_error(R"("rms_norm_eps": -1)") == "c.json: rms_norm_eps must not be negative, got -1.000000");
  CHECK(field_error(R"("tie_word_embeddings": 1)") == "c.json: tie_word_embeddings must be true or false, got 1");
  CHECK(field_error(R"("eos_token_id": "x")") == "c.json: eos_token_id must be token ids, got \"x\"");
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
    CHECK(refused(std::string(R"({"weight_map": {"a": ")") + name + "\"}}").find("which is not a plain name") !=
          std::string::npos);
  }
  CHECK(refused(R"({"weight_map": {"a": "one.safetensors", "c": "one.safetensors"}})") ==
        "tensor \"c\" is not in \"one.safetensors\"");
  CHECK(refused(R"({"weight_map": {"a": "one.safetensors"}})") ==
        "tensor \"b\" of \"one.safetensors\" is not in its weight_map");
  files::write(scratch / "b.safetensors",
               files::safetensors(R"({"b":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}})", std::string(4, '\0')));
  CHECK(refused(R"({"weight_map": {"a": "one.safetensors", "b": "b.safetensors"}})") ==
        "tensor \"b\" of \"one.safetensors\" is not in its weight_map");
  files::write(index, R"({"weight_map": {"a": "two.safetensors"}})");
  CHECK(support::thrown_by<std::runtime_error>([&] {
          diffattn::ShardedSafetensors(scratch / ".");
        }).find("two.safetensors: cannot be opened") != std::string::npos);
  files::write(index, R"({"weight_map": {"a": "one.safetensors", "b": "one.safetensors"}})");
  CHECK(diffattn::ShardedSafetensors(scratch / ".").tensors().size() == 2);
}
