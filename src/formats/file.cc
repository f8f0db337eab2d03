#include "formats/file.h"

#include <fcntl.h>
#include <linux/fs.h>
#include <stdio.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <system_error>

#include "base/error.h"

namespace oryx::formats {
namespace {

namespace fs = std::filesystem;

std::string reason(int error) { return std::generic_category().message(error); }

// A file descriptor that closes itself.
class Descriptor {
 public:
  Descriptor(const char* path, int flags) : value_(::open(path, flags | O_CLOEXEC)) {}
  ~Descriptor() {
    if (value_ >= 0) ::close(value_);
  }
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;
  int get() const { return value_; }

 private:
  int value_;
};

// Devices and some file systems cannot sync, and say so; nothing is lost by that.
bool sync_descriptor(int descriptor) {
  return ::fsync(descriptor) == 0 || errno == EINVAL || errno == ENOTSUP;
}

void sync_path(const fs::path& path, int flags) {
  Descriptor descriptor(path.c_str(), O_RDONLY | flags);
  if (descriptor.get() < 0 || !sync_descriptor(descriptor.get()))
    fail("cannot sync {}: {}", path.string(), reason(errno));
}

void sync_directory(const fs::path& path) { sync_path(path.empty() ? fs::path(".") : path, O_DIRECTORY); }

bool is_nonempty_or_no_directory(const fs::path& path) {
  std::error_code error;
  if (!fs::exists(fs::symlink_status(path))) return false;
  return !fs::is_directory(path, error) || !fs::is_empty(path, error) || error;
}

// With `exchange`, `from` is left holding the older directory. That happens in one step, so that a reader
// finds one or the other at any moment; file systems that cannot do it get three.
bool rename_directory(const fs::path& from, const fs::path& to, bool exchange) {
  if (!exchange) return ::rename(from.c_str(), to.c_str()) == 0;
  if (::renameat2(AT_FDCWD, from.c_str(), AT_FDCWD, to.c_str(), RENAME_EXCHANGE) == 0) return true;
  if (errno != EINVAL && errno != ENOSYS) return false;
  fs::path aside = to;
  aside += ".replaced";
  return ::rename(to.c_str(), aside.c_str()) == 0 && ::rename(from.c_str(), to.c_str()) == 0 &&
         ::rename(aside.c_str(), from.c_str()) == 0;
}

}  // namespace

std::string read_file(const std::string& path) {
  Descriptor descriptor(path.c_str(), O_RDONLY);
  if (descriptor.get() < 0) fail("cannot open {}: {}", path, reason(errno));
  struct stat status {};
  std::string text;
  if (::fstat(descriptor.get(), &status) == 0 && S_ISREG(status.st_mode)) text.reserve(status.st_size);
  char buffer[1 << 16];
  for (;;) {
    const ssize_t size = ::read(descriptor.get(), buffer, sizeof buffer);
    if (size == 0) return text;
    if (size > 0) {
      text.append(buffer, size);
    } else if (errno != EINTR) {
      fail("cannot read {}: {}", path, reason(errno));
    }
  }
}

AtomicFile::AtomicFile(const std::string& path) : path_(path) {
  std::error_code error;
  const fs::file_status status = fs::status(path, error);
  if (fs::is_directory(status)) fail("cannot write {}: it is a directory", path);
  if (fs::exists(status) && !fs::is_regular_file(status)) {
    descriptor_ = ::open(path.c_str(), O_WRONLY | O_CLOEXEC);
    if (descriptor_ < 0) fail("cannot open {}: {}", path, reason(errno));
    return;
  }
  if (fs::is_symlink(fs::symlink_status(path, error))) path_ = fs::weakly_canonical(path, error).string();
  static std::atomic<uint64_t> counter{0};
  temporary_ = fmt::format("{}.partial-{}-{}", path_, ::getpid(), counter++);
  descriptor_ = ::open(temporary_.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
  if (descriptor_ < 0) fail("cannot create {}: {}", path, reason(errno));
}

AtomicFile::~AtomicFile() {
  if (descriptor_ < 0) return;
  ::close(descriptor_);
  if (!temporary_.empty()) ::unlink(temporary_.c_str());
}

void AtomicFile::fail_system(const char* action) const {
  fail("cannot {} {}: {}", action, path_, reason(errno));
}

void AtomicFile::write(const void* bytes, size_t size) {
  constexpr size_t kLargest = size_t{1} << 30;  // the kernel writes at most 2 GiB a call
  const char* next = static_cast<const char*>(bytes);
  while (size > 0) {
    const ssize_t written = ::write(descriptor_, next, std::min(size, kLargest));
    if (written < 0) {
      if (errno == EINTR) continue;
      fail_system("write");
    }
    next += written;
    size -= written;
  }
}

void AtomicFile::rewrite_start(std::string_view text) {
  if (::lseek(descriptor_, 0, SEEK_SET) < 0) fail_system("rewrite");
  write(text);
  if (::lseek(descriptor_, 0, SEEK_END) < 0) fail_system("rewrite");
}

void AtomicFile::commit() {
  if (!sync_descriptor(descriptor_)) fail_system("sync");
  // close() may report what a network file system could not store; the descriptor is gone either way.
  const int descriptor = std::exchange(descriptor_, -1);
  const bool closed = ::close(descriptor) == 0;
  if (temporary_.empty()) {
    if (!closed) fail_system("close");
    return;
  }
  if (!closed || ::rename(temporary_.c_str(), path_.c_str()) != 0) {
    const int error = errno;
    ::unlink(temporary_.c_str());
    errno = error;
    fail_system("write");
  }
  sync_directory(fs::path(path_).parent_path());
}

void write_file_atomic(const std::string& path, std::string_view text) {
  AtomicFile file(path);
  file.write(text);
  file.commit();
}

AtomicDirectory::AtomicDirectory(fs::path final_path) : final_(std::move(final_path)) {
  if (!final_.has_filename()) final_ = final_.parent_path();  // "runs/model/"
  partial_ = final_;
  partial_ += ".partial";
  std::error_code error;
  fs::remove_all(partial_, error);
  if (error) fail("cannot clear {}: {}", partial_.string(), error.message());
  if (::mkdir(partial_.c_str(), 0777) != 0) fail("cannot create {}: {}", partial_.string(), reason(errno));
}

AtomicDirectory::~AtomicDirectory() {
  if (published_) return;
  std::error_code ignored;
  fs::remove_all(partial_, ignored);
}

void AtomicDirectory::publish(bool replace) {
  const bool occupied = is_nonempty_or_no_directory(final_);
  expect(!occupied || (replace && fs::is_directory(final_)), "cannot publish {}: the name is taken{}",
         final_.string(), replace ? " by something that is no directory" : "");
  for (const fs::directory_entry& entry : fs::recursive_directory_iterator(partial_)) {
    if (entry.is_symlink()) continue;
    if (entry.is_directory() || entry.is_regular_file()) sync_path(entry.path(), 0);
  }
  sync_directory(partial_);
  if (!rename_directory(partial_, final_, occupied))
    fail("cannot publish {}: {}", final_.string(), reason(errno));
  published_ = true;
  sync_directory(final_.parent_path());
  std::error_code ignored;
  if (occupied) fs::remove_all(partial_, ignored);
}

MappedFile::MappedFile(const std::string& path) : path_(path) {
  Descriptor descriptor(path.c_str(), O_RDONLY);
  struct stat status {};
  if (descriptor.get() < 0 || ::fstat(descriptor.get(), &status) != 0)
    fail("cannot open {}: {}", path, reason(errno));
  expect(S_ISREG(status.st_mode), "cannot map {}: it is no regular file", path);
  size_ = static_cast<uint64_t>(status.st_size);
  if (size_ == 0) return;
  void* address =
      ::mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_NORESERVE, descriptor.get(), 0);
  if (address == MAP_FAILED) fail("cannot map {}: {}", path, reason(errno));
  data_ = static_cast<std::byte*>(address);
}

MappedFile::~MappedFile() {
  if (data_) ::munmap(data_, size_);
}

}  // namespace oryx::formats
