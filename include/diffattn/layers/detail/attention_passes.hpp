#pragma once

// What an attention layer does going forward, whichever variant it is, for stacked sequences, with keys and values of x
// itself or of a memory. What it does behind a cache is in cached_attention.hpp, the way back in attention_gradients.hpp.
// AttentionLayer and CrossAttention have checked what comes here.
//
//   x → project → turn (rotary) → attend → finish → y
//
// With a memory, x → project_queries and memory → project_memory stand in the place of project. In bfloat16
// (arithmetic.hpp), attend rounds q, k and v once, behind turn.

#include <array>
#include <optional>
#include <type_traits>

#include "diffattn/core/matrix.hpp"
#include "diffattn/core/parallel.hpp"
#include "diffattn/core/workspace.hpp"
#include "diffattn/kernels/attention.hpp"
#include "diffattn/kernels/diff_attention.hpp"
#include "diffattn/kernels/options.hpp"
#include "diffattn/layers/arithmetic.hpp"
#include "diffattn/layers/attention_variant.hpp"
#include "diffattn/layers/detail/attention_tape.hpp"
#include "diffattn/layers/detail/rounded_rows.hpp"
#include "diffattn/layers/detail/sequences.hpp"
#include "diffattn/layers/linear.hpp"
#include "diffattn/layers/linear_group.hpp"
#include "diffattn/layers/parameters.hpp"
#include "diffattn/layers/rotary.hpp"
#include "diffattn/layers/sequences.hpp"

namespace diffattn::inline v0_1::detail {

template <typename Variant>
class AttentionPasses : public Variant {
 public:
  using Scalar = typename Variant::Scalar;
  using Config = typename Variant::Config;
  using WeightMatrix = typename Variant::WeightMatrix;
  using Projection = Linear<Scalar, WeightMatrix>;

  /// For visit_parameters: q_proj, k_proj, v_proj, then the variant's.
  template <typename Self, typename Visitor>
  static void visit(Self& self, Visitor& visitor) {
    visit_part("q_proj", self.q_proj, visitor);
    visit_part("k_proj", self.k_proj, visitor);
    visit_part("v_proj", self.v_proj, visitor);
    Variant::visit(self, visitor);
  }

  struct Tape : AttentionTape<Scalar> {};

  /// The heads as the kernels are told of them.
  Heads heads() const { return configured_heads(config_); }
  /// Which packed head of the queries is that of a map, 0 or 1, of a head: rows query_head(…) · head_dim on of
  /// q_proj.weight. Heads that share their second map have the same for it.
  Index query_head(Index head, Index map) const { return heads().query_head(head, map, Variant::kQueryMaps); }

 protected:
  explicit AttentionPasses(const Config& config)
      : Variant(config),
        config_(config),
        q_proj(config.embed_dim, configured_heads(config).query_heads(Variant::kQueryMaps) * config.head_dim,
               config.bias, arithmetic_of(config)),
        k_proj(config.embed_dim, config.num_kv_heads * Variant::kKeyMaps * config.head_dim, config.bias,
               arithmetic_of(config)),
        v_proj(config.embed_dim, config.num_kv_heads * Variant::value_dim(config), config.bias, arithmetic_of(config)),
        rotary_(make_rotary<Scalar>(config.rotary, config.head_dim)) {
    shape_ = {config.embed_dim, config.num_heads, config.num_kv_heads, config.head_dim, parameter_count(*this)};
    (this->*Variant::kOutput).arithmetic = arithmetic_of(config);
  }

  /// Whether attention of so many queries, with an executor of this type, multiplies in bfloat16. A few read keys and
  /// values once, which takes the same time in float; and there are no parts of attention in bfloat16, which ranks that
  /// share a sequence or a cache exchange.
  template <typename E>
  bool attends_in_bfloat16(Index queries) const {
    return may_attend_in_bfloat16<E> && arithmetic_of(config_) == Arithmetic::bfloat16 && queries > kFewRows;
  }
  template <typename E>
  static constexpr bool may_attend_in_bfloat16 = may_multiply_bfloat16<Scalar, WeightMatrix> && !spreads_sequences<E>;

  static constexpr bool kTokenLambda = Variant::kLambda == LambdaSource::token;
  static_assert((Variant::kQueryMaps == 1) == (Variant::kLambda == LambdaSource::none),
                "diffattn: a variant has a lambda when, and only when, its heads are the difference of two maps");

