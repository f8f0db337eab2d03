#include "tokenizer/byte_source.h"

#include <fcntl.h>
#include <lzma.h>
#include <unistd.h>
#include <zlib.h>
#include <zstd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <vector>

#include "base/error.h"

namespace oryx::tokenizer {

namespace {

class File final : public ByteSource {
 public:
  explicit File(const std::string& path) : path_(path == "-" ? "standard input" : path) {
    descriptor_ = path == "-" ? STDIN_FILENO : ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
    expect(descriptor_ >= 0, "cannot open {}: {}", path_, std::strerror(errno));
  }
  ~File() override {
    if (descriptor_ != STDIN_FILENO) ::close(descriptor_);
  }
  File(const File&) = delete;
  File& operator=(const File&) = delete;

  size_t read(char* out, size_t size) override {
    for (;;) {
      const ssize_t count = ::read(descriptor_, out, size);
      if (count >= 0) {
        bytes_ += static_cast<uint64_t>(count);
        return static_cast<size_t>(count);
      }
      expect(errno == EINTR, "cannot read {}: {}", path_, std::strerror(errno));
    }
  }

  uint64_t file_bytes() const override { return bytes_; }
  const std::string& path() const { return path_; }

 private:
  std::string path_;
  int descriptor_;
  uint64_t bytes_ = 0;
};

// A file of one or more compressed streams. The codec turns input into output until it has no more of either.
class CompressedFile : public ByteSource {
 public:
  CompressedFile(const std::string& path, const char* format) : file_(path), format_(format) {}

  size_t read(char* out, size_t size) override {
    for (;;) {
      if (unused_ == 0 && !ended_) {
        unused_ = file_.read(input_.data(), input_.size());
        next_ = input_.data();
        ended_ = unused_ == 0;
      }
      if (ended_ && at_boundary()) return 0;
      // At the end of the input there may still be output that did not fit before.
      const size_t written = decode(out, size);
      if (written > 0) return written;
      expect(!ended_, "{}: the {} data is cut off", file_.path(), format_);
    }
  }

  uint64_t file_bytes() const override { return file_.file_bytes(); }

 protected:
  // Consumes from next_/unused_ and returns the bytes written to `out`; does one of both unless the input
  // ended.
  virtual size_t decode(char* out, size_t size) = 0;
  // True when the input may end here.
  virtual bool at_boundary() const = 0;

  [[noreturn]] void fail_corrupt(const char* reason) const {
    fail("{}: the {} data is corrupt: {}", file_.path(), format_, reason);
  }

  const char* next_ = nullptr;
  size_t unused_ = 0;

 private:
  File file_;
  const char* format_;
  std::vector<char> input_ = std::vector<char>(1 << 16);
  bool ended_ = false;
};

class GzipFile final : public CompressedFile {
 public:
  explicit GzipFile(const std::string& path) : CompressedFile(path, "gzip") {
    expect(inflateInit2(&stream_, 15 + 16) == Z_OK, "{}: cannot start zlib", path);
  }
  ~GzipFile() override { inflateEnd(&stream_); }

 private:
  size_t decode(char* out, size_t size) override {
    if (between_members_) {
      inflateReset(&stream_);
      between_members_ = false;
    }
    stream_.next_in = reinterpret_cast<Bytef*>(const_cast<char*>(next_));
    stream_.avail_in = static_cast<uInt>(unused_);
    stream_.next_out = reinterpret_cast<Bytef*>(out);
    stream_.avail_out = static_cast<uInt>(std::min<size_t>(size, 1 << 30));
    const size_t room = stream_.avail_out;
    const int status = inflate(&stream_, Z_NO_FLUSH);
    next_ = reinterpret_cast<const char*>(stream_.next_in);
    unused_ = stream_.avail_in;
    if (status == Z_STREAM_END) {
      between_members_ = true;
    } else if (status != Z_OK && status != Z_BUF_ERROR) {
      fail_corrupt(stream_.msg != nullptr ? stream_.msg : zError(status));
    }
    return room - stream_.avail_out;
  }
  bool at_boundary() const override { return between_members_; }

  z_stream stream_{};
  bool between_members_ = false;
};

class XzFile final : public CompressedFile {
 public:
  explicit XzFile(const std::string& path) : CompressedFile(path, "xz") {
    expect(lzma_stream_decoder(&stream_, UINT64_MAX, 0) == LZMA_OK, "{}: cannot start liblzma", path);
  }
  ~XzFile() override { lzma_end(&stream_); }

 private:
  size_t decode(char* out, size_t size) override {
    if (between_streams_) {
      // Streams may be followed by zero bytes, then by another stream.
      while (unused_ > 0 && *next_ == 0) ++next_, --unused_;
      if (unused_ == 0) return 0;
      expect(lzma_stream_decoder(&stream_, UINT64_MAX, 0) == LZMA_OK, "cannot start liblzma");
      between_streams_ = false;
    }
    stream_.next_in = reinterpret_cast<const uint8_t*>(next_);
    stream_.avail_in = unused_;
    stream_.next_out = reinterpret_cast<uint8_t*>(out);
    stream_.avail_out = size;
    const lzma_ret status = lzma_code(&stream_, LZMA_RUN);
    next_ = reinterpret_cast<const char*>(stream_.next_in);
    unused_ = stream_.avail_in;
    if (status == LZMA_STREAM_END) {
      between_streams_ = true;
    } else if (status != LZMA_OK && status != LZMA_BUF_ERROR) {
      fail_corrupt(status == LZMA_FORMAT_ERROR    ? "not an xz file"
                   : status == LZMA_MEM_ERROR     ? "out of memory"
                   : status == LZMA_OPTIONS_ERROR ? "unsupported options"
                                                  : "a check failed");
    }
    return size - stream_.avail_out;
  }
  bool at_boundary() const override { return between_streams_; }

  lzma_stream stream_ = LZMA_STREAM_INIT;
  bool between_streams_ = false;
};

class ZstdFile final : public CompressedFile {
 public:
  explicit ZstdFile(const std::string& path) : CompressedFile(path, "zstd"), stream_(ZSTD_createDStream()) {
    expect(stream_ != nullptr, "{}: cannot start zstd", path);
  }
  ~ZstdFile() override { ZSTD_freeDStream(stream_); }

 private:
  size_t decode(char* out, size_t size) override {
    ZSTD_inBuffer input{next_, unused_, 0};
    ZSTD_outBuffer output{out, size, 0};
    const size_t status = ZSTD_decompressStream(stream_, &output, &input);
    if (ZSTD_isError(status)) fail_corrupt(ZSTD_getErrorName(status));
    next_ += input.pos;
    unused_ -= input.pos;
    between_frames_ = status == 0;
    return output.pos;
  }
  bool at_boundary() const override { return between_frames_; }

  ZSTD_DStream* stream_;
  bool between_frames_ = false;
};

}  // namespace

std::unique_ptr<ByteSource> ByteSource::open(const std::string& path) {
  if (path.ends_with(".gz")) return std::make_unique<GzipFile>(path);
  if (path.ends_with(".xz")) return std::make_unique<XzFile>(path);
  if (path.ends_with(".zst")) return std::make_unique<ZstdFile>(path);
  return std::make_unique<File>(path);
}

}  // namespace oryx::tokenizer
