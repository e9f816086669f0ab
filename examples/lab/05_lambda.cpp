// Question 5: what does λ do? λ of every layer through training, and what becomes of recall without λ's form, with another
// λ_init, without the head norm or its factor, and with λ forced to 0 in the trained model.

#include <diffattn/training/cross_entropy.hpp>

#include "parts/needle.hpp"

namespace {

void measure(const lab::NeedlePoint& at) {
  const std::vector<double> lambdas = at.model.lambdas(test_batch(at.options, at.options.recall.contexts.back(), 1));
  for (std::size_t layer = 0; layer < lambdas.size(); ++layer) {
    at.measure("lambda", lambdas[layer], {{"layer", std::to_string(layer)}});
  }
  if (!at.progress.last()) return;
  at.measure_accuracy();
  at.measure_validation_loss();
  if (!at.model.force_lambda(0)) return;
  for (const lab::Index context : at.options.tested()) {
    const lab::TaskBatch batch = test_batch(at.options, context, 1);
    const lab::Matrix<float>& logits = at.model.logits(batch, at.pool);
    const lab::Fields fields = {{"context", std::to_string(context)}};
    at.measure("accuracy_lambda_0", accuracy(logits, batch), fields);
    at.measure("loss_lambda_0", diffattn::cross_entropy(logits, batch.targets).mean, fields);
  }
}

}  // namespace

int main(int argc, char** argv) {
  lab::NeedleOptions options;
  options.models = lab::kLambdaModels;
  return lab::needle_program("Question 5 of the lab: what λ does, and what becomes of recall without it.", "lambda",
                             options, argc, argv, measure);
}
