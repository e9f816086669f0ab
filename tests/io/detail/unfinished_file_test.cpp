// What is saved is whole or not there: after kill -9, with several writers, on a full disk, through links.

#include <diffattn/core/file_bytes.hpp>
#include <diffattn/io/detail/unfinished_file.hpp>
#include <diffattn/io/whole_file.hpp>

#include <algorithm>
#include <chrono>
#include <filesystem>
#include <string>
#include <thread>
#include <vector>

#include "io/files.hpp"
#include "io/processes.hpp"
#include "support/catch.hpp"
#include "support/failing_allocations.hpp"
#include "support/throws.hpp"

#if DIFFATTN_TEST_PROCESSES
#include <sys/resource.h>
#include <sys/stat.h>
#endif
#if defined(__linux__)
#include <sched.h>
#include <sys/mount.h>
#endif

namespace {

namespace unfinished {

using diffattn::detail::read_text;
using diffattn::detail::write_text;
using files::Scratch;

/// What write_text says when it refuses to write.
inline std::string refusal(const std::filesystem::path& path) {
  return support::thrown_by<std::runtime_error>([&] { write_text(path, "new"); });
}

/// A text of `size` bytes that are all the same, so that two mixed ones are found out.
inline std::string text_of(char letter, std::size_t size) { return std::string(size, letter); }
inline bool is_whole(const std::string& text, std::size_t size) {
  return text.size() == size && std::count(text.begin(), text.end(), text[0]) == static_cast<std::ptrdiff_t>(size);
}

}  // namespace unfinished

}  // namespace

TEST_CASE("A file is written under any name, and nothing else is left") {
  const files::Scratch folder;
  for (const std::string& name :
       {std::string("file"), std::string("with spaces in it"), std::string("größe 尺寸"), std::string(".hidden"),
        std::string("-rf"), std::string("file.unfinished"), std::string(255, 'n')}) {
    CAPTURE(name);
    const auto path = folder / std::u8string(name.begin(), name.end());
    for (const std::string& text : {std::string("first"), std::string(), std::string("a\0b", 3)}) {
      unfinished::write_text(path, text);
      CHECK(unfinished::read_text(path) == text);
    }
    CHECK(folder.list() == name);
    std::filesystem::remove(path);
  }
}

TEST_CASE("A path may be relative, and may be a name alone") {
  const files::Scratch folder;
  const std::filesystem::path before = std::filesystem::current_path();
  std::filesystem::create_directory(folder / "inner");
  std::filesystem::current_path(folder / "inner");
  unfinished::write_text("name", "1");
  unfinished::write_text("./dotted", "2");
  unfinished::write_text("../outer", "3");
  std::filesystem::current_path(before);
  CHECK(unfinished::read_text(folder / "inner/name") == "1");
  CHECK(unfinished::read_text(folder / "inner/dotted") == "2");
  CHECK(unfinished::read_text(folder / "outer") == "3");
  CHECK(folder.list() == "inner outer");
}

TEST_CASE("What cannot be written says why") {
  const files::Scratch folder;
  files::write(folder / "file", "old");
  std::filesystem::create_directory(folder / "folder");
  const auto says = [&](const std::filesystem::path& path, const std::string& why) {
    CHECK(unfinished::refusal(path) == path.string() + ": cannot be written: " + why);
  };
  says(folder / "folder", "Is a directory");
  says(folder / "nowhere/file", "No such file or directory");
  says(folder / "folder/", "the path does not end in the name of a file");
  says("", "the path does not end in the name of a file");
#ifdef _WIN32  // which makes no difference between these and a folder that is not there
  says(folder / "file/under", "No such file or directory");
  says(folder / std::string(256, 'n'), "No such file or directory");
#else
  says(folder / "file/under", "Not a directory");
  says(folder / std::string(256, 'n'), "File name too long");
#endif
  CHECK(folder.list() == "file folder");
  CHECK(unfinished::read_text(folder / "file") == "old");
}

