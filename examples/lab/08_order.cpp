// Question 8: classification from examples in the context: accuracy by the number of examples, and of the best and the
// worst of ten orders of the same examples.

#include <CLI/CLI.hpp>
#include <cstdio>
#include <diffattn/training/cross_entropy.hpp>
#include <utility>

#include "parts/options.hpp"
#include "parts/order_measures.hpp"
#include "parts/training.hpp"

namespace {

using namespace lab;

struct OrderOptions : Options {
  OrderConfig task;
  OrderTest test;
  Index batch = 32;
  Index batches = 16;  ///< of the accuracy by examples

  OrderOptions() {
    models = {"transformer", "differential"};
    learning_rates = {3e-3, 6e-3};
    steps = 1500;
    task.quiet = 700;
  }

  void declare(CLI::App& app) {
    Options::declare(app);
    const auto up_to = [](long most) { return CLI::Range(1L, most); };
    app.add_option("--batch", batch, "sequences a step")->check(up_to(4096))->capture_default_str();
    app.add_option("--groups", task.groups, "of items")->check(up_to(1024))->capture_default_str();
    app.add_option("--members", task.members, "items of a group")->check(up_to(1024))->capture_default_str();
    app.add_option("--labels", task.labels)->check(up_to(1024))->capture_default_str();
    app.add_option("--shots", task.shots, "examples of a sequence")
        ->check(CLI::Range(2L, 4096L))
        ->capture_default_str();
    app.add_option("--quiet", task.quiet, "steps at the beginning without such examples")
        ->check(CLI::NonNegativeNumber)
        ->capture_default_str();
    app.add_option("--noise", task.noise, "part of the examples that show a label at random")
        ->check(CLI::Range(0.0, 1.0))
        ->capture_default_str();
  }

  /// What --smoke makes of it.
  void shrink() {
    if (!smoke) return;
    seeds = {1};
    learning_rates = {4e-3};
    steps = 3;
    batch = 2;
    task = {.groups = 2, .members = 2, .labels = 2, .shots = 4};
    test = {.sets = 2, .orders = 2};
    batches = 1;
  }

  Fields configuration() const {
    const auto text = [](Index number) { return std::to_string(number); };
    return {{"layers", text(layers)},        {"width", text(width)},        {"head_dim", text(head_dim)},
            {"steps", text(steps)},          {"batch", text(batch)},        {"groups", text(task.groups)},
            {"members", text(task.members)}, {"labels", text(task.labels)}, {"of_shots", text(task.shots)},
            {"noise", text_of(task.noise)},  {"quiet", text(task.quiet)}};
  }
};

void measure(const OrderOptions& options, const Run& run, Model& model, OrderTask& task, MeasurementFile& file,
             diffattn::ThreadPool& pool) {
  const Index parameters = model.parameters();
  const std::vector<double> by_shots = accuracy_by_shots(model, task, options.batches, pool);
  double sum = 0;
  for (std::size_t shots = 0; shots < by_shots.size(); ++shots) {
    sum += by_shots[shots];
    if ((shots & (shots - 1)) != 0 && shots + 1 != by_shots.size()) continue;  // 0, 1, 2, 4, … and the last
    file.measure(run, parameters, "accuracy", by_shots[shots], {{"shots", std::to_string(shots)}});
  }
  TaskBatch choosing;
  task.draw(choosing, 2000, 0);
  file.measure(run, parameters, "validation_loss",
               diffattn::cross_entropy(model.logits(choosing, pool), choosing.targets).mean);
  for (const auto& [arrangement, name] :
       {std::pair(Arrangement::random, "random"), std::pair(Arrangement::by_label, "by_label")}) {
    const OrderAccuracy accuracy = order_accuracy(model, task, arrangement, options.test, pool);
    const Fields fields = {{"arrangement", name}};
    file.measure(run, parameters, "order_mean", accuracy.mean, fields);
    file.measure(run, parameters, "order_best", accuracy.best, fields);
    file.measure(run, parameters, "order_worst", accuracy.worst, fields);
    file.measure(run, parameters, "order_margin", accuracy.margin(), fields);
  }
}

void measure_all(OrderOptions options) {
  options.shrink();
  options.task.batch = options.batch;
  OrderTask task(options.task);
  OrderConfig test_config = options.task;
  test_config.quiet = 0;
  OrderTask test(test_config);
  Budget budget(options.minutes);
  diffattn::ThreadPool pool(options.threads);
  MeasurementFile file(options.out, "order", options.configuration());
  std::string made_with = "order;";
  for (const auto& [key, value] : options.configuration()) made_with += key + "=" + value + ";";
  for (const std::uint64_t seed : options.seeds) {
    for (const double rate : options.learning_rates) {
      for (const std::string& name : options.models) {
        const Run run{.model = name, .seed = seed, .fields = {{"learning_rate", text_of(rate)}}};
        if (file.has(run)) continue;
        Plan plan = plan_of(options, name, task.vocab_size(), seed, rate, made_with);
        plan.measure_every = plan.steps;
        plan.folder = options.out / "order_models";
        train(plan, task, budget, pool, [&](Model& model, const Progress& progress) {
          if (progress.last()) measure(options, run, model, test, file, pool);
        });
        file.finish(run);
        std::printf("order: %s is measured\n", run.identity().c_str());
        std::fflush(stdout);
      }
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  OrderOptions options;
  return lab::run_program(
      "Question 8 of the lab: classification from examples in the context, and their order.", argc, argv,
      [&](CLI::App& app) { options.declare(app); }, [&] { measure_all(options); });
}
