#include "formats/file.h"

#include <gtest/gtest.h>
#include <sched.h>
#include <signal.h>
#include <sys/mount.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <functional>

#include "base/error.h"
#include "formats/temporary_directory.h"

namespace oryx::formats {
namespace {

namespace fs = std::filesystem;

std::string error_of(const std::function<void()>& action) {
  try {
    action();
  } catch (const Error& error) {
    return error.what();
  }
  return "no error";
}

TEST(AtomicFile, AppearsOnCommitAndReplaces) {
  TemporaryDirectory directory;
  const std::string path = directory.file("a.txt");
  write_file_atomic(path, "old");
  {
    AtomicFile file(path);
    file.write("xxxx new");
    EXPECT_EQ(read_file(path), "old");
    file.rewrite_start("very");
    file.write("er");
    file.commit();
  }
  EXPECT_EQ(read_file(path), "very newer");
  EXPECT_EQ(directory.entries(), 1u);
}

TEST(AtomicFile, LeavesNothingWithoutCommit) {
  TemporaryDirectory directory;
  { AtomicFile(directory.file("a.txt")).write("lost"); }
  EXPECT_EQ(directory.entries(), 0u);
}

TEST(AtomicFile, NamesTheFileAndTheReason) {
  TemporaryDirectory directory;
  const std::string missing = directory.file("no/such/file");
  EXPECT_EQ(error_of([&] { write_file_atomic(missing, ""); }),
            "cannot create " + missing + ": No such file or directory");
  EXPECT_EQ(error_of([&] { write_file_atomic(directory.path(), ""); }),
            "cannot write " + directory.path().string() + ": it is a directory");
  EXPECT_EQ(error_of([&] { read_file(missing); }), "cannot open " + missing + ": No such file or directory");
  EXPECT_NE(error_of([&] { MappedFile file(missing); }), "no error");
  EXPECT_NE(error_of([&] { MappedFile file(directory.path()); }), "no error");
}

TEST(AtomicFile, DevicesAreWrittenInPlaceAndSymbolicLinksKept) {
  EXPECT_NE(error_of([] { write_file_atomic("/dev/full", "text"); }).find("No space left"),
            std::string::npos);
  write_file_atomic("/dev/null", "text");
  EXPECT_TRUE(fs::is_character_file("/dev/null"));

  TemporaryDirectory directory;
  write_file_atomic(directory.file("target"), "old");
  fs::create_symlink("target", directory.file("link"));
  write_file_atomic(directory.file("link"), "new");
  EXPECT_TRUE(fs::is_symlink(directory.file("link")));
  EXPECT_EQ(read_file(directory.file("target")), "new");
}

// Runs in a child process, whose exit status is the number of failed checks.
int in_child(const std::function<int()>& action) {
  const pid_t child = ::fork();
  if (child == 0) ::_exit(action());
  int status = 0;
  ::waitpid(child, &status, 0);
  return WIFEXITED(status) ? WEXITSTATUS(status) : 99;
}

int failures_when_writing_too_much(const fs::path& directory) {
  const std::string path = (directory / "a").string();
  write_file_atomic(path, "old");
  const std::string error = error_of([&] { write_file_atomic(path, std::string(4 << 20, 'x')); });
  const bool named = error.starts_with("cannot write " + path);
  const auto left = fs::directory_iterator(directory);
  return !named + (read_file(path) != "old") + (std::distance(begin(left), end(left)) != 1);
}

TEST(AtomicFile, AFileTooLargeIsAnErrorAndTheOldOneStays) {
  TemporaryDirectory directory;
  EXPECT_EQ(in_child([&] {
              ::signal(SIGXFSZ, SIG_IGN);
              const rlimit limit{1 << 20, 1 << 20};
              if (::setrlimit(RLIMIT_FSIZE, &limit) != 0) return 98;
              return failures_when_writing_too_much(directory.path());
            }),
            0);
}

TEST(AtomicFile, AFullDiskIsAnErrorAndTheOldFileStays) {
  TemporaryDirectory directory;
  constexpr int kCannotMount = 97;
  const int result = in_child([&] {
    // A file system of 1 MiB that only the child sees.
    if (::unshare(CLONE_NEWNS) != 0 || ::mount("none", "/", nullptr, MS_REC | MS_PRIVATE, nullptr) != 0 ||
        ::mount("none", directory.path().c_str(), "tmpfs", 0, "size=1m") != 0) {
      return kCannotMount;
    }
    return failures_when_writing_too_much(directory.path());
  });
  if (result == kCannotMount) GTEST_SKIP() << "mounting a small file system needs root";
  EXPECT_EQ(result, 0);
}

TEST(AtomicDirectory, AppearsWholeOrNotAtAll) {
  TemporaryDirectory directory;
  const fs::path final_path = directory.path() / "checkpoint";
  {
    AtomicDirectory unpublished(final_path);
    write_file_atomic(unpublished.path() / "a", "1");
  }
  EXPECT_EQ(directory.entries(), 0u);

  fs::create_directory(directory.path() / "checkpoint.partial");  // of a killed process
  write_file_atomic(directory.file("checkpoint.partial/stale"), "1");
  {
    AtomicDirectory published(final_path.string() + "/");
    fs::create_directory(published.path() / "inner");
    write_file_atomic(published.path() / "inner" / "a", "1");
    EXPECT_FALSE(fs::exists(final_path));
    published.publish();
  }
  EXPECT_EQ(read_file(final_path / "inner" / "a"), "1");
  EXPECT_EQ(directory.entries(), 3u);
}

TEST(AtomicDirectory, ReplacesOnlyWhenAsked) {
  TemporaryDirectory directory;
  const fs::path final_path = directory.path() / "model";
  fs::create_directory(final_path);  // empty: may be filled
  {
    AtomicDirectory first(final_path);
    write_file_atomic(first.path() / "a", "1");
    first.publish();
  }
  {
    AtomicDirectory second(final_path);
    write_file_atomic(second.path() / "b", "2");
    EXPECT_EQ(error_of([&] { second.publish(); }),
              "cannot publish " + final_path.string() + ": the name is taken");
    EXPECT_EQ(read_file(final_path / "a"), "1");
    second.publish(/*replace=*/true);
  }
  EXPECT_EQ(read_file(final_path / "b"), "2");
  EXPECT_EQ(directory.entries(), 2u);

  write_file_atomic(directory.file("file"), "3");
  AtomicDirectory onto_file(directory.path() / "file");
  EXPECT_NE(error_of([&] { onto_file.publish(true); }), "no error");
  EXPECT_EQ(read_file(directory.file("file")), "3");
}

TEST(MappedFile, HoldsTheBytesAndKeepsTheFileFromWrites) {
  TemporaryDirectory directory;
  write_file_atomic(directory.file("a"), "abc");
  write_file_atomic(directory.file("empty"), "");
  MappedFile file(directory.file("a"));
  ASSERT_EQ(file.size(), 3u);
  file.data()[0] = std::byte{'x'};
  EXPECT_EQ(read_file(directory.file("a")), "abc");
  EXPECT_EQ(MappedFile(directory.file("empty")).size(), 0u);
}

}  // namespace
}  // namespace oryx::formats
