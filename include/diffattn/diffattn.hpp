#pragma once

// The table of contents: matrices, the operators and the layers. The rest is included by name:
//
//   core/parallel_threads.hpp, core/parallel_openmp.hpp   executors: a pool of threads, OpenMP
//   models/decoder.hpp, models/generate.hpp               whole models, and text from them
//   training/…                                            cross-entropy, AdamW, batches, …
//   io/safetensors.hpp, io/parameters.hpp, …              files; these and hugging_face/ need nlohmann-json
//   hugging_face/diffllama.hpp                            checkpoints of Hugging Face's DiffLlama

#include "diffattn/core/error.hpp"
#include "diffattn/core/matrix.hpp"
#include "diffattn/core/parallel.hpp"
#include "diffattn/core/version.hpp"
#include "diffattn/core/workspace.hpp"
#include "diffattn/kernels/attention.hpp"
#include "diffattn/kernels/backward.hpp"
#include "diffattn/kernels/decode.hpp"
#include "diffattn/kernels/diff_attention.hpp"
#include "diffattn/kernels/gradients.hpp"
#include "diffattn/kernels/mask.hpp"
#include "diffattn/kernels/options.hpp"
#include "diffattn/kernels/reference.hpp"
#include "diffattn/layers/attention_layer.hpp"
#include "diffattn/layers/kv_cache.hpp"
#include "diffattn/layers/lambda.hpp"
#include "diffattn/layers/linear.hpp"
#include "diffattn/layers/multihead_attention.hpp"
#include "diffattn/layers/multihead_diff_attention.hpp"
#include "diffattn/layers/multihead_diff_attention_v2.hpp"
#include "diffattn/layers/parameters.hpp"
#include "diffattn/layers/rms_norm.hpp"
#include "diffattn/layers/rotary.hpp"
