#pragma once

// A CSV of measurements, one row each, to which whole runs are added: what is in it is finished, and a run that was
// interrupted has left nothing. docs/lab/make reads it.

#include <cstdint>
#include <diffattn/core/matrix.hpp>
#include <filesystem>
#include <set>
#include <string>
#include <utility>
#include <vector>

namespace lab {

using diffattn::Index;

/// `key=value` pairs, in order.
using Fields = std::vector<std::pair<std::string, std::string>>;

/// The same in one cell: key=value;key=value.
std::string joined(const Fields& fields);

/// A number as short as it reads back the same to six digits.
std::string text_of(double number);

/// Which run a measurement belongs to.
struct Run {
  std::string model;
  std::uint64_t seed = 1;
  Fields fields;  ///< what tells it from the other runs of its model and seed

  std::string identity() const;
};

class MeasurementFile {
 public:
  /// The file of an experiment in a folder, which is made if need be. `configuration` is what all runs of the file have in common.
  /// Throws std::runtime_error, and changes nothing, if there is a file of another configuration, or one that cannot be read or
  /// written.
  MeasurementFile(const std::filesystem::path& folder, std::string experiment, Fields configuration);

  /// Whether the run is finished.
  bool has(const Run& run) const { return finished_.count(run.identity()) != 0; }
  Index runs() const { return static_cast<Index>(finished_.size()); }

  /// A measurement of the run that is going on. Throws std::runtime_error for a value that is no number.
  void measure(const Run& run, Index parameters, const std::string& measurement, double value,
               const Fields& fields = {});
  /// Writes what was measured since the last call: the run is finished. Throws std::runtime_error if the disk is full.
  void finish(const Run& run);

  /// What was measured of the run that is going on, for its checkpoint, and back from there.
  const std::string& waiting() const { return waiting_; }
  void go_on_with(const std::string& waiting) { waiting_ = waiting; }
  const std::filesystem::path& path() const { return path_; }

 private:
  std::string common() const;

  std::filesystem::path path_;
  std::string experiment_;
  Fields configuration_;
  std::set<std::string> finished_;
  std::string waiting_;
};

}  // namespace lab