  using Rows = MatrixMap<Scalar>;
  using Input = ConstStridedMap<Scalar>;
  using Output = StridedMap<Scalar>;

  /// What the heads read and write, a token a row, on the tape or in the workspace.
  struct Parts {
    Rows q, k, v, lambda, attended;
  };

  /// Room for as many queries and keys, on the tape or in the workspace.
  Parts room_for(Index queries, Index keys, Tape* tape, Workspace& workspace) const {
    const auto part = [&](Matrix<Scalar> AttentionTape<Scalar>::*member, Index rows, Index cols) {
      if (tape == nullptr) return Rows(workspace.take<Scalar>(rows * cols), rows, cols);
      (tape->*member).resize(rows, cols);
      return Rows((tape->*member).data(), rows, cols);
    };
    return {part(&Tape::q, queries, q_proj.weight.rows()), part(&Tape::k, keys, k_proj.weight.rows()),
            part(&Tape::v, keys, v_proj.weight.rows()),
            part(&Tape::lambda, queries, kTokenLambda ? config_.num_heads : 0),
            part(&Tape::attended, queries, (this->*Variant::kOutput).weight.cols())};
  }

  using To = LinearOutput<Scalar, WeightMatrix>;

  /// x to queries and, where the variant has one a token, λ; `others` read x, too.
  template <typename E, typename... Others>
  void project_queries(const Input& x, Parts& parts, Workspace& workspace, E& executor, const Others&... others) const {
    const To q{q_proj, parts.q};
    if constexpr (kTokenLambda) {
      linear_forward_all(std::array{q, others..., To{this->lambda_proj, parts.lambda}}, x, workspace, executor);
      // One at a time: packets of several numbers round otherwise, and a token must not depend on its company.
      for (Index i = 0; i < parts.lambda.size(); ++i) {
        parts.lambda.data()[i] = Variant::lambda_of(parts.lambda.data()[i]);
      }
    } else {
      linear_forward_all(std::array{q, others...}, x, workspace, executor);
    }
  }

  /// x to all that attention to x itself needs, with threads woken once.
  template <typename E>
  void project(const Input& x, Parts& parts, Workspace& workspace, E& executor) const {
    project_queries(x, parts, workspace, executor, To{k_proj, parts.k}, To{v_proj, parts.v});
  }

  /// A memory to keys and values.
  template <typename E>
  void project_memory(const Input& memory, Parts& parts, Workspace& workspace, E& executor) const {
    linear_forward_all(std::array{To{k_proj, parts.k}, To{v_proj, parts.v}}, memory, workspace, executor);
  }

  /// What the heads have attended to, to y.
  template <typename E>
  void finish(const Output& y, Rows& attended, bool keep_attended, Workspace& workspace, E& executor) const {
    if constexpr (!Variant::kFinishesHeads) {
      (this->*Variant::kOutput).forward_into(y, attended, workspace, executor);
    } else {
      Rows finished(keep_attended ? workspace.take<Scalar>(attended.size()) : attended.data(), attended.rows(),
                    attended.cols());
      finish_all_heads(finished, attended.data(), workspace, executor);
      (this->*Variant::kOutput).forward_into(y, finished, workspace, executor);
    }
  }

  /// finish_heads, for which a head is a row.
  template <typename E>
  void finish_all_heads(Rows& finished, const Scalar* attended, Workspace& workspace, E& executor) const {
    auto y = heads_of(finished.data(), finished.rows());
    this->finish_heads(y, heads_of(attended, finished.rows()), workspace, executor);
  }

  /// The results of n tokens, one head a row.
  template <typename T>
  auto heads_of(T* results, Index n) const {
    using Results = std::conditional_t<std::is_const_v<T>, const Matrix<Scalar>, Matrix<Scalar>>;
    return Eigen::Map<Results>(results, n * config_.num_heads, Variant::value_dim(config_));
  }

  /// The λ of `count` tokens from `first` on: a number, or one for each of them and each head.
  template <typename Lambda>
  auto lambda_of_rows(Lambda& all_rows, Index first, Index count) const {
    if constexpr (kTokenLambda) {
      return rows_of(all_rows, first, count);
    } else {
      return this->lambda_value();
    }
  }

