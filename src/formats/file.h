// Files that appear whole or not at all, directories likewise, and files read by mapping.
// Every failure throws Error naming the file and the system's reason.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <string>
#include <string_view>

namespace oryx::formats {

// The bytes of a file (or of a pipe or device).
std::string read_file(const std::string& path);

// A file that appears under its name when commit() returns, and not at all if that never happens: it is
// written beside its place, synced, renamed over an older file, and the directory is synced. A path that
// names a device or a pipe is written in place. The directory must exist.
//
// A process whose file size is limited (ulimit -f) is killed by SIGXFSZ unless it ignores that signal;
// with the signal ignored the limit is an Error like a full disk.
class AtomicFile {
 public:
  explicit AtomicFile(const std::string& path);
  ~AtomicFile();
  AtomicFile(const AtomicFile&) = delete;
  AtomicFile& operator=(const AtomicFile&) = delete;

  void write(const void* bytes, size_t size);
  void write(std::string_view text) { write(text.data(), text.size()); }

  // Overwrites bytes from the file's start, for a header whose content is known last.
  void rewrite_start(std::string_view text);

  void commit();

 private:
  [[noreturn]] void fail_system(const char* action) const;

  std::string path_;       // the final name
  std::string temporary_;  // empty when written in place
  int descriptor_ = -1;
};

// AtomicFile in one call.
void write_file_atomic(const std::string& path, std::string_view text);

// A directory that appears whole or not at all: fill path() ("NAME.partial"), then publish(). What a killed
// process left under that name is cleared; an unpublished one is removed by the destructor.
class AtomicDirectory {
 public:
  explicit AtomicDirectory(std::filesystem::path final_path);
  ~AtomicDirectory();
  AtomicDirectory(const AtomicDirectory&) = delete;
  AtomicDirectory& operator=(const AtomicDirectory&) = delete;

  const std::filesystem::path& path() const { return partial_; }

  // Syncs every file and directory inside and renames. A directory that stands at the final name is kept,
  // and publish() throws, unless it is empty or `replace` is set; then it is exchanged and removed.
  void publish(bool replace = false);

 private:
  std::filesystem::path final_, partial_;
  bool published_ = false;
};

// A whole file in memory, read on demand. The pages are private to this process: writing to them is
// possible and never reaches the file. The file must not be truncated while mapped.
class MappedFile {
 public:
  explicit MappedFile(const std::string& path);
  ~MappedFile();
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;

  std::byte* data() const { return data_; }
  uint64_t size() const { return size_; }
  const std::string& path() const { return path_; }

 private:
  std::string path_;
  std::byte* data_ = nullptr;
  uint64_t size_ = 0;
};

}  // namespace oryx::formats
