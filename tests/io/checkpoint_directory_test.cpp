// A directory's weights and its config.json are of one save, whatever interrupts saving and whoever saved before.

#include <diffattn/io/checkpoint_directory.hpp>

#include <chrono>
#include <filesystem>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "io/files.hpp"
#include "io/processes.hpp"
#include "support/catch.hpp"
#include "support/failing_allocations.hpp"
#include "support/throws.hpp"

namespace {

namespace checkpoints {

using diffattn::Matrix;
using diffattn::SafetensorsWriter;
using diffattn::detail::open_checkpoint_directory;
using diffattn::detail::save_checkpoint_directory;
using files::Scratch;

/// The model number `number`: its weights and its configuration both say so.
inline SafetensorsWriter weights(int number) {
  SafetensorsWriter writer(std::map<std::string, std::string>{{"format", "pt"}});
  writer.add("x", Matrix<float>(Matrix<float>::Constant(20, 20, static_cast<float>(number))));
  return writer;
}
inline std::string config(int number) { return "{\n  \"number\": " + std::to_string(number) + "\n}\n"; }

inline void save(const std::filesystem::path& directory, int number) {
  save_checkpoint_directory(directory, weights(number), config(number),
                            {.generation_config = config(number), .others = {}});
}

/// As others save: in shards or not, without our mark.
inline void save_as_others(const std::filesystem::path& directory, int number, bool shards = false) {
  std::filesystem::create_directories(directory);
  weights(number).save(directory / (shards ? "model-00001-of-00001.safetensors" : "model.safetensors"));
  if (shards) {
    files::write(directory / "model.safetensors.index.json",
                 R"({"weight_map": {"x": "model-00001-of-00001.safetensors"}})");
  }
  files::write(directory / "config.json", config(number));
  files::write(directory / "generation_config.json", config(number));
}

/// Of which model a generation_config.json is; 0 if there is none.
inline int generation(const diffattn::detail::CheckpointFiles& opened) {
  if (opened.generation_config.empty()) return 0;
  return nlohmann::json::parse(opened.generation_config).at("number").get<int>();
}
inline int generation(const std::filesystem::path& directory) {
  return generation(open_checkpoint_directory(directory));
}

/// Which model a directory holds; −1 if the weights are of another than one of the configurations.
inline int load(const std::filesystem::path& directory) {
  const auto opened = open_checkpoint_directory(directory);
  const Matrix<float> x = opened.tensors.file_of("x").matrix<float>("x");
  const int number = nlohmann::json::parse(opened.config).at("number").get<int>();
  if (generation(opened) != 0 && generation(opened) != number) return -1;
  return x == Matrix<float>::Constant(20, 20, static_cast<float>(number)) ? number : -1;
}

inline std::string refusal(const std::filesystem::path& directory) {
  return support::thrown_by<diffattn::FormatError>([&] { open_checkpoint_directory(directory); });
}

}  // namespace checkpoints

}  // namespace

TEST_CASE("A directory is saved and loaded, made if need be, and equal models are equal bytes") {
  const files::Scratch folder;
  checkpoints::save(folder / "a/b/", 1);
  CHECK(checkpoints::load(folder / "a/b") == 1);
  checkpoints::save(folder / "c", 1);
  for (const char* const file : {"/model.safetensors", "/config.json"}) {
    CHECK(files::read(folder / ("a/b" + std::string(file))) == files::read(folder / ("c" + std::string(file))));
  }
  checkpoints::save(folder / "c", 2);
  CHECK(checkpoints::load(folder / "c") == 2);
  CHECK(nlohmann::json::parse(files::read(folder / "c/config.json")).size() == 2);
}

