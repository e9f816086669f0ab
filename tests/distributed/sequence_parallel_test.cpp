// One sequence over 1 to 4 ranks: what one rank computes of it, forward and backward, and what it costs to exchange.

#include "diffattn/distributed/sequence_parallel.hpp"

#include <mutex>

#include "diffattn/core/parallel_threads.hpp"
#include "diffattn/distributed/thread_communicator.hpp"
#include "distributed/expect.hpp"
#include "kernels/parts.hpp"
#include "support/catch.hpp"
#include "support/tolerances.hpp"

using namespace support;
using diffattn::Communicator;
using diffattn::SequenceParallel;
using diffattn::ThreadCommunicator;
using diffattn::Workspace;

namespace {

/// f(ranks) on `size` ranks of a sequence of `rows`; what each returns for its rows, put together, on rank 0.
template <typename F>
Matrix<float> on_ranks(Index size, Index rows, const F& f, Index key_heads = 1) {
  Matrix<float> whole;
  diffattn::run_ranks(size, [&](ThreadCommunicator& communicator) {
    diffattn::Serial serial;
    SequenceParallel ranks(communicator, rows, serial, key_heads);
    const Matrix<float> all = ranks.gather(f(ranks));
    if (communicator.rank() == 0) whole = all;
  });
  return whole;
}

template <typename Mask>
void check_spread(Index size, const ManyHeads& x, const Mask& mask, Index key_heads) {
  INFO(size << " ranks, " << x.q.rows() << " rows, " << x.heads.num_heads << " heads");
  const auto attend = [&](auto& ranks) {
    const auto& placement = ranks.placement();
    Workspace workspace;
    Matrix<float> out(placement.mine(), x.heads.num_heads * x.kDv);
    multihead_diff_attention_into(out, placement.rows_of(x.q), placement.rows_of(x.k), placement.rows_of(x.v),
                                  placement.rows_of(x.lambda), x.heads, mask, {}, workspace, ranks);
    return out;
  };
  const Matrix<float> out = on_ranks(size, x.q.rows(), attend, key_heads);
  CHECK(identical(out, on_ranks(size, x.q.rows(), attend, key_heads)));
  for (Index head = 0; head < x.heads.num_heads; ++head) {
    const Expected expected = x.expected(head, mask, true);
    CHECK(worst_error<float>(out.middleCols(head * x.kDv, x.kDv), expected.value, expected.magnitude) <= kErrorFactor);
  }
}

}  // namespace

TEST_CASE("Differential attention over ranks is that of one", "[distributed]") {
  for (const Index size : {1, 2, 3, 4}) {
    for (const Index rows : {4, 7, 61, 200}) {
      Rng rng = make_rng(static_cast<unsigned>(rows));
      check_spread(size, ManyHeads(rows, rows, {4, 2, 4}, 2, rng), RangeMask{CausalMask{}}, 1);
      check_spread(size, ManyHeads(rows, rows, {4, 2, 2}, 1, rng), RangeMask{SlidingWindowMask{5}}, 2);
      check_spread(size, ManyHeads(rows, rows, {3, 3, 3}, 2, rng), with_bias(RangeMask{CausalMask{}}, BiasOfHeads{}),
                   2);
    }
  }
}

TEST_CASE("Standard attention and a single differential head over ranks", "[distributed]") {
  Rng rng = make_rng();
  const ManyHeads x(90, 90, {4, 2, 4}, 1, rng, 1);
  const auto y = random_operands<float>({90, 90, 8, 12}, rng);
  const Matrix<float> standard = on_ranks(3, 90, [&](auto& ranks) {
    const auto& placement = ranks.placement();
    Workspace workspace;
    Matrix<float> out(placement.mine(), 4 * x.kDv);
    multihead_attention_into(out, placement.rows_of(x.q), placement.rows_of(x.k), placement.rows_of(x.v), x.heads,
                             CausalMask{}, {}, workspace, ranks);
    return out;
  });
  for (Index head = 0; head < 4; ++head) {
    const Expected expected = x.expected(head, CausalMask{}, false);
    CHECK(worst_error<float>(standard.middleCols(head * x.kDv, x.kDv), expected.value, expected.magnitude) <=
          kErrorFactor);
  }
  const Matrix<float> one_head = on_ranks(3, 90, [&](auto& ranks) {
    const auto& placement = ranks.placement();
    Workspace workspace;
    Matrix<float> out(placement.mine(), 12);
    diff_attention_into(out, placement.rows_of(y.q1), placement.rows_of(y.k1), placement.rows_of(y.q2),
                        placement.rows_of(y.k2), placement.rows_of(y.v), 0.75f, FullMask{}, {}, workspace, ranks);
    return out;
  });
  const Expected expected = expect_full(y, Vector<Exact>::Constant(90, 0.75L));
  CHECK(worst_error<float>(one_head, expected.value, expected.magnitude) <= kErrorFactor);
}

