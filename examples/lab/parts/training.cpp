#include "parts/training.hpp"

#include <algorithm>
#include <cmath>
#include <ctime>
#include <diffattn/training/learning_rate.hpp>
#include <sstream>
#include <stdexcept>

#include "support/interruption.hpp"
#include "support/progress_line.hpp"

namespace lab {

namespace {

double cpu_seconds() { return static_cast<double>(std::clock()) / CLOCKS_PER_SEC; }

/// At which step a model was saved.
Index step_of(const std::filesystem::path& path) {
  const diffattn::Safetensors file(path);
  const auto found = file.metadata().find("optimizer_steps");
  return found == file.metadata().end() ? 0 : std::stol(found->second);
}

/// One training, between its points of measurement.
class Course {
 public:
  Course(const Plan& plan, Task& task, Budget& budget, diffattn::ThreadPool& pool)
      : plan_(plan), task_(task), budget_(budget), pool_(pool), model_(make_model(plan.model)), rate_(schedule(plan)) {
    progress_.steps = plan.steps;
    std::filesystem::create_directories(plan.path());
  }

  Model& model() { return *model_; }

  /// Brings the model to `step`: from what is saved, or by training.
  const Progress& reach(Index step) {
    if (step == 0) return progress_;
    if (std::filesystem::exists(saved(step))) {
      load(saved(step));
      return progress_;
    }
    if (std::filesystem::exists(paused())) {
      const Index at = step_of(paused());
      if (at > progress_.step && at < step) load(paused());
    }
    while (progress_.step < step) {
      take_step();
      if (progress_.step < step && (budget_.used_up() || example::interrupted != 0)) {
        save(paused());
        example::ProgressLine::clear();
        budget_.stop(name() + ": step " + std::to_string(progress_.step) + " of " + std::to_string(plan_.steps) +
                     " is saved in " + plan_.path().string());
      }
    }
    progress_.training_loss = sum_ / static_cast<double>(std::max<Index>(summed_, 1));
    sum_ = 0;
    summed_ = 0;
    save(saved(step));
    std::filesystem::remove(paused());
    return progress_;
  }

 private:
  static diffattn::LearningRate schedule(const Plan& plan) {
    return diffattn::LearningRate({.peak = plan.learning_rate,
                                   .warmup_steps = std::min<Index>(100, plan.steps / 10),
                                   .total_steps = plan.steps,
                                   .final = plan.learning_rate / 20});
  }

  std::filesystem::path saved(Index step) const {
    return plan_.path() / ("step_" + std::to_string(step) + ".safetensors");
  }
  std::filesystem::path paused() const { return plan_.path() / "paused.safetensors"; }
  std::string name() const { return plan_.model.name + ", seed " + std::to_string(plan_.model.seed); }

  void take_step() {
    task_.draw(batch_, plan_.model.seed, progress_.step);
    const double start = cpu_seconds();
    const StepResult result = model_->step(batch_, rate_.at(progress_.step), pool_);
    if (!std::isfinite(result.loss) || !std::isfinite(result.gradient_norm)) {
      example::ProgressLine::clear();
      throw std::runtime_error(name() + ": a loss or gradient is no number at step " +
                               std::to_string(progress_.step + 1) + ", learning rate " + text_of(plan_.learning_rate) +
                               "; what was measured and saved before is in " + plan_.path().string());
    }
    progress_.seconds += cpu_seconds() - start;
    progress_.tokens += static_cast<double>(batch_.inputs.size());
    sum_ += result.loss;
    ++summed_;
    ++progress_.step;
    constexpr double kSmoothing = 0.05;
    smooth_ = progress_.step == 1 ? result.loss : smooth_ + kSmoothing * (result.loss - smooth_);
    least_ = progress_.step == 1 ? smooth_ : std::min(least_, smooth_);
    progress_.largest_rise = std::max(progress_.largest_rise, smooth_ - least_);
    if (progress_.step > rate_.config().warmup_steps) {
      progress_.largest_gradient_norm = std::max(progress_.largest_gradient_norm, result.gradient_norm);
    }
    bar_.show(progress_.step, plan_.steps, result.loss, progress_.tokens / std::max(progress_.seconds, 1e-9));
  }