TEST_CASE("What cannot be read says why") {
  const files::Scratch folder;
  const auto says = [&](const std::filesystem::path& path, const std::string& why) {
    CHECK(support::thrown_by<std::runtime_error>([&] { unfinished::read_text(path); }) ==
          path.string() + ": cannot be opened for reading: " + why);
  };
  std::filesystem::create_directory(folder / "folder");
  says(folder / "nothing", "No such file or directory");
  says(folder / "folder", "Is a directory");
#if DIFFATTN_TEST_PROCESSES
  REQUIRE(::mkfifo((folder / "pipe").c_str(), 0600) == 0);
  says(folder / "pipe", "it is not a regular file");
  std::filesystem::create_symlink("round", folder / "round");
  says(folder / "round", "Too many levels of symbolic links");
#endif
}

TEST_CASE("An unfinished file has a name that no other writer has") {
  const files::Scratch folder;
  {
    diffattn::detail::UnfinishedFile first(folder / "file"), second(folder / "file");
    CHECK(folder.list().find(".unfinished file.") != std::string::npos);  // two of them
    first.write("1", 1);
    second.write("22", 2);
    second.finish();
    first.finish();
    second.replace_target();
    CHECK(unfinished::read_text(folder / "file") == "22");
    first.replace_target();
    CHECK(unfinished::read_text(folder / "file") == "1");
  }
  CHECK(folder.list() == "file");
}

TEST_CASE("A finished file that cannot take its place says so, and goes") {
  const files::Scratch folder;
  {
    diffattn::detail::UnfinishedFile file(folder / "file");
    file.write("new", 3);
    file.finish();
    std::filesystem::create_directories(folder / "file/inner");  // by someone else, meanwhile
    CHECK(support::thrown_by<std::runtime_error>([&] {
            file.replace_target();
          }).find((folder / "file").string() + ": cannot be written: ") == 0);
  }
  CHECK(folder.list() == "file");
  CHECK(std::filesystem::is_directory(folder / "file/inner"));
}

#if DIFFATTN_TEST_PROCESSES

TEST_CASE("A link is followed and stays") {
  const files::Scratch folder;
  std::filesystem::create_directory(folder / "elsewhere");
  files::write(folder / "elsewhere/file", "old");
  std::filesystem::create_symlink("elsewhere/file", folder / "relative");
  std::filesystem::create_symlink(folder / "elsewhere/file", folder / "absolute");
  std::filesystem::create_symlink("relative", folder / "chain");
  std::filesystem::create_symlink("elsewhere/made", folder / "dangling");
  std::filesystem::create_symlink("elsewhere", folder / "directory");
  std::filesystem::create_symlink("nowhere/file", folder / "lost");
  std::filesystem::create_symlink("round", folder / "round");
  const std::string before = folder.list();
  for (const char* name : {"relative", "absolute", "chain", "directory/file"}) {
    CAPTURE(name);
    unfinished::write_text(folder / name, name);
    CHECK(unfinished::read_text(folder / "elsewhere/file") == name);
  }
  unfinished::write_text(folder / "dangling", "made");
  CHECK(unfinished::read_text(folder / "elsewhere/made") == "made");
  for (const char* name : {"relative", "absolute", "chain", "dangling", "directory"}) {
    CHECK(std::filesystem::is_symlink(folder / name));
  }
  CHECK(unfinished::refusal(folder / "round") ==
        (folder / "round").string() + ": cannot be written: Too many levels of symbolic links");
  CHECK(unfinished::refusal(folder / "lost") ==
        (folder / "lost").string() + ": cannot be written: No such file or directory");
  CHECK(folder.list() == before);
}