TEST_CASE("A generation_config.json is read with the weights that it was saved with") {
  const files::Scratch folder;
  checkpoints::save(folder / "one", 1);
  const auto opened = [&] { return checkpoints::open_checkpoint_directory(folder / "one"); };
  CHECK(checkpoints::generation(opened()) == 1);
  CHECK(opened().is_generation_saved);
  // Another save's does not count, one without a mark is somebody's own.
  checkpoints::save(folder / "two", 2);
  const auto path = folder / "one/generation_config.json";
  std::filesystem::copy_file(folder / "two/generation_config.json", path,
                             std::filesystem::copy_options::overwrite_existing);
  CHECK(checkpoints::generation(opened()) == 0);
  CHECK_FALSE(opened().is_generation_saved);
  files::write(path, "{\"number\": 7}");
  CHECK(checkpoints::generation(opened()) == 7);
  CHECK_FALSE(opened().is_generation_saved);
  std::filesystem::remove(path);
  CHECK(checkpoints::generation(opened()) == 0);
  // Left unfinished by a save that was killed, it is read in the place of the one that is there.
  std::filesystem::copy_file(folder / "two/generation_config.json", path);
  checkpoints::save(folder / "three", 1);
  std::filesystem::rename(folder / "three/generation_config.json",
                          folder / "one/generation_config.json.1-1.unfinished");
  CHECK(checkpoints::generation(opened()) == 1);
  CHECK(opened().is_generation_saved);
  // Weights of others come with whatever is there.
  checkpoints::weights(2).save(folder / "one/model.safetensors");
  CHECK(checkpoints::generation(opened()) == 2);
  // An empty object has no comma to put behind the mark.
  diffattn::detail::save_checkpoint_directory(folder / "four", checkpoints::weights(4), "{}",
                                              {.generation_config = "{ }", .others = {}});
  CHECK(nlohmann::json::parse(files::read(folder / "four/config.json")).size() == 1);
  CHECK(nlohmann::json::parse(files::read(folder / "four/generation_config.json")).size() == 1);
}

TEST_CASE("Files beside the weights are written once") {
  const files::Scratch folder;
  files::write(folder / "source", std::string("a\0b", 3));
  files::write(folder / "empty", "");
  const auto companions = [&] {
    diffattn::detail::CompanionFiles result;
    result.others["tokenizer.json"] = std::make_shared<diffattn::detail::FileBytes>(folder / "source");
    result.others["merges.txt"] = std::make_shared<diffattn::detail::FileBytes>(folder / "empty");
    return result;
  };
  const auto save = [&] {
    checkpoints::save_checkpoint_directory(folder / "model", checkpoints::weights(1), "{}", companions());
  };
  save();
  const auto path = folder / "model/tokenizer.json";
  CHECK(files::read(path) == std::string("a\0b", 3));
  CHECK(files::read(folder / "model/merges.txt").empty());
  const auto old = std::filesystem::file_time_type() + std::chrono::hours(1);
  std::filesystem::last_write_time(path, old);
  save();
  CHECK(std::filesystem::last_write_time(path) == old);
  files::write(path, "other");
  save();
  CHECK(files::read(path) == std::string("a\0b", 3));
}

TEST_CASE("Files of two saves are refused, edited ones are not") {
  const files::Scratch folder;
  checkpoints::save(folder / "one", 1);
  checkpoints::save(folder / "two", 2);
  const auto copy = [&](const std::string& from, const std::string& to) {
    std::filesystem::copy_file(folder / from, folder / to, std::filesystem::copy_options::overwrite_existing);
  };
  const std::string id_of_two =
      diffattn::Safetensors(folder / "two/model.safetensors").metadata().at("diffattn_save_id");
  CHECK(id_of_two.size() == 16);

  copy("two/model.safetensors", "one/model.safetensors");
  const std::string said = checkpoints::refusal(folder / "one");
  CHECK(said.find((folder / "one/config.json").string() + ": does not belong to the weights beside it") == 0);
  CHECK(said.find("theirs \"" + id_of_two + "\"") != std::string::npos);

  // A configuration without a mark is somebody's own, and meant.
  for (const char* const mark : {"\"more\": 3", "\"diffattn_save_id\": null", "\"diffattn_save_id\": [7]"}) {
    files::write(folder / "one/config.json", "{\"number\": 1, " + std::string(mark) + "}");
    CHECK(checkpoints::load(folder / "one") == -1);
  }

  // Other fields may change, and others' weights come with any configuration.
  files::write(folder / "one/config.json", "{\"more\": 3, \"diffattn_save_id\": \"" + id_of_two + "\", \"number\": 2}");
  CHECK(checkpoints::load(folder / "one") == 2);
  checkpoints::weights(1).save(folder / "two/model.safetensors");
  CHECK(checkpoints::load(folder / "two") == -1);

  // What is no JSON is left to the reader of the configuration.
  files::write(folder / "one/config.json", "{");
  CHECK(checkpoints::open_checkpoint_directory(folder / "one").config == "{");
}

