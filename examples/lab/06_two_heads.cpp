// Question 6: could two ordinary heads have learned it? Transformers with the parts of a differential head that are no
// difference: its norm, its wide values, a sign for each head.

#include "parts/needle.hpp"

namespace {

void measure(const lab::NeedlePoint& at) {
  if (!at.progress.last()) return;
  at.measure_accuracy();
  at.measure_validation_loss();
}

}  // namespace

int main(int argc, char** argv) {
  lab::NeedleOptions options;
  options.models = {"transformer",      "differential",           "transformer-norm",          "transformer-wide",
                    "transformer-sign", "transformer-wide-value", "transformer-wide-sign-norm"};
  return lab::needle_program("Question 6 of the lab: whether ordinary heads learn what differential ones do.",
                             "two_heads", options, argc, argv, measure);
}
