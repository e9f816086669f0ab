#include "parts/measurement_file.hpp"

#include <cmath>
#include <cstdio>
#include <fstream>
#include <sstream>
#include <stdexcept>

namespace lab {

namespace {

constexpr const char* kHeader = "experiment,measurement,value,model,seed,parameters,run,configuration,commit,machine";

std::vector<std::string> cells_of(const std::string& line) {
  std::vector<std::string> cells;
  std::istringstream stream(line);
  for (std::string cell; std::getline(stream, cell, ',');) cells.push_back(cell);
  return cells;
}

/// The name of the processor, without commas.
std::string machine() {
  std::ifstream info("/proc/cpuinfo");
  for (std::string line; std::getline(info, line);) {
    if (line.compare(0, 10, "model name") != 0) continue;
    std::string name = line.substr(line.find(':') + 2);
    for (char& c : name) c = c == ',' ? ' ' : c;
    return name;
  }
  return "unknown";
}

}  // namespace

std::string joined(const Fields& fields) {
  std::string text;
  for (const auto& [key, value] : fields) text += (text.empty() ? "" : ";") + key + "=" + value;
  return text;
}

std::string text_of(double number) {
  char text[32];
  std::snprintf(text, sizeof text, "%.6g", number);
  return text;
}

std::string Run::identity() const { return model + "," + std::to_string(seed) + "," + joined(fields); }

MeasurementFile::MeasurementFile(const std::filesystem::path& folder, std::string experiment, Fields configuration)
    : path_(folder / (experiment + ".csv")),
      experiment_(std::move(experiment)),
      configuration_(std::move(configuration)) {
  std::filesystem::create_directories(folder);
  std::ifstream file(path_);
  std::string line;
  if (!std::getline(file, line)) {
    if (!(std::ofstream(path_) << kHeader << '\n').flush())
      throw std::runtime_error(path_.string() + ": cannot be written");
    return;
  }
  if (line != kHeader)
    throw std::runtime_error(path_.string() + ": is no file of measurements: line 1 must be " + kHeader);
  for (Index number = 2; std::getline(file, line); ++number) {
    const std::vector<std::string> cells = cells_of(line);
    const std::string place = path_.string() + ": line " + std::to_string(number);
    if (cells.size() != 10)
      throw std::runtime_error(place + ": has " + std::to_string(cells.size()) + " cells, 10 make a measurement");
    if (cells[7] != joined(configuration_)) {
      throw std::runtime_error(place + ": was measured with " + cells[7] + "; this is " + joined(configuration_) +
                               ": choose another folder with --out");
    }
    finished_.insert(cells[3] + "," + cells[4] + "," + cells[6].substr(0, cells[6].find("|")));
  }
}

void MeasurementFile::measure(const Run& run, Index parameters, const std::string& measurement, double value,
                              const Fields& fields) {
  if (!std::isfinite(value)) {
    throw std::runtime_error(experiment_ + ": " + measurement + " of " + run.identity() + " is " +
                             std::to_string(value) + "; the runs before it are in " + path_.string());
  }
  waiting_ += experiment_ + "," + measurement + "," + text_of(value) + "," + run.model + "," +
              std::to_string(run.seed) + "," + std::to_string(parameters) + "," + joined(run.fields) + "|" +
              joined(fields) + "," + joined(configuration_) + "," DIFFATTN_LAB_COMMIT "," + machine() + "\n";
}

void MeasurementFile::finish(const Run& run) {
  std::ofstream file(path_, std::ios::app);
  if (!(file << waiting_).flush()) throw std::runtime_error(path_.string() + ": cannot be written");
  waiting_.clear();
  finished_.insert(run.identity());
}

}  // namespace lab
