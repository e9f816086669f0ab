#!/usr/bin/env python3
"""Writes bad/*.safetensors: files that a reader must refuse, each for one reason, which its name tells.

tests/io/bad_files_test.cpp says what the reader answers. Each file is otherwise sound: where it can, it holds a tensor
"good" in bytes 0 to 8 of the data and the tensor at fault, "bad", in bytes 8 to 16.
"""

import json
import pathlib
import struct

FOLDER = pathlib.Path(__file__).parent / "bad"
GOOD = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
BAD = {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]}


def file(header, data=16, length=None):
    """`header`: text, bytes or what JSON is made of; `length`: what the file claims that of the header to be."""
    if not isinstance(header, (str, bytes)):
        header = json.dumps(header, separators=(",", ":"))
    if isinstance(header, str):
        header = header.encode()
    return struct.pack("<Q", len(header) if length is None else length) + header + bytes(range(data))


def bad(data=16, without=None, **changes):
    """A file whose second tensor differs from a sound one in `changes`."""
    tensor = {key: value for key, value in {**BAD, **changes}.items() if key != without}
    return file({"good": GOOD, "bad": tensor}, data)


def raw(text, data=16):
    """The same with the second tensor written out, for what json.dumps would not write."""
    return file('{"good":' + json.dumps(GOOD) + ',"bad":' + text + "}", data)


def metadata(value):
    return file({"__metadata__": value, "good": GOOD}, 8)


SOUND = json.dumps({"good": GOOD})

