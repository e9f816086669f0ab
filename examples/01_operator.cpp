// What you learn here: differential attention as a function on Eigen matrices. How to call it, what λ and the masks do,
// that any strided block will do as an operand, and how far the fast kernel is from the plain reference.

#include <cstdio>
#include <cstdlib>
#include <diffattn/diffattn.hpp>
#include <stdexcept>

using diffattn::Index;

namespace {

double distance(const Eigen::MatrixXf& a, const Eigen::MatrixXf& b) { return (a - b).cwiseAbs().maxCoeff(); }

bool all_small = true;

void report(const char* what, double value, double limit) {
  all_small = all_small && value <= limit;
  std::printf("  %-66s %8.1e\n", what, value);
}

}  // namespace

int main() {
  std::srand(1);  // Eigen's Random() draws from rand()
  const Index n_q = 50, n_k = 200, d = 64, dv = 128;
  const Eigen::MatrixXf q1 = Eigen::MatrixXf::Random(n_q, d), q2 = Eigen::MatrixXf::Random(n_q, d);
  const Eigen::MatrixXf k1 = Eigen::MatrixXf::Random(n_k, d), k2 = Eigen::MatrixXf::Random(n_k, d);
  const Eigen::MatrixXf v = Eigen::MatrixXf::Random(n_k, dv);
  const double lambda = 0.8;

  // (softmax(q1 k1ᵀ/√d) − λ·softmax(q2 k2ᵀ/√d)) v, one token per row.
  const auto out = diffattn::diff_attention(q1, k1, q2, k2, v, lambda);
  std::printf("%ld queries, %ld keys, d = %ld, values %ld wide, lambda = %.1f: output %ld x %ld\n\n", n_q, n_k, d, dv,
              lambda, out.rows(), out.cols());

  std::printf("Largest absolute difference to the reference, values in [-1, 1], float:\n");
  namespace reference = diffattn::reference;
  report("every query sees every key (FullMask, the default)",
         distance(out, reference::diff_attention(q1, k1, q2, k2, v, lambda)), 1e-6);

  // The last query stands at the last key, so query i sees keys up to i + n_k − n_q.
  const diffattn::CausalMask causal;
  report("no query sees the future (CausalMask)",
         distance(diffattn::diff_attention(q1, k1, q2, k2, v, lambda, causal),
                  reference::diff_attention(q1, k1, q2, k2, v, lambda, causal)),
         1e-6);

  const auto window = diffattn::with_bias(diffattn::SlidingWindowMask{32}, diffattn::AlibiBias{0.125});
  report("the last 32 keys, nearer ones preferred (SlidingWindowMask, ALiBi)",
         distance(diffattn::diff_attention(q1, k1, q2, k2, v, lambda, window),
                  reference::diff_attention(q1, k1, q2, k2, v, lambda, window)),
         1e-6);

  const Eigen::VectorXf lambdas = Eigen::VectorXf::LinSpaced(n_q, -0.5f, 1.5f);  // any number is legal
  report("one lambda for every query, from -0.5 to 1.5",
         distance(diffattn::diff_attention(q1, k1, q2, k2, v, lambdas),
                  reference::diff_attention(q1, k1, q2, k2, v, lambdas)),
         1e-6);

  std::printf("\nLaws, checked on the kernel itself:\n");
  report("lambda = 0 is standard attention",
         distance(diffattn::diff_attention(q1, k1, q2, k2, v, 0.0), diffattn::attention(q1, k1, v)), 1e-6);
  report("two equal maps and lambda = 1 cancel", diffattn::diff_attention(q1, k1, q1, k1, v, 1.0).cwiseAbs().maxCoeff(),
         1e-6);
  const Eigen::MatrixXf ones = Eigen::MatrixXf::Ones(n_k, 1);
  report("rows of the difference sum to 1 - lambda: values of one give that",
         (diffattn::diff_attention(q1, k1, q2, k2, ones, lambda).array() - float(1 - lambda)).abs().maxCoeff(), 1e-6);

  // Operands are read where they lie: here as blocks of one packed matrix. The result goes into a block, too.
  Eigen::MatrixXf packed(n_k, 4 * d + dv), wide = Eigen::MatrixXf::Zero(n_k, 2 * dv);
  packed << Eigen::MatrixXf::Random(n_k, 2 * d), k1, k2, v;
  packed.leftCols(d).bottomRows(n_q) = q1;
  packed.middleCols(d, d).bottomRows(n_q) = q2;
  diffattn::diff_attention_into(wide.rightCols(dv).topRows(n_q), packed.leftCols(d).bottomRows(n_q),
                                packed.middleCols(2 * d, d), packed.middleCols(d, d).bottomRows(n_q),
                                packed.middleCols(3 * d, d), packed.rightCols(dv), lambda);
  report("strided blocks in and out give the same", distance(wide.rightCols(dv).topRows(n_q), out), 1e-6);

  try {
    diffattn::diff_attention(q1, k1, q2, k2.leftCols(8), v, lambda);
    all_small = false;
  } catch (const diffattn::ShapeError& error) {
    std::printf("\nA wrong shape is refused before any work:\n  %s\n", error.what());
  }
  return all_small ? EXIT_SUCCESS : EXIT_FAILURE;
}