namespace {

struct SpreadGradients {
  Matrix<double> dq, dk, dv, dlambda, dbias;
};

void check_close(const Matrix<double>& a, const Matrix<double>& b) {
  REQUIRE(a.rows() == b.rows());
  REQUIRE(a.cols() == b.cols());
  if (a.size() == 0) return;
  CHECK((a - b).cwiseAbs().maxCoeff() <= 1e-12 * (1 + b.cwiseAbs().maxCoeff()));
}

/// λ a number (one of them in lambda) or one for every row and head.
template <bool kNumber, typename Mask>
void check_gradients(Index size, const Heads& heads, Index key_maps, const Mask& mask, Index table_cols) {
  constexpr Index kRows = 53, kD = 6, kDv = 5;
  INFO(size << " ranks, " << heads.num_heads << " heads, " << key_maps << " key maps");
  Rng rng = make_rng(5);
  const auto q = random_matrix<double>(kRows, heads.query_heads() * kD, rng),
             k = random_matrix<double>(kRows, heads.num_kv_heads * key_maps * kD, rng),
             v = random_matrix<double>(kRows, heads.num_kv_heads * kDv, rng),
             lambda = random_matrix<double>(kRows, heads.num_heads, rng),
             dout = random_matrix<double>(kRows, heads.num_heads * kDv, rng);
  const auto differentiate = [&](SpreadGradients& d, const auto& rows_of, auto& executor) {
    Workspace workspace;
    const Matrix<double> my_q = rows_of(q), my_k = rows_of(k), my_v = rows_of(v), my_lambda = rows_of(lambda),
                         my_dout = rows_of(dout);
    d.dq.resizeLike(my_q), d.dk.resizeLike(my_k), d.dv.resizeLike(my_v), d.dbias.setZero(heads.num_heads, table_cols);
    const auto into = [&](diffattn::DiffAttentionGradientViews<double> views, const auto& of_lambda) {
      if constexpr (diffattn::has_learned_bias<Mask>) views.dbias = diffattn::detail::writable_view_of(d.dbias);
      multihead_diff_attention_backward_into(views, my_q, my_k, my_v, of_lambda, my_dout, heads, mask, {}, workspace,
                                             executor);
    };
    if constexpr (kNumber) {
      d.dlambda.resize(1, 1);
      into({d.dq, d.dk, d.dv, d.dlambda(0, 0)}, 0.75);
    } else {
      d.dlambda.resizeLike(my_lambda);
      into({d.dq, d.dk, d.dv, d.dlambda}, my_lambda);
    }
  };
  SpreadGradients expected;
  diffattn::Serial serial;
  differentiate(
      expected, [](const auto& x) { return x; }, serial);
  diffattn::run_ranks(size, [&](ThreadCommunicator& communicator) {
    SequenceParallel ranks(communicator, kRows);
    SpreadGradients mine;
    differentiate(
        mine, [&](const auto& x) { return ranks.placement().rows_of(x); }, ranks);
    for (Matrix<double>* part : {&mine.dq, &mine.dk, &mine.dv}) *part = ranks.gather(*part);
    // Shares of what all ranks have alike.
    communicator.all_reduce(std::span<double>(mine.dbias.data(), static_cast<std::size_t>(mine.dbias.size())));
    if constexpr (kNumber) {
      communicator.all_reduce(std::span<double>(mine.dlambda.data(), 1));
    } else {
      mine.dlambda = ranks.gather(mine.dlambda);
    }
    if (communicator.rank() != 0) return;  // Catch2 is for one thread
    check_close(mine.dq, expected.dq);
    check_close(mine.dk, expected.dk);
    check_close(mine.dv, expected.dv);
    check_close(mine.dlambda, expected.dlambda);
    check_close(mine.dbias, expected.dbias);
  });
}

}  // namespace

TEST_CASE("Gradients over ranks are those of one", "[distributed]") {
  Rng rng = make_rng(6);
  const Matrix<double> table = random_matrix<double>(4, 9, rng);
  const auto learned = with_bias(CausalMask{}, diffattn::RelativeBias(table));
  for (const Index size : {1, 2, 3, 4}) {
    check_gradients<true>(size, {4, 2, 4}, 2, CausalMask{}, 0);
    check_gradients<false>(size, {4, 2, 2}, 2, CausalMask{}, 0);
    check_gradients<false>(size, {4, 2, 4}, 1, CausalMask{}, 0);
    check_gradients<true>(size, {4, 2, 4}, 2, learned, 9);
  }
}

