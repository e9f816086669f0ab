#pragma once

// The table of contents of what the operator and its layers are: core, kernels, layers and analysis. It needs Eigen
// alone, and brings ThreadPool, an executor on threads of its own.
//
// What else there is, each header by its name:
//
//   core/parallel_openmp.hpp     an executor on OpenMP's threads
//   models/                      decoder, generate, feed_forward, model_sizes: whole language models         Eigen alone
//   training/                    cross_entropy, adamw, learning_rate, gradient_norm, batch_sampler, …        Eigen alone
//   io/                          safetensors, parameters, checkpoint: files of PyTorch and of training    nlohmann-json
//   hugging_face/                diffllama: DiffLlama's checkpoints, read, run and written                nlohmann-json
//
// What needs nlohmann-json comes with the CMake target diffattn::io, the rest with diffattn::diffattn.

#include "diffattn/analysis/attention_maps.hpp"
#include "diffattn/analysis/statistics.hpp"
#include "diffattn/core/error.hpp"
#include "diffattn/core/matrix.hpp"
#include "diffattn/core/parallel.hpp"
#include "diffattn/core/parallel_threads.hpp"
#include "diffattn/core/version.hpp"
#include "diffattn/core/workspace.hpp"
#include "diffattn/kernels/attention.hpp"
#include "diffattn/kernels/backward.hpp"
#include "diffattn/kernels/bias.hpp"
#include "diffattn/kernels/decode.hpp"
#include "diffattn/kernels/diff_attention.hpp"
#include "diffattn/kernels/gradients.hpp"
#include "diffattn/kernels/mask.hpp"
#include "diffattn/kernels/options.hpp"
#include "diffattn/kernels/reference.hpp"
#include "diffattn/layers/attention_layer.hpp"
#include "diffattn/layers/attention_variant.hpp"
#include "diffattn/layers/cross_attention.hpp"
#include "diffattn/layers/kv_cache.hpp"
#include "diffattn/layers/lambda.hpp"
#include "diffattn/layers/layer_norm.hpp"
#include "diffattn/layers/linear.hpp"
#include "diffattn/layers/multihead_attention.hpp"
#include "diffattn/layers/multihead_diff_attention.hpp"
#include "diffattn/layers/multihead_diff_attention_v2.hpp"
#include "diffattn/layers/parameters.hpp"
#include "diffattn/layers/rms_norm.hpp"
#include "diffattn/layers/rotary.hpp"
