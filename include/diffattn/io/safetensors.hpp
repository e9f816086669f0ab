#pragma once

// Reading and writing safetensors, the format in which PyTorch models are published.
//
//   Safetensors file(path);                        maps the file and checks its whole header, strictly
//   file.matrix<float>("q_proj.weight")            a copy, converted to the scalar asked for
//   load_parameters(layer, file, "weight.");       every parameter that visit_parameters(layer, …) names
//
//   SafetensorsWriter writer;  writer.add("x", x);  writer.save(path);
//   save_parameters(layer, path, "weight.");       loads in PyTorch's safetensors
//
// Element types F64, F32, F16, BF16, I64 and I32.
//
// Errors   FormatError for what is wrong with a file, std::runtime_error for one that cannot be opened or written. The
//          headers below say what each does and costs.
//
// Tested by those of the headers below: safetensors_reader_test.cpp, safetensors_writer_test.cpp, parameters_test.cpp.

#include "diffattn/io/parameters.hpp"
#include "diffattn/io/safetensors_reader.hpp"
#include "diffattn/io/safetensors_writer.hpp"