TEST_CASE("Forward sends keys and values of a rank's rows to each other rank, and no more", "[distributed]") {
  constexpr Index kRows = 64;
  for (const Index size : {2, 4}) {
    Rng rng = make_rng(7);
    const ManyHeads x(kRows, kRows, {4, 2, 4}, 2, rng);
    diffattn::run_ranks(size, [&](ThreadCommunicator& communicator) {
      SequenceParallel ranks(communicator, kRows);
      const auto& placement = ranks.placement();
      const Matrix<float> q = placement.rows_of(x.q), k = placement.rows_of(x.k), v = placement.rows_of(x.v);
      Matrix<float> out(placement.mine(), 4 * x.kDv);
      Workspace workspace;
      const auto before = communicator.bytes_sent();
      multihead_diff_attention_into(out, q, k, v, 0.5f, x.heads, CausalMask{}, {}, workspace, ranks);
      const auto sent = communicator.bytes_sent() - before;
      // Beside them three words for what is checked before the work and after each key head.
      const auto others = static_cast<std::uint64_t>(size - 1), checks = 3 * 3 * sizeof(std::uint64_t);
      const auto numbers = static_cast<std::uint64_t>(placement.mine() * (k.cols() + v.cols()));
      if (communicator.rank() == 0) CHECK(sent == others * (numbers * sizeof(float) + checks));
    });
  }
}

namespace {

/// A mask that cannot go on from some row on.
struct ThrowingMask {
  Index from;

  KeyRange visible_keys(Index query, Index n_q, Index n_k) const {
    if (query >= from) throw std::runtime_error("no more");
    return CausalMask{}.visible_keys(query, n_q, n_k);
  }
};

/// What each of 3 ranks says that calls attention on a sequence of 12 rows, rank 1 with other arguments.
template <typename Call>
std::vector<std::string> errors_of_ranks(const Call& call) {
  std::vector<std::string> errors(3);
  diffattn::run_ranks(3, [&](ThreadCommunicator& communicator) {
    SequenceParallel ranks(communicator, 12);
    errors[static_cast<std::size_t>(communicator.rank())] = said_by([&] { call(ranks, communicator.rank() == 1); });
  });
  return errors;
}

}  // namespace

TEST_CASE("What is wrong on one rank is an error on all", "[distributed]") {
  const auto attend = [&](auto& ranks, Index rows, Heads heads, float lambda, const auto& mask,
                          const diffattn::AttentionOptions& options = {}) {
    const Matrix<float> q = Matrix<float>::Ones(rows, 16), v = Matrix<float>::Ones(rows, 8);
    Matrix<float> out(rows, 8);
    Workspace workspace;
    multihead_diff_attention_into(out, q, q, v, lambda, heads, mask, options, workspace, ranks);
  };
  using Errors = std::vector<std::string>;
  const Errors shape = errors_of_ranks([&](auto& ranks, bool odd) {
    attend(ranks, odd ? 5 : 4, {2, 2}, 0.5f, CausalMask{});
  });
  const std::string message = "multihead_diff_attention: q, of this rank's rows, must be 4 x 16, got 5 x 16";
  CHECK(shape == Errors{"rank 1: " + message, message, "rank 1: " + message});

  const Errors lambda = errors_of_ranks([&](auto& ranks, bool odd) {
    attend(ranks, 4, {2, 2}, odd ? 0.25f : 0.5f, CausalMask{});
  });
  for (const std::string& error : lambda) {
    CHECK(error == "multihead_diff_attention: ranks disagree on lambda: rank 0 has 0.5, rank 1 has 0.25");
  }
  const Errors window = errors_of_ranks([&](auto& ranks, bool odd) {
    attend(ranks, 4, {2, 2}, 0.5f, both(CausalMask{}, SlidingWindowMask{odd ? 3 : 4}));
  });
  for (const std::string& error : window) {
    CHECK(error == "multihead_diff_attention: ranks disagree on the window of the mask: rank 0 has 4, rank 1 has 3");
  }
  const Errors scale = errors_of_ranks([&](auto& ranks, bool odd) {
    attend(ranks, 4, {2, 2}, 0.5f, CausalMask{}, {.scale = odd ? 0.125 : 0.5});
  });
  for (const std::string& error : scale) {
    CHECK(error == "multihead_diff_attention: ranks disagree on the scale: rank 0 has 0.5, rank 1 has 0.125");
  }
  const Errors heads = errors_of_ranks([&](auto& ranks, bool odd) {
    attend(ranks, 4, odd ? Heads{1, 1} : Heads{2, 2}, 0.5f, CausalMask{});
  });
  for (const std::string& error : heads) {
    CHECK(error == "multihead_diff_attention: ranks disagree on num_heads: rank 0 has 2, rank 1 has 1");
  }
  // Rank 0 alone has the last rows.
  const Errors thrown = errors_of_ranks([&](auto& ranks, bool) { attend(ranks, 4, {2, 2}, 0.5f, ThrowingMask{10}); });
  CHECK(thrown == Errors{"no more", "rank 0: no more", "rank 0: no more"});
}

TEST_CASE("A sequence with fewer rows than ranks is refused", "[distributed]") {
  std::vector<std::string> errors(3);
  diffattn::run_ranks(3, [&](ThreadCommunicator& communicator) {
    errors[static_cast<std::size_t>(communicator.rank())] = said_by([&] { SequenceParallel(communicator, 2); });
  });
  CHECK(errors[0] ==
        "SequencePlacement: a sequence of 2 rows cannot be spread over 3 ranks: each must have one row at least");
  for (const std::size_t rank : {1u, 2u}) CHECK(errors[rank].find("spread over 3 ranks") != std::string::npos);
}