TEST_CASE("An unfinished configuration is read only with the weights it was saved with") {
  const files::Scratch folder;
  checkpoints::save(folder / "new", 2);
  checkpoints::save(folder / "other", 3);
  checkpoints::save(folder / "old", 1);
  const auto unfinished = [&](const std::string& from, const std::string& number) {
    std::filesystem::copy_file(folder / (from + "/config.json"),
                               folder / ("old/config.json." + number + ".unfinished"));
  };
  files::write(folder / "old/config.json.1-1.unfinished", "{\"number\": 2, \"diffattn_sa");  // killed while it wrote
  std::filesystem::create_directory(folder / "old/config.json.1-2.unfinished");
  unfinished("other", "1-3");
  CHECK(checkpoints::load(folder / "old") == 1);
  std::filesystem::copy_file(folder / "new/model.safetensors", folder / "old/model.safetensors",
                             std::filesystem::copy_options::overwrite_existing);
  checkpoints::refusal(folder / "old");
  unfinished("new", "1-4");
  CHECK(checkpoints::load(folder / "old") == 2);
  std::filesystem::remove(folder / "old/config.json");
  CHECK(checkpoints::load(folder / "old") == 2);
  std::filesystem::remove(folder / "old/config.json.1-4.unfinished");
  CHECK(support::thrown_by<std::runtime_error>([&] { checkpoints::load(folder / "old"); }) ==
        (folder / "old").string() + ": has no config.json, which says what model its weights are of");
  checkpoints::save(folder / "old", 4);
  CHECK(checkpoints::load(folder / "old") == 4);
}

TEST_CASE("What cannot be saved leaves the directory as it was") {
  const files::Scratch folder;
  checkpoints::save(folder / "model", 1);
  std::filesystem::remove(folder / "model/config.json");
  std::filesystem::create_directories(folder / "model/config.json");
  const std::string before = files::read(folder / "model/model.safetensors");
  CHECK(support::thrown_by<std::runtime_error>([&] { checkpoints::save(folder / "model", 2); }) ==
        (folder / "model/config.json").string() + ": cannot be written: Is a directory");
  CHECK(files::read(folder / "model/model.safetensors") == before);

  files::write(folder / "file", "text");
  CHECK_THROWS_AS(checkpoints::save(folder / "file", 1), std::runtime_error);
  CHECK_THROWS_AS(checkpoints::save(folder / "file/inner", 1), std::runtime_error);
  CHECK(folder.list() == "file model");
}

TEST_CASE("Saving and loading a directory without memory changes nothing") {
  const files::Scratch folder;
  for (const auto failures : {support::Failures::one, support::Failures::all_later}) {
    const std::size_t failed =
        support::for_every_failing_allocation([&] { checkpoints::save(folder / "new/directory", 1); },
                                              [&](bool threw) {
                                                if (threw) {
                                                  CHECK(folder.list() == "");
                                                } else {
                                                  std::filesystem::remove_all(folder / "new");
                                                }
                                              },
                                              failures);
    CHECK(failed >= (support::fails_allocations() ? 40U : 0U));
    std::filesystem::remove_all(folder / "new");

    checkpoints::save(folder / "model", 1);
    support::for_every_failing_allocation([&] { checkpoints::save(folder / "model", 2); },
                                          [&](bool threw) {
                                            CHECK(checkpoints::load(folder / "model") == (threw ? 1 : 2));
                                            if (!threw) checkpoints::save(folder / "model", 1);
                                          },
                                          failures);
    support::for_every_failing_allocation([&] { checkpoints::open_checkpoint_directory(folder / "model"); },
                                          [](bool) {}, failures);
    std::filesystem::remove_all(folder / "model");
  }
}

#if DIFFATTN_TEST_PROCESSES

