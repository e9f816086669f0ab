#pragma once

// The same units compile against the one header, which has everything, and against include/.

#include <diffattn/diffattn.hpp>
#if __has_include(<diffattn/models/decoder.hpp>)
#include <diffattn/models/decoder.hpp>
#include <diffattn/models/generate.hpp>
#include <diffattn/training/adamw.hpp>
#include <diffattn/training/cross_entropy.hpp>
#endif

/// The output of a layer for x, computed in the second unit.
diffattn::Matrix<float> layer_output(const diffattn::Matrix<float>& x);
