#pragma once

// What the arguments of an attention layer's functions must be, checked before any work, and what of them a tape keeps.

#include <cstddef>
#include <type_traits>
#include <vector>

#include "diffattn/core/error.hpp"
#include "diffattn/core/matrix.hpp"
#include "diffattn/kernels/mask.hpp"
#include "diffattn/layers/detail/attention_gradients.hpp"
#include "diffattn/layers/detail/sequences.hpp"
#include "diffattn/layers/kv_cache.hpp"
#include "diffattn/layers/sequences.hpp"

namespace diffattn::inline v0_1::detail {

template <typename Variant>
class AttentionArguments : public AttentionGradients<Variant> {
  using Passes = AttentionGradients<Variant>;

 public:
  using typename Passes::Scalar, typename Passes::Tape;

 protected:
  using Passes::config_, Passes::shape_, Passes::Passes;

  template <typename Y, typename X>
  void check_tokens(const Eigen::MatrixBase<Y>& y, const Eigen::MatrixBase<X>& x) const {
    static_assert(std::is_same_v<typename X::Scalar, Scalar> && std::is_same_v<typename Y::Scalar, Scalar>,
                  "diffattn: x and y must have the scalar type of the layer; convert with .template cast<>()");
    detail::check_tokens(Variant::kName, config_.embed_dim, x.rows(), x.cols(), y.rows(), y.cols());
  }

  template <typename M>
  void check_memory(const Eigen::MatrixBase<M>& memory) const {
    static_assert(std::is_same_v<typename M::Scalar, Scalar>,
                  "diffattn: memory must have the scalar type of the layer; convert with .template cast<>()");
    check_width(Variant::kName, "memory", config_.embed_dim, memory.rows(), memory.cols());
  }

  template <typename Y, typename X, typename Mask, typename E>
  void check_sequences(const Eigen::MatrixBase<Y>& y, const Eigen::MatrixBase<X>& x, const Mask& mask,
                       const SequenceLengths& lengths, E& executor) const {
    check_before(executor, Variant::kName, [&] {
      check_tokens(y, x);
      check_lengths(Variant::kName, lengths, x.rows());
      if constexpr (spreads_sequences<E>) {
        const Index all = executor.check_sequence(Variant::kName, lengths.size(), x.rows());
        check_mask(Variant::kName, mask, config_.num_heads, all, all);
      } else {
        check_mask_of_each(mask, lengths, lengths);
      }
    });
  }

  /// The same where keys and values come from a memory.
  template <typename Y, typename X, typename M, typename Mask>
  void check_sequences(const Eigen::MatrixBase<Y>& y, const Eigen::MatrixBase<X>& x, const Eigen::MatrixBase<M>& memory,
                       const Mask& mask, const SequenceLengths& lengths, const SequenceLengths& memory_lengths) const {
    check_tokens(y, x);
    check_memory(memory);
    check_lengths(Variant::kName, lengths, x.rows());
    check_lengths(Variant::kName, memory_lengths, memory.rows(), "memory");
    if (lengths.size() != memory_lengths.size()) {
      throw_shape({Variant::kName, ": every sequence needs its memory: lengths has ", lengths.size(),
                   " sequences, memory_lengths ", memory_lengths.size()});
    }
    check_mask_of_each(mask, lengths, memory_lengths);
  }

  /// Of a cache for rows of a sequence that ranks share: that it holds nothing yet.
  template <typename Storage>
  void check_prefill(const KvCache<Storage>& cache) const {
    if (cache.empty()) return;
    throw_invalid({Variant::kName, ": a sequence whose rows ranks share goes into an empty cache, got one that has ",
                   cache.position(), " tokens; did you mean CacheParallel, for what follows?"});
  }

  /// Of a cache that is to hold a memory: that it has no window, which would take some of it away.
  template <typename Storage>
  void check_memory_cache(const KvCache<Storage>& cache) const {
    if (!cache.options().window) return;
    throw_invalid({Variant::kName, ": the cache of a memory must have no window, got one of ", *cache.options().window,
                   " tokens; did you mean a PaddingMask?"});
  }

  /// Of a cache whose memory is to be read: that one was written, and by a layer of this shape.
  template <typename Storage>
  void check_written(const KvCache<Storage>& cache) const {
    check_memory_cache(cache);
    if (cache.packed().shape.heads == 0) {
      throw_invalid({Variant::kName, ": no memory has been written to the cache; call write_memory(memory, cache)"});
    }
    cache.template check_shape<Scalar>(Variant::kName, config_.num_kv_heads, Variant::kKeyMaps, config_.head_dim,
                                       Variant::value_dim(config_));
  }