  void save(const std::filesystem::path& path) const {
    std::ostringstream numbers;
    numbers.precision(17);
    for (const double number :
         {progress_.tokens, progress_.seconds, progress_.training_loss, progress_.largest_gradient_norm,
          progress_.largest_rise, sum_, static_cast<double>(summed_), smooth_, least_}) {
      numbers << number << ' ';
    }
    model_->save(path, {.notes = {{"made_with", plan_.made_with}, {"progress", numbers.str()}}});
  }

  void load(const std::filesystem::path& path) {
    const auto notes = [&] {
      const diffattn::Safetensors file(path);
      return file.metadata();
    }();
    const auto note = [&](const char* key) {
      const auto found = notes.find(key);
      return found == notes.end() ? std::string() : found->second;
    };
    if (note("made_with") != plan_.made_with) {
      throw std::runtime_error(path.string() + ": was made with " + note("made_with") + "; this is " + plan_.made_with +
                               ": choose another folder with --out");
    }
    model_->load(path);
    progress_.step = model_->steps_done();
    std::istringstream numbers(note("progress"));
    double summed = 0;
    numbers >> progress_.tokens >> progress_.seconds >> progress_.training_loss >> progress_.largest_gradient_norm >>
        progress_.largest_rise >> sum_ >> summed >> smooth_ >> least_;
    if (!numbers) throw std::runtime_error(path.string() + ": says nothing of its progress");
    summed_ = static_cast<Index>(summed);
  }

  const Plan& plan_;
  Task& task_;
  Budget& budget_;
  diffattn::ThreadPool& pool_;
  std::unique_ptr<Model> model_;
  diffattn::LearningRate rate_;
  example::ProgressLine bar_;
  TaskBatch batch_;
  Progress progress_;
  double sum_ = 0, smooth_ = 0, least_ = 0;
  Index summed_ = 0;
};

}  // namespace

bool Budget::used_up() const {
  const double minutes = std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count() / 60;
  return minutes_ > 0 && minutes >= minutes_;
}

void Budget::stop(const std::string& what_is_saved) const {
  if (example::interrupted != 0) throw Pause("stopped; " + what_is_saved + "; call again to go on");
  if (measurements_ == 0) {
    throw std::runtime_error("--minutes " + text_of(minutes_) + ": too little for one measurement; " + what_is_saved +
                             "; call again with more to go on");
  }
  throw Pause("the budget of " + text_of(minutes_) + " minutes is used up; " + what_is_saved + "; call again to go on");
}

std::filesystem::path Plan::path() const {
  return folder / (model.name + "_" + std::to_string(model.layers) + "x" + std::to_string(model.width) + "_rate_" +
                   text_of(learning_rate) + "_seed_" + std::to_string(model.seed));
}

void train(const Plan& plan, Task& task, Budget& budget, diffattn::ThreadPool& pool, const Measure& measure) {
  Course course(plan, task, budget, pool);
  const auto measure_here = [&](const Progress& progress) {
    measure(course.model(), progress);
    if (progress.step != 0) budget.count_measurement();
  };
  measure_here(course.reach(0));
  for (Index step = plan.measure_every; step < plan.steps; step += plan.measure_every) measure_here(course.reach(step));
  measure_here(course.reach(plan.steps));
  example::ProgressLine::clear();
  if (!plan.keep_models) std::filesystem::remove_all(plan.path());
}

Plan plan_of(const Options& options, const std::string& model, Index vocab_size, std::uint64_t seed, double rate,
             const std::string& made_with) {
  return {.model = options.model(model, vocab_size, seed),
          .made_with = made_with,
          .learning_rate = rate,
          .steps = options.steps,
          .measure_every = std::max<Index>(1, options.steps / 10),
          .folder = options.out / "models"};
}

Fields fields_of(const Progress& progress) {
  return {{"step", std::to_string(progress.step)},
          {"steps", std::to_string(progress.steps)},
          {"tokens", text_of(progress.tokens)},
          {"seconds", text_of(progress.seconds)}};
}

double accuracy(const Matrix<float>& logits, const TaskBatch& batch) {
  Index right = 0;
  for (const TaskBatch::Question& question : batch.questions) {
    Index best = 0;
    logits.row(question.row).maxCoeff(&best);
    right += best == batch.targets[static_cast<std::size_t>(question.row)] ? 1 : 0;
  }
  return static_cast<double>(right) / static_cast<double>(std::max<std::size_t>(batch.questions.size(), 1));
}

}  // namespace lab
