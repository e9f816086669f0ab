// Every file in data/io/bad, which make_bad_files.py writes, is refused with the tensor and the reason.

#include <diffattn/io/safetensors.hpp>

#include <filesystem>
#include <map>
#include <string>

#include "support/catch.hpp"
#include "support/throws.hpp"

namespace {

const std::string kKnown =
    " (known: F64, I64, F32, I32, F16, BF16, U64, C64, U32, I16, U16, I8, U8, BOOL, F8_E4M3, F8_E5M2, F8_E8M0, "
    "F8_E4M3FNUZ, F8_E5M2FNUZ, F6_E2M3, F6_E3M2, F4)";

/// What is said after the file's name; of the JSON parser's own words, nothing.
const std::map<std::string, std::string> kReasons = {
    // Length of the header
    {"empty_file", "is shorter than the 8 bytes of a header length"},
    {"seven_bytes", "is shorter than the 8 bytes of a header length"},
    {"header_length_0", "has a header that does not begin with {"},
    {"header_length_past_end", "claims a header of 3 bytes, but only 2 follow"},
    {"header_length_100_mb", "claims a header of 100000000 bytes, but only 2 follow"},
    {"header_length_over_100_mb", "claims a header of 100000001 bytes, more than 100 MB"},
    {"header_length_2_63", "claims a header of 9223372036854775808 bytes, more than 100 MB"},
    {"header_length_wraps_around", "claims a header of 18446744073709551608 bytes, more than 100 MB"},
    {"header_length_2_64_minus_1", "claims a header of 18446744073709551615 bytes, more than 100 MB"},
    // Text of the header
    {"header_begins_with_space", "has a header that does not begin with {"},
    {"header_begins_with_bom", "has a header that does not begin with {"},
    {"header_is_list", "has a header that does not begin with {"},
    {"header_is_string", "has a header that does not begin with {"},
    {"header_is_nested_lists", "has a header that does not begin with {"},
    {"header_is_open_brace", "has a header that is not valid JSON: "},
    {"header_not_json", "has a header that is not valid JSON: "},
    {"header_truncated", "has a header that is not valid JSON: "},
    {"header_trailing_comma", "has a header that is not valid JSON: "},
    {"header_trailing_text", "has a header that is not valid JSON: "},
    {"header_trailing_object", "has a header that is not valid JSON: "},
    {"header_trailing_comment", "has a header that is not valid JSON: "},
    {"header_padded_with_nul", "has a header with a NUL in it"},
    {"header_hides_text_behind_nul", "has a header with a NUL in it"},
    {"header_nan", "has a header that is not valid JSON: "},
    {"header_number_out_of_range", "has a header that is not valid JSON: "},
    {"header_control_character", "has a header that is not valid JSON: "},
    {"header_utf8_invalid_byte", "has a header that is not valid JSON: "},
    {"header_utf8_overlong", "has a header that is not valid JSON: "},
    {"header_utf8_truncated", "has a header that is not valid JSON: "},
    {"header_utf8_surrogate", "has a header that is not valid JSON: "},
    {"header_lone_surrogate", "has a header that is not valid JSON: "},
    {"header_nested_lists", R"(has a header that nests "bad" too deeply)"},
    {"header_nested_objects", R"(has a header that nests "bad" too deeply)"},
    {"header_nested_shape", R"(has a header that nests "bad" too deeply)"},
    // Keys
    {"duplicate_tensor", R"(has a header with the key "bad" twice)"},
    {"duplicate_tensor_equal", R"(has a header with the key "bad" twice)"},
    {"duplicate_tensor_escaped", R"(has a header with the key "bad" twice)"},
    {"duplicate_dtype", R"(has a header with the key "dtype" of "bad" twice)"},
    {"duplicate_shape", R"(has a header with the key "shape" of "bad" twice)"},
    {"duplicate_data_offsets", R"(has a header with the key "data_offsets" of "bad" twice)"},
    {"duplicate_metadata", R"(has a header with the key "__metadata__" twice)"},
    {"duplicate_metadata_key", R"(has a header with the key "a" of "__metadata__" twice)"},
    // Metadata
    {"metadata_is_list", "has a __metadata__ that is not an object"},
    {"metadata_is_string", "has a __metadata__ that is not an object"},
    {"metadata_is_tensor", R"(has a __metadata__ whose "shape" is not a string)"},
    {"metadata_number", R"(has a __metadata__ whose "depth" is not a string)"},
    {"metadata_null", R"(has a __metadata__ whose "depth" is not a string)"},
    {"metadata_object", R"(has a __metadata__ whose "depth" is not a string)"},
    // Tensors
    {"tensor_is_list", R"(tensor "bad" is not described by an object)"},
    {"tensor_is_null", R"(tensor "bad" is not described by an object)"},
    {"tensor_is_empty", R"(tensor "bad" has no dtype)"},
    {"tensor_name_with_nul", R"(tensor "b\u0000d" has the unknown dtype "F31")" + kKnown},
    {"tensor_name_with_escapes", R"(tensor "\"\n\u001b[2J" has the unknown dtype "F31")" + kKnown},
    {"dtype_missing", R"(tensor "bad" has no dtype)"},
    {"dtype_unknown", R"(tensor "bad" has the unknown dtype "F31")" + kKnown},
    {"dtype_lower_case", R"(tensor "bad" has the unknown dtype "f32")" + kKnown},
    {"dtype_empty", R"(tensor "bad" has the unknown dtype "")" + kKnown},
    {"dtype_with_nul", R"(tensor "bad" has the unknown dtype "F32\u0000")" + kKnown},
    {"dtype_is_number", R"(tensor "bad" has a dtype that is not a string)"},
    {"dtype_is_null", R"(tensor "bad" has a dtype that is not a string)"},
    {"dtype_is_list", R"(tensor "bad" has a dtype that is not a string)"},
    {"shape_missing", R"(tensor "bad" has no shape)"},
    {"shape_is_number", R"(tensor "bad" has a shape that is not a list)"},
    {"shape_is_string", R"(tensor "bad" has a shape that is not a list)"},
    {"shape_is_object", R"(tensor "bad" has a shape that is not a list)"},
    {"shape_is_null", R"(tensor "bad" has a shape that is not a list)"},
    {"shape_negative", R"(tensor "bad" has a shape with -2 in it)"},
    {"shape_twice_negative", R"(tensor "bad" has a shape with -1 in it)"},
    {"shape_negative_zero", R"(tensor "bad" has a shape with 0 in it)"},
    {"shape_fraction", R"(tensor "bad" has a shape with 2.5 in it)"},
    {"shape_float", R"(tensor "bad" has a shape with 2.0 in it)"},
    {"shape_exponent", R"(tensor "bad" has a shape with 2.0 in it)"},
    {"shape_string", R"(tensor "bad" has a shape with "2" in it)"},
    {"shape_bool", R"(tensor "bad" has a shape with true in it)"},
    {"shape_null", R"(tensor "bad" has a shape with null in it)"},
    {"shape_2_63", R"(tensor "bad" has a shape whose size overflows)"},
    {"shape_2_64", R"(tensor "bad" has a shape with 1.8446744073709552e+19 in it)"},
    {"shape_overflows", R"(tensor "bad" has a shape whose size overflows)"},
    {"shape_bytes_overflow", R"(tensor "bad" has a shape whose size overflows)"},
    {"shape_wraps_to_right_size", R"(tensor "bad" has a shape whose size overflows)"},
    {"shape_wraps_to_zero", R"(tensor "bad" has a shape whose size overflows)"},
    {"shape_overflows_before_zero", R"(tensor "bad" has a shape whose size overflows)"},
    {"shape_overflows_after_zero", R"(tensor "bad" has a shape whose size overflows)"},
    {"shape_2_64_minus_1_beside_zero", R"(tensor "bad" has a shape whose size overflows)"},
    {"shape_of_part_of_a_byte", R"(tensor "bad" has a shape that does not fill whole bytes)"},
    {"shape_smaller_than_offsets", R"(tensor "bad" has data_offsets of 8 bytes, but its shape takes 4)"},
    {"shape_larger_than_offsets", R"(tensor "bad" has data_offsets of 8 bytes, but its shape takes 12)"},
    {"shape_empty_but_offsets", R"(tensor "bad" has data_offsets of 8 bytes, but its shape takes 0)"},
    {"shape_scalar_but_offsets", R"(tensor "bad" has data_offsets of 8 bytes, but its shape takes 4)"},
    {"dtype_larger_than_offsets", R"(tensor "bad" has data_offsets of 8 bytes, but its shape takes 16)"},
    {"dtype_smaller_than_offsets", R"(tensor "bad" has data_offsets of 8 bytes, but its shape takes 4)"},
    // Offsets
    {"offsets_missing", R"(tensor "bad" has no data_offsets)"},
    {"offsets_is_number", R"(tensor "bad" has a data_offsets that is not a list)"},
    {"offsets_is_null", R"(tensor "bad" has a data_offsets that is not a list)"},
    {"offsets_empty", R"(tensor "bad" has data_offsets that are not a pair)"},
    {"offsets_one", R"(tensor "bad" has data_offsets that are not a pair)"},
    {"offsets_three", R"(tensor "bad" has data_offsets that are not a pair)"},
    {"offsets_negative", R"(tensor "bad" has a data_offsets with -8 in it)"},
    {"offsets_float", R"(tensor "bad" has a data_offsets with 16.0 in it)"},
    {"offsets_string", R"(tensor "bad" has a data_offsets with "8" in it)"},
    {"offsets_reversed", R"(tensor "bad" has data_offsets that end before they begin)"},
    {"offsets_past_end", R"(tensor "bad" ends at byte 20 of the data, which has 16)"},
    {"offsets_begin_past_end", R"(tensor "bad" ends at byte 808 of the data, which has 16)"},
    {"offsets_near_2_64", R"(tensor "bad" ends at byte 18446744073709551615 of the data, which has 16)"},
    {"offsets_2_64", R"(tensor "bad" has a data_offsets with 1.8446744073709552e+19 in it)"},
    {"offsets_overlap", R"(tensor "bad" overlaps the tensor before it)"},
    {"offsets_equal", R"(tensor "good" overlaps the tensor before it)"},
    {"offsets_inside", R"(tensor "bad" overlaps the tensor before it)"},
    {"offsets_empty_tensor_inside", R"(tensor "bad" overlaps the tensor before it)"},
    {"offsets_gap", R"(tensor "bad" leaves a gap of unused bytes before it)"},
    {"offsets_gap_at_start", R"(tensor "bad" leaves a gap of unused bytes before it)"},
    {"offsets_empty_tensor_past_end", R"(tensor "bad" ends at byte 9 of the data, which has 8)"},
    {"offsets_empty_tensor_behind_gap", R"(tensor "bad" leaves a gap of unused bytes before it)"},
    // Data
    {"data_truncated", R"(tensor "bad" ends at byte 16 of the data, which has 15)"},
    {"data_missing", R"(tensor "good" ends at byte 8 of the data, which has 0)"},
    {"data_after_last_tensor", "has 1 bytes after the last tensor"},
    {"data_without_tensors", "has 4 bytes after the last tensor"},
};

}  // namespace

TEST_CASE("A file that breaks the format is refused, and the error says which tensor and why") {
  std::size_t files = 0;
  for (const auto& entry : std::filesystem::directory_iterator(DIFFATTN_TEST_DATA "/io/bad")) {
    ++files;
    const std::string name = entry.path().stem().string();
    INFO(name);
    REQUIRE(kReasons.count(name) == 1);
    const std::string expected = entry.path().string() + ": " + kReasons.at(name);
    const std::string message = support::thrown_by<diffattn::FormatError>([&] { diffattn::Safetensors{entry.path()}; });
    const bool in_parsers_words = expected.ends_with("JSON: ");
    CHECK(message.substr(0, in_parsers_words ? expected.size() : std::string::npos) == expected);
  }
  CHECK(files == kReasons.size());
}