TEST_CASE("What is no regular file is not replaced") {
  const files::Scratch folder;
  REQUIRE(::mkfifo((folder / "pipe").c_str(), 0600) == 0);
  std::filesystem::create_symlink("pipe", folder / "link");
  for (const char* name : {"pipe", "link"}) {
    CHECK(unfinished::refusal(folder / name) ==
          (folder / name).string() + ": cannot be written: it is there and not a regular file");
  }
  CHECK(std::filesystem::is_fifo(folder / "pipe"));
  CHECK(folder.list() == "link pipe");
}

TEST_CASE("A file keeps its mode; a new one has what the umask leaves") {
  const files::Scratch folder;
  const auto mode = [&](const std::string& name) {
    struct stat status {};
    REQUIRE(::stat((folder / name).c_str(), &status) == 0);
    return status.st_mode & 07777;
  };
  const mode_t before = ::umask(027);
  unfinished::write_text(folder / "file", "1");
  ::umask(before);
  CHECK(mode("file") == 0640);
  for (const mode_t kept : {0600u, 0666u, 0444u, 0755u}) {
    REQUIRE(::chmod((folder / "file").c_str(), kept) == 0);
    unfinished::write_text(folder / "file", "2");
    CHECK(mode("file") == kept);
  }
}

TEST_CASE("A directory that may not be written to, as an ordinary user") {
  const files::Scratch folder;
  std::filesystem::create_directory(folder / "inner");
  files::write(folder / "inner/file", "old");
  ::chmod((folder / "inner").c_str(), 0555);
  processes::Child child([&] {
    if (::geteuid() == 0 && ::setuid(65534) != 0) return 2;
    return unfinished::refusal(folder / "inner/file").find(": cannot be written: Permission denied") !=
                   std::string::npos
               ? 0
               : 1;
  });
  CHECK(child.wait() == 0);
  ::chmod((folder / "inner").c_str(), 0755);
  CHECK(unfinished::read_text(folder / "inner/file") == "old");
}