FILES = {
    # Length of the header
    "empty_file": b"",
    "seven_bytes": bytes(7),
    "header_length_0": file("", 0),
    "header_length_past_end": file("{}", 0, length=3),
    "header_length_100_mb": file("{}", 0, length=100_000_000),
    "header_length_over_100_mb": file("{}", 0, length=100_000_001),
    "header_length_2_63": file("{}", 0, length=2**63),
    "header_length_wraps_around": file("{}", 0, length=2**64 - 8),
    "header_length_2_64_minus_1": file("{}", 0, length=2**64 - 1),
    # Text of the header
    "header_begins_with_space": file(" " + SOUND, 8),
    "header_begins_with_bom": file("\ufeff" + SOUND, 8),
    "header_is_list": file("[" + SOUND + "]", 8),
    "header_is_string": file('"{}"', 0),
    "header_is_nested_lists": file("[" * 1000, 0),
    "header_is_open_brace": file("{", 0),
    "header_not_json": file("{good}", 8),
    "header_truncated": file(SOUND[:-1], 8),
    "header_trailing_comma": file(SOUND[:-1] + ",}", 8),
    "header_trailing_text": file(SOUND + "x", 8),
    "header_trailing_object": file(SOUND + "{}", 8),
    "header_trailing_comment": file(SOUND + "/**/", 8),
    "header_padded_with_nul": file(SOUND + "\0\0\0\0", 8),
    "header_hides_text_behind_nul": file(SOUND + '\0{"bad":1', 8),
    "header_nan": raw('{"dtype":"F32","shape":[NaN],"data_offsets":[8,16]}'),
    "header_number_out_of_range": raw('{"dtype":"F32","shape":[1e999],"data_offsets":[8,16]}'),
    "header_control_character": file({"good": GOOD}, 8).replace(b"good", b"go\nd"),
    "header_utf8_invalid_byte": file({"good": GOOD}, 8).replace(b"good", b"go\xffd"),
    "header_utf8_overlong": file({"good": GOOD}, 8).replace(b"good", b"g\xc0\xafd"),
    "header_utf8_truncated": file({"good": GOOD}, 8).replace(b"good", b"goo\xc3"),
    "header_utf8_surrogate": file({"good": GOOD}, 8).replace(b"good", b"g\xed\xa0\x80"),
    "header_lone_surrogate": file(SOUND.replace("good", "\\ud800"), 8),
    "header_nested_lists": file('{"bad":' + "[" * 1000, 0),
    "header_nested_objects": file('{"bad":' * 1000, 0),
    "header_nested_shape": bad(shape=[[2]]),
    # Keys
    "duplicate_tensor": file('{"bad":%s,"bad":%s}' % (json.dumps(GOOD), json.dumps(BAD))),
    "duplicate_tensor_equal": file('{"bad":%s,"bad":%s}' % (json.dumps(GOOD), json.dumps(GOOD)), 8),
    "duplicate_tensor_escaped": file('{"bad":%s,"b\\u0061d":%s}' % (json.dumps(GOOD), json.dumps(BAD))),
    "duplicate_dtype": raw('{"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[8,16]}'),
    "duplicate_shape": raw('{"shape":[9],"dtype":"F32","shape":[2],"data_offsets":[8,16]}'),
    "duplicate_data_offsets": raw('{"data_offsets":[0,8],"dtype":"F32","shape":[2],"data_offsets":[8,16]}'),
    "duplicate_metadata": file('{"__metadata__":{},"good":%s,"__metadata__":{}}' % json.dumps(GOOD), 8),
    "duplicate_metadata_key": file('{"__metadata__":{"a":"1","a":"1"},"good":%s}' % json.dumps(GOOD), 8),
    # Metadata
    "metadata_is_list": metadata(["a"]),
    "metadata_is_string": metadata("a"),
    "metadata_is_tensor": metadata({"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}),
    "metadata_number": metadata({"a": "1", "depth": 3}),
    "metadata_null": metadata({"a": "1", "depth": None}),
    "metadata_object": metadata({"a": "1", "depth": {"b": "2"}}),
    # Tensors
    "tensor_is_list": raw('["F32",[2],[8,16]]'),
    "tensor_is_null": raw("null"),
    "tensor_is_empty": raw("{}"),
    "tensor_name_with_nul": file({"good": GOOD, "b\0d": {**BAD, "dtype": "F31"}}),
    "tensor_name_with_escapes": file({"good": GOOD, '"\n\x1b[2J': {**BAD, "dtype": "F31"}}),
    "dtype_missing": bad(without="dtype"),
    "dtype_unknown": bad(dtype="F31"),
    "dtype_lower_case": bad(dtype="f32"),
    "dtype_empty": bad(dtype=""),
    "dtype_with_nul": bad(dtype="F32\0"),
    "dtype_is_number": bad(dtype=32),
    "dtype_is_null": bad(dtype=None),
    "dtype_is_list": bad(dtype=["F32"]),
    "shape_missing": bad(without="shape"),
    "shape_is_number": bad(shape=2),
    "shape_is_string": bad(shape="2"),
    "shape_is_object": bad(shape={"0": 2}),
    "shape_is_null": bad(shape=None),
    "shape_negative": bad(shape=[-2]),
    "shape_twice_negative": bad(shape=[-1, -2]),
    "shape_negative_zero": raw('{"dtype":"F32","shape":[-0],"data_offsets":[8,8]}', 8),
    "shape_fraction": bad(shape=[2.5]),
    "shape_float": bad(shape=[2.0]),
    "shape_exponent": raw('{"dtype":"F32","shape":[2e0],"data_offsets":[8,16]}'),
    "shape_string": bad(shape=["2"]),
    "shape_bool": bad(shape=[2, True]),
    "shape_null": bad(shape=[2, None]),
    "shape_2_63": bad(shape=[2**63]),
    "shape_2_64": bad(shape=[2**64]),
    "shape_overflows": bad(shape=[2**62, 8]),
    "shape_bytes_overflow": bad(shape=[2**62]),
    "shape_wraps_to_right_size": bad(shape=[2**61 + 1, 2]),
    "shape_wraps_to_zero": bad(shape=[2**62, 4], data_offsets=[8, 8], data=8),
    "shape_overflows_before_zero": bad(shape=[2**62, 8, 0], data_offsets=[8, 8], data=8),
    "shape_overflows_after_zero": bad(shape=[0, 2**62, 8], data_offsets=[8, 8], data=8),
    "shape_2_64_minus_1_beside_zero": bad(shape=[0, 2**64 - 1], data_offsets=[8, 8], data=8),
    "shape_of_part_of_a_byte": bad(dtype="F4", shape=[15]),
    "shape_smaller_than_offsets": bad(shape=[1]),
    "shape_larger_than_offsets": bad(shape=[3]),
    "shape_empty_but_offsets": bad(shape=[2, 0]),
    "shape_scalar_but_offsets": bad(shape=[]),
    "dtype_larger_than_offsets": bad(dtype="F64"),
    "dtype_smaller_than_offsets": bad(dtype="BF16"),
    # Offsets
    "offsets_missing": bad(without="data_offsets"),
    "offsets_is_number": bad(data_offsets=8),
    "offsets_is_null": bad(data_offsets=None),
    "offsets_empty": bad(data_offsets=[]),
    "offsets_one": bad(data_offsets=[8]),
    "offsets_three": bad(data_offsets=[8, 16, 16]),
    "offsets_negative": bad(data_offsets=[-8, 0]),
    "offsets_float": bad(data_offsets=[8, 16.0]),
    "offsets_string": bad(data_offsets=["8", 16]),
    "offsets_reversed": bad(data_offsets=[16, 8]),
    "offsets_past_end": bad(shape=[3], data_offsets=[8, 20]),
    "offsets_begin_past_end": bad(data_offsets=[800, 808]),
    "offsets_near_2_64": bad(data_offsets=[2**64 - 9, 2**64 - 1]),
    "offsets_2_64": bad(data_offsets=[2**64, 2**64 + 8]),
    "offsets_overlap": bad(data_offsets=[4, 12], data=12),
    "offsets_equal": bad(data_offsets=[0, 8], data=8),
    "offsets_inside": file(
        {"good": {**GOOD, "shape": [4], "data_offsets": [0, 16]}, "bad": {**BAD, "data_offsets": [4, 12]}}
    ),
    "offsets_empty_tensor_inside": bad(shape=[0], data_offsets=[4, 4], data=8),
    "offsets_gap": bad(data_offsets=[12, 20], data=20),
    "offsets_gap_at_start": file({"bad": {**BAD, "data_offsets": [4, 12]}}, 12),
    "offsets_empty_tensor_past_end": bad(shape=[0], data_offsets=[9, 9], data=8),
    "offsets_empty_tensor_behind_gap": bad(shape=[0], data_offsets=[10, 10], data=10),
    # Data
    "data_truncated": bad(data=15),
    "data_missing": bad(data=0),
    "data_after_last_tensor": bad(data=17),
    "data_without_tensors": file("{}", 4),
}

if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for old in FOLDER.glob("*.safetensors"):
        old.unlink()
    for name, content in FILES.items():
        (FOLDER / f"{name}.safetensors").write_bytes(content)
    print(f"{len(FILES)} files, {sum(map(len, FILES.values()))} bytes")