  /// Turns the queries and keys of a sequence, or their gradients back; the first of both stand at `position`.
  template <typename E>
  void turn(Parts& parts, const SequenceRows& rows, Index position, E& executor, Turn turn = Turn::forward) const {
    for_each_run(executor, rows.count, position, [&](Index first, Index count, Index at) {
      const Index keys = spreads_sequences<E> ? count : rows.num_keys;
      const HeadRows<Scalar> q{parts.q, parts.q.cols() / config_.head_dim, rows.first + first, count};
      const HeadRows<Scalar> k{parts.k, parts.k.cols() / config_.head_dim, rows.first_key + first, keys};
      rotate_rows(rotary_, q, k, at, executor, turn);
    });
  }

  /// y = layer(x), each sequence by itself.
  template <typename Mask, typename E>
  void attend_to_sequences(const Output& y, const Input& x, const Mask& mask, const SequenceLengths& lengths,
                           Tape* tape, Workspace& workspace, E& executor) const {
    const auto frame = workspace.frame();
    Parts parts = room_for(x.rows(), x.rows(), tape, workspace);
    project(x, parts, workspace, executor);
    attend(y, parts, mask, lengths, lengths, tape != nullptr, workspace, executor);
  }

  /// y = layer(x, memory), each sequence of x with that of the memory.
  template <typename Mask, typename E>
  void attend_to_memory(const Output& y, const Input& x, const Input& memory, const Mask& mask,
                        const SequenceLengths& lengths, const SequenceLengths& memory_lengths, Tape* tape,
                        Workspace& workspace, E& executor) const {
    static_assert(!spreads_sequences<E>, "diffattn: ranks share the sequence that a layer attends to, not a memory");
    const auto frame = workspace.frame();
    Parts parts = room_for(x.rows(), memory.rows(), tape, workspace);
    project_queries(x, parts, workspace, executor);
    project_memory(memory, parts, workspace, executor);
    attend(y, parts, mask, lengths, memory_lengths, tape != nullptr, workspace, executor);
  }

  /// From what has been projected to y.
  template <typename Mask, typename E>
  void attend(const Output& y, Parts& parts, const Mask& mask, const SequenceLengths& lengths,
              const SequenceLengths& key_lengths, bool keep_attended, Workspace& workspace, E& executor) const {
    for_each_sequence(lengths, key_lengths, workspace, executor, [&](SequenceRows rows, auto& share, auto& own) {
      turn(parts, rows, 0, own);
      attend_rows(parts, rows, mask, share, own);
    });
    finish(y, parts.attended, keep_attended, workspace, executor);
  }

  /// From queries and keys that have been turned to parts.attended, of one sequence.
  template <typename Mask, typename E>
  void attend_rows(Parts& parts, const SequenceRows& rows, const Mask& mask, Workspace& workspace, E& executor) const {
    const auto of_keys = [&](Rows& part) { return rows_of(part, rows.first_key, rows.num_keys); };
    const auto q = rows_of(parts.q, rows.first, rows.count), k = of_keys(parts.k), v = of_keys(parts.v);
    if constexpr (may_attend_in_bfloat16<E>) {
      if (attends_in_bfloat16<E>(rows.count)) {
        const auto frame = workspace.frame();
        return attend_heads(parts, rows, rounded_rows(q, workspace, executor), rounded_rows(k, workspace, executor),
                            rounded_rows(v, workspace, executor), mask, workspace, executor);
      }
    }
    attend_heads(parts, rows, q, k, v, mask, workspace, executor);
  }

  /// The same, of operands that are multiplied as they are.
  template <typename Operand, typename Mask, typename E>
  void attend_heads(Parts& parts, const SequenceRows& rows, const MatrixMap<Operand>& q, const MatrixMap<Operand>& k,
                    const MatrixMap<Operand>& v, const Mask& mask, Workspace& workspace, E& executor) const {
    const auto attended = rows_of(parts.attended, rows.first, rows.count);
    if constexpr (Variant::kLambda == LambdaSource::none) {
      multihead_attention_into(attended, q, k, v, heads(), mask, AttentionOptions{}, workspace, executor);
    } else {
      multihead_diff_attention_into(attended, q, k, v, lambda_of_rows(parts.lambda, rows.first, rows.count), heads(),
                                    mask, AttentionOptions{}, workspace, executor);
    }
  }

  Config config_;
  AttentionShape shape_;

 public:
  Projection q_proj;  ///< heads().query_heads(kQueryMaps) · head_dim x embed_dim
  Projection k_proj;  ///< num_kv_heads · kKeyMaps · head_dim x embed_dim
  Projection v_proj;  ///< num_kv_heads · value_dim x embed_dim

 private:
  std::optional<Rotary<Scalar>> rotary_;
};

}  // namespace diffattn::inline v0_1::detail