TEST_CASE("A limit on the size of files, wherever it strikes, leaves the old file whole") {
  const files::Scratch folder;
  unfinished::write_text(folder / "file", "old");
  for (const rlim_t limit : {0ul, 1ul, 7ul, 4096ul, 99999ul}) {
    processes::Child child([&] {
      std::signal(SIGXFSZ, SIG_IGN);
      const struct rlimit tight { limit, limit };
      if (::setrlimit(RLIMIT_FSIZE, &tight) != 0) return 2;
      try {
        unfinished::write_text(folder / "file", unfinished::text_of('n', 100'000));
      } catch (const std::runtime_error& error) {
        return std::string(error.what()).find(": cannot be written: File too large") != std::string::npos ? 0 : 1;
      }
      return 3;
    });
    CHECK(child.wait() == 0);
    CHECK(folder.list() == "file");
    CHECK(unfinished::read_text(folder / "file") == "old");
  }
}

#if defined(__linux__)
TEST_CASE("A disk that is full says so and keeps the old file") {
  const files::Scratch folder;
  processes::Child child([&] {
    // A disk of 64 KiB that this process alone sees; where that is not allowed, there is nothing to test.
    if (::unshare(CLONE_NEWNS | (::geteuid() == 0 ? 0 : CLONE_NEWUSER)) != 0) return 0;
    if (::mount(nullptr, "/", nullptr, MS_REC | MS_PRIVATE, nullptr) != 0) return 0;
    std::filesystem::create_directory(folder / "disk");
    if (::mount("diffattn", (folder / "disk").c_str(), "tmpfs", 0, "size=64k") != 0) return 0;
    unfinished::write_text(folder / "disk/file", "old");
    try {
      unfinished::write_text(folder / "disk/file", unfinished::text_of('n', 100'000));
      return 1;
    } catch (const std::runtime_error& error) {
      if (std::string(error.what()).find(": cannot be written: No space left on device") == std::string::npos) return 2;
    }
    std::size_t entries = 0;
    for ([[maybe_unused]] const auto& entry : std::filesystem::directory_iterator(folder / "disk")) ++entries;
    if (entries != 1 || unfinished::read_text(folder / "disk/file") != "old") return 3;
    unfinished::write_text(folder / "disk/file", unfinished::text_of('f', 30'000));  // beside the old one it fits
    return unfinished::is_whole(unfinished::read_text(folder / "disk/file"), 30'000) ? 0 : 4;
  });
  CHECK(child.wait() == 0);
}

TEST_CASE("A process that is killed at any system call leaves the old file or the new one") {
  constexpr std::size_t kSize = 50'000;
  const files::Scratch folder;
  int stops = 0;
  std::size_t old_ones = 0, new_ones = 0;
  do {
    unfinished::write_text(folder / "file", unfinished::text_of('o', kSize));
    if (!processes::killed_at(++stops,
                              [&] { unfinished::write_text(folder / "file", unfinished::text_of('n', kSize)); })) {
      break;
    }
    const std::string text = unfinished::read_text(folder / "file");
    REQUIRE(unfinished::is_whole(text, kSize));
    ++(text[0] == 'o' ? old_ones : new_ones);
  } while (stops < 1000);
  CHECK(stops < 1000);
  if (stops > 1) CHECK((old_ones > 5 && new_ones > 1));  // unless processes cannot be traced here
}
#endif

TEST_CASE("Processes that write to one path, and are killed, while another reads") {
  constexpr std::size_t kSize = 200'000;
  const files::Scratch folder;
  const auto path = folder / "file";
  unfinished::write_text(path, unfinished::text_of('0', kSize));
  const auto writes = [&](char letter) {
    return [&path, letter]() -> int {
      for (;;) unfinished::write_text(path, unfinished::text_of(letter, kSize));
    };
  };
  const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(1);
  std::size_t reads = 0, broken = 0;
  for (char letter = 'a'; std::chrono::steady_clock::now() < end; letter = letter == 'z' ? 'a' : letter + 1) {
    processes::Child first(writes(letter)), second(writes(letter == 'a' ? 'z' : 'A'));
    for (int i = 0; i < 40; ++i, ++reads) {
      if (!unfinished::is_whole(unfinished::read_text(path), kSize)) ++broken;
    }
    first.kill();
    if (!unfinished::is_whole(unfinished::read_text(path), kSize)) ++broken;
  }
  CHECK(reads > 0);
  CHECK(broken == 0);
}

#endif  // DIFFATTN_TEST_PROCESSES

TEST_CASE("Eight threads that write to one path") {
  constexpr std::size_t kSize = 100'000;
  const files::Scratch folder;
  const auto path = folder / "file";
  unfinished::write_text(path, unfinished::text_of('0', kSize));
  std::vector<std::thread> threads;
  std::vector<int> failures(8, 0);
  for (std::size_t t = 0; t < failures.size(); ++t) {
    threads.emplace_back([&, t] {
      for (int i = 0; i < 5; ++i) {
        try {
          unfinished::write_text(path, unfinished::text_of(static_cast<char>('a' + t), kSize));
          if (!unfinished::is_whole(unfinished::read_text(path), kSize)) ++failures[t];
        } catch (const std::exception&) {
          ++failures[t];
        }
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  CHECK(failures == std::vector<int>(8, 0));
  CHECK(folder.list() == "file");
}

TEST_CASE("Writing and reading a file without memory changes nothing") {
  const files::Scratch folder;
  const auto path = folder / "file";
  for (const auto failures : {support::Failures::one, support::Failures::all_later}) {
    unfinished::write_text(path, "old");
    support::for_every_failing_allocation([&] { unfinished::write_text(path, "new"); },
                                          [&](bool threw) {
                                            CHECK(threw);
                                            CHECK(folder.list() == "file");
                                            CHECK(unfinished::read_text(path) == "old");
                                          },
                                          failures);
    support::for_every_failing_allocation([&] { unfinished::read_text(path); }, [](bool threw) { CHECK(threw); },
                                          failures);
  }
}
