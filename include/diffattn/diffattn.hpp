#pragma once

// The table of contents: everything there is, by what one wants to do, and the header that has it (under diffattn/,
// without its .hpp). This header includes all of it but what has a star, and needs Eigen alone. What has one must be
// included by name: * needs Eigen alone as well, ** nlohmann-json, which comes with the CMake target diffattn::io.
//
// Attend once, to matrices of your own
//   diff_attention, multihead_diff_attention                eq. (1)                 kernels/diff_attention
//   attention, multihead_attention                          standard attention      kernels/attention
//   attention_backward, diff_attention_backward, …          gradients               kernels/backward, gradients
//   partial_attention, merge; SoftmaxStatistics, log_sum_exp    some of the keys    kernels/partial_attention, …
//   multihead_diff_attention_in_phases_into                 shares that add up      kernels/attention_in_phases
//   FullMask, CausalMask, SlidingWindowMask, both, …        who sees whom           kernels/mask
//   with_bias, AlibiBias, MatrixBias                        a bias for each head    kernels/bias
//   RelativeBias, IndexedBias                               a bias that is learned  kernels/learned_bias
//   Heads, AttentionOptions                                 heads that share        kernels/options
//   reference::attention_map, reference::attention, …       the specification       kernels/reference
//
// Build a layer, or a model of your own
//   MultiheadDiffAttention                                  the paper's layer       layers/multihead_diff_attention
//   MultiheadDiffAttentionV2                                DIFF V2                 layers/multihead_diff_attention_v2
//   MultiheadAttention                                      the baseline            layers/multihead_attention
//   forward, backward, Tape, lengths                        what all layers do      layers/attention_layer, sequences
//   forward_cross, backward_cross, write_memory             another sequence        layers/cross_attention
//   AttentionLayer<Variant>                                 a variant of your own   layers/attention_variant
//   Linear, FrozenMatrix                                    projections             layers/linear, frozen_matrix
//   Arithmetic, pack_weights                                16-bit products         layers/arithmetic
//   RmsNorm, LayerNorm                                      norms                   layers/rms_norm, layer_norm
//   Rotary, RotaryConfig; lambda_init                       positions; λ            layers/rotary, lambda
//   visit_parameters, visit_part, zeros_like; Initializer   parameters, named       layers/parameters, initialization
//
// Decode: token by token, in batches, on streams
//   KvCache, KvCacheOptions                                 windows, forks, pages   layers/kv_cache
//   forward(x, caches)                                      many sequences          layers/batched_attention, …
//   decode_attention, decode_diff_attention; KeyValuePages  the kernels of it       kernels/decode, key_value_pages
//
// Look at what it does
//   attention_maps, attention_maps_cross, MapRows           of a layer              analysis/attention_maps
//   row_entropy, effective_support, attention_share, …      what is in a map        analysis/statistics
//   attention_maps(model, tokens)                           of a whole model        analysis/model_maps
//
// Use threads, and leave the heap alone
//   Serial, ThreadPool                                      executors               core/parallel, parallel_threads
//   OpenMP                                                  an executor             core/parallel_openmp *
//   Workspace                                               scratch that is kept    core/workspace
//   Matrix, Index; ShapeError; version                      what all of it uses     core/matrix, error, version
//
// Run whole models *
//   Decoder, DecoderConfig; DecoderCache                    a language model        models/decoder, decoder_cache
//   generate, GenerateOptions                               text, for many prompts  models/generate, generate_options
//   Encoder, EncoderConfig                                  for images, speech, textmodels/encoder, encoder_config
//   FeedForward, Activation                                 SwiGLU, GELU, ReLU      models/feed_forward, activation
//   kPaperModels, differential_config, standard_config      the paper's sizes       models/model_sizes
//
// Train *
//   AdamW; gradient_norm, clip_gradient_norm                the optimiser           training/adamw, gradient_norm
//   LearningRate                                            warm-up, decay          training/learning_rate
//   cross_entropy                                           the loss                training/cross_entropy
//   BatchSampler; TokenFile                                 data                    training/batch_sampler, token_file
//
// Use several machines *
//   Communicator, SelfCommunicator, check_on_all            ranks                   distributed/communicator, …
//   run_ranks, ThreadCommunicator                           ranks that are threads  distributed/thread_communicator
//   MpiCommunicator (CMake: diffattn::mpi)                  ranks by MPI            distributed/mpi
//   SequenceParallel, SequencePlacement                     one long sequence       distributed/sequence_parallel, …
//   CacheParallel                                           a cache over ranks      distributed/cache_parallel
//   generate(model, prompt, …, CacheParallel)               text over ranks         distributed/generate_over_ranks
//   average_gradients, broadcast_parameters, on_rank_0      data parallel           distributed/data_parallel
//
// Read and write files **
//   Safetensors, SafetensorsWriter; ShardedSafetensors      PyTorch's tensors       io/safetensors, sharded_safetensors
//   load_parameters, save_parameters                        of a layer or model     io/parameters
//   save_checkpoint, load_checkpoint                        a training run          io/checkpoint
//   DiffLlama, DiffLlamaOptions                             Hugging Face's models   hugging_face/diffllama
//   load_diffllama · save_diffllama                         one to train            hugging_face/diffllama_import, _export

#include "diffattn/analysis/attention_maps.hpp"
#include "diffattn/analysis/model_maps.hpp"
#include "diffattn/analysis/statistics.hpp"
#include "diffattn/core/error.hpp"
#include "diffattn/core/matrix.hpp"
#include "diffattn/core/parallel.hpp"
#include "diffattn/core/parallel_threads.hpp"
#include "diffattn/core/version.hpp"
#include "diffattn/core/workspace.hpp"
#include "diffattn/kernels/attention.hpp"
#include "diffattn/kernels/attention_in_phases.hpp"
#include "diffattn/kernels/backward.hpp"
#include "diffattn/kernels/bias.hpp"
#include "diffattn/kernels/decode.hpp"
#include "diffattn/kernels/diff_attention.hpp"
#include "diffattn/kernels/gradients.hpp"
#include "diffattn/kernels/key_value_pages.hpp"
#include "diffattn/kernels/learned_bias.hpp"
#include "diffattn/kernels/mask.hpp"
#include "diffattn/kernels/options.hpp"
#include "diffattn/kernels/partial_attention.hpp"
#include "diffattn/kernels/reference.hpp"
#include "diffattn/kernels/softmax_statistics.hpp"
#include "diffattn/layers/attention_layer.hpp"
#include "diffattn/layers/attention_variant.hpp"
#include "diffattn/layers/batched_attention.hpp"
#include "diffattn/layers/cache_batch.hpp"
#include "diffattn/layers/cross_attention.hpp"
#include "diffattn/layers/frozen_matrix.hpp"
#include "diffattn/layers/initialization.hpp"
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
#include "diffattn/layers/sequences.hpp"