namespace {

/// Kills a process that saves model 2 at every `stride`-th entry to or return from a system call, from the `first` on.
/// The directory must hold model 1, as it did before, or model 2.
void check_kills(const std::filesystem::path& before, int first, int stride) {
  const bool is_new = std::filesystem::is_empty(before);
  int old_ones = 0, new_ones = 0, none = 0, stop = first;
  for (;; stop += stride) {
    REQUIRE(stop < 2000);
    const files::Scratch folder;
    const auto path = folder / "model";
    if (!is_new) std::filesystem::copy(before, path);
    if (!processes::killed_at(stop, [&] { checkpoints::save(path, 2); })) break;
    int number = 0;
    try {
      number = checkpoints::load(path);
    } catch (const std::runtime_error& error) {
      INFO(error.what());
      CHECK(is_new);
      ++none;
      continue;
    }
    REQUIRE((number == 1 || number == 2));
    REQUIRE(checkpoints::generation(path) == number);
    ++(number == 1 ? old_ones : new_ones);
  }
  if (stop == first) return;  // processes cannot be traced here
  CHECK(stride * (is_new ? none : old_ones) > 20);
  CHECK(stride * new_ones > 5);
}

void check_kills_over_every_model(int stride) {
  const files::Scratch folder;
  std::filesystem::create_directory(folder / "nothing");
  checkpoints::save(folder / "ours", 1);
  checkpoints::save_as_others(folder / "others", 1);
  checkpoints::save_as_others(folder / "shards", 1, true);
  checkpoints::save(folder / "both", 1);  // somebody else's weights beside a configuration of ours
  checkpoints::weights(1).save(folder / "both/model.safetensors");
  int first = 0;
  for (const char* const before : {"nothing", "ours", "others", "shards", "both"}) {
    CAPTURE(before);
    check_kills(folder / before, first++, stride);
  }
}

}  // namespace

TEST_CASE("A process that is killed at a system call leaves one model, whatever stood there before") {
  check_kills_over_every_model(9);
}

TEST_CASE("A process that is killed at any system call leaves one model, whatever stood there before", "[.]") {
  check_kills_over_every_model(1);
}

TEST_CASE("Processes that save to one directory, and are killed, while another loads") {
  const files::Scratch folder;
  const auto path = folder / "model";
  checkpoints::save(path, 0);
  const auto saves = [&](int first) {
    return [&path, first]() -> int {
      for (int number = first;; number = number == first ? first + 1 : first) checkpoints::save(path, number);
    };
  };
  const auto end = std::chrono::steady_clock::now() + std::chrono::milliseconds(1500);
  int loads = 0, mixed = 0;
  while (std::chrono::steady_clock::now() < end) {
    processes::Child one(saves(1)), two(saves(3));
    for (int i = 0; i < 30; ++i, ++loads) mixed += checkpoints::load(path) < 0 ? 1 : 0;
    one.kill();
    mixed += checkpoints::load(path) < 0 ? 1 : 0;
    two.kill();
    mixed += checkpoints::load(path) < 0 ? 1 : 0;
  }
  CHECK(loads > 0);
  CHECK(mixed == 0);
}

#endif

TEST_CASE("Opening a directory waits for a save that is between two of its files") {
  const files::Scratch folder;
  const auto path = folder / "model";
  checkpoints::save(path, 1);
  const std::string before = diffattn::detail::read_text(path / "config.json");
  checkpoints::save(path, 2);
  const std::string after = diffattn::detail::read_text(path / "config.json");
  files::write(path / "config.json", before);
  std::optional<diffattn::detail::DirectoryLock> saving(path);
  std::thread saver([&] {
    std::this_thread::sleep_for(std::chrono::milliseconds(100));
    files::write(path / "config.json", after);
    saving.reset();
  });
  int found = -1;
  try {
    found = checkpoints::load(path);
  } catch (const std::exception&) {
  }
  saver.join();
  CHECK(found == 2);
}

TEST_CASE("Threads that save to one directory leave the model of one of them") {
  const files::Scratch folder;
  const auto path = folder / "model";
  checkpoints::save(path, 0);
  std::vector<std::thread> threads;
  std::vector<int> failures(8, 0);
  for (int t = 0; t < 8; ++t) {
    threads.emplace_back([&, t] {
      for (int i = 0; i < 5; ++i) {
        try {
          checkpoints::save(path, t);
          if (checkpoints::load(path) < 0) ++failures[static_cast<std::size_t>(t)];
        } catch (const std::exception&) {
          ++failures[static_cast<std::size_t>(t)];
        }
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  CHECK(failures == std::vector<int>(8, 0));
  CHECK(checkpoints::load(path) >= 0);
}