  /// Keeps the arguments of a forward pass, checked, on a tape.
  template <typename X, typename Mask>
  void record(Tape& tape, const Eigen::MatrixBase<X>& x, const Mask& mask, const SequenceLengths& lengths) const {
    keep(tape.x, x);
    copy_lengths(tape.lengths, lengths);
    tape.mask.remember(mask);
    tape.shape = shape_;
    tape.of_memory = false;
  }

  /// The same with a memory.
  template <typename X, typename M, typename Mask>
  void record(Tape& tape, const Eigen::MatrixBase<X>& x, const Eigen::MatrixBase<M>& memory, const Mask& mask,
              const SequenceLengths& lengths, const SequenceLengths& memory_lengths) const {
    record(tape, x, mask, lengths);
    keep(tape.memory, memory);
    copy_lengths(tape.memory_lengths, memory_lengths);
    tape.of_memory = true;
  }

  template <typename DX, typename DY, typename E>
  void check_backward(const Eigen::MatrixBase<DX>& dx, const Eigen::MatrixBase<DY>& dy, const Tape& tape,
                      const AttentionArguments& grad, E& executor) const {
    check_before(executor, Variant::kName, [&] {
      check_backward(dx, dy, tape, grad, false);
      if constexpr (spreads_sequences<E>) {
        executor.check_sequence(Variant::kName, static_cast<Index>(tape.lengths.size()), tape.x.rows());
      }
    });
  }

  template <typename DX, typename DY>
  void check_backward(const Eigen::MatrixBase<DX>& dx, const Eigen::MatrixBase<DY>& dy, const Tape& tape,
                      const AttentionArguments& grad, bool of_memory) const {
    static_assert(std::is_same_v<typename DX::Scalar, Scalar> && std::is_same_v<typename DY::Scalar, Scalar>,
                  "diffattn: dx and dy must have the scalar type of the layer; convert with .template cast<>()");
    check_tape(tape, grad.shape_, of_memory);
    check_shape(Variant::kName, "dy", dy, tape.x.rows(), config_.embed_dim);
    check_shape(Variant::kName, "dx", dx, tape.x.rows(), config_.embed_dim);
  }

  /// dbias as differentiate() takes it: what a tape's mask has a gradient for.
  template <typename DB>
  StridedView<Scalar> checked_bias_gradient(const Eigen::MatrixBase<DB>& dbias, const Tape& tape) const {
    static_assert(std::is_same_v<typename DB::Scalar, Scalar>,
                  "diffattn: dbias must have the scalar type of the layer");
    constexpr const char* where = Variant::kName;
    if (tape.mask.learned_biases() == 0) {
      throw_invalid({where, ": dbias is the gradient of a learned bias, and the mask that the tape keeps has none"});
    }
    if (tape.mask.learned_biases() > 1) {
      throw_invalid({where, ": the mask that the tape keeps has two learned biases; only one can have a gradient"});
    }
    check_shape(where, "dbias", dbias, tape.mask.table_rows(), tape.mask.table_cols());
    return writable_view_of(dbias);
  }

  template <typename M>
  static auto input_of(const M& matrix) {
    return map_of(view_of(matrix));
  }
  template <typename Y>
  static auto output_of(const Eigen::MatrixBase<Y>& y) {
    return map_of(writable_view_of(y));
  }

 private:
  template <typename Mask>
  void check_mask_of_each(const Mask& mask, const SequenceLengths& lengths, const SequenceLengths& key_lengths) const {
    for (Index s = 0; s < lengths.size(); ++s) {
      check_mask(Variant::kName, mask, config_.num_heads, lengths[s], key_lengths[s]);
    }
  }

  void check_tape(const Tape& tape, const AttentionShape& grad, bool of_memory) const {
    constexpr const char* where = Variant::kName;
    constexpr const char *kForward = "forward(x, mask, tape)", *kCross = "forward_cross(x, memory, mask, tape)";
    if (!tape.filled) {
      throw_invalid({where, of_memory ? ": backward_cross" : ": backward", " needs a tape that ",
                     of_memory ? kCross : kForward, " has filled"});
    }
    if (tape.of_memory != of_memory) {
      throw_invalid({where, ": the tape was filled by ", tape.of_memory ? kCross : kForward, "; call ",
                     tape.of_memory ? "backward_cross" : "backward", "(dy, tape, grad)"});
    }
    if (tape.shape != shape_) throw_invalid({where, ": the tape was filled by a layer of another configuration"});
    if (grad != shape_) throw_invalid({where, ": grad must be a layer of the same configuration"});
  }

  static void copy_lengths(std::vector<Index>& to, const SequenceLengths& lengths) {
    to.resize(static_cast<std::size_t>(lengths.size()));
    for (Index s = 0; s < lengths.size(); ++s) to[static_cast<std::size_t>(s)] = lengths[s];
  }
};

}  // namespace diffattn::inline v0_1::detail
