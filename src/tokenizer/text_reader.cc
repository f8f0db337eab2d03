#include "tokenizer/text_reader.h"

#include <algorithm>
#include <filesystem>
#include <nlohmann/json.hpp>

#include "base/error.h"

namespace oryx::tokenizer {

namespace {

namespace fs = std::filesystem;
using nlohmann::json;

constexpr std::string_view kMark = "<|endoftext|>";
constexpr size_t kReadBytes = 1 << 18;
constexpr const char* kExtensions = ".txt or .jsonl, plain or with .gz, .xz or .zst";

std::string_view without_compression(std::string_view path) {
  for (const std::string_view extension : {".gz", ".xz", ".zst"}) {
    if (path.ends_with(extension)) return path.substr(0, path.size() - extension.size());
  }
  return path;
}

bool is_json_lines(std::string_view path) { return without_compression(path).ends_with(".jsonl"); }

bool is_text_file(std::string_view path) {
  return without_compression(path).ends_with(".txt") || is_json_lines(path);
}

void walk(const fs::path& directory, std::vector<std::string>& files) {
  std::vector<fs::path> entries;
  std::error_code error;
  for (fs::directory_iterator at(directory, error), end; !error && at != end; at.increment(error)) {
    entries.push_back(at->path());
  }
  expect(!error, "cannot read the directory {}: {}", directory.string(), error.message());
  std::sort(entries.begin(), entries.end());
  for (const fs::path& entry : entries) {
    if (fs::is_directory(fs::symlink_status(entry))) {
      walk(entry, files);
    } else if (is_text_file(entry.string()) && !fs::is_directory(entry)) {
      files.push_back(entry.string());
    }
  }
}

}  // namespace

std::vector<std::string> find_text_files(const std::vector<std::string>& paths) {
  std::vector<std::string> files;
  for (const std::string& path : paths) {
    std::error_code error;
    const fs::file_status status = fs::status(path, error);
    if (path == "-") {
      files.push_back(path);
    } else if (!fs::exists(status)) {
      fail("no such file or directory: {}", path);
    } else if (fs::is_directory(status)) {
      const size_t before = files.size();
      walk(path, files);
      expect(files.size() > before, "no text files in {}: expected {}", path, kExtensions);
    } else {
      expect(!fs::is_regular_file(status) || is_text_file(path), "{} is no text file: expected {}", path,
             kExtensions);
      files.push_back(path);
    }
  }
  return files;
}

TextReader::TextReader(std::vector<std::string> files, size_t piece_bytes, Cut cut)
    : files_(std::move(files)), piece_bytes_(piece_bytes), cut_(std::move(cut)) {}

void TextReader::open_next() {
  const std::string& path = files_[file_];
  source_ = ByteSource::open(path);
  lines_ = is_json_lines(path);
  ended_ = false;
  buffer_.clear();
  begin_ = scanned_ = 0;
  at_line_start_ = true;
  in_document_ = false;
  cut_from_ = piece_bytes_;
  line_ = 0;
}

bool TextReader::next(TextPiece& piece) {
  for (; file_ < files_.size(); ++file_) {
    if (source_ == nullptr) open_next();
    if (lines_ ? next_line(piece) : next_text(piece)) return true;
    finished_bytes_ += source_->file_bytes();
    source_.reset();
  }
  return false;
}

// False when the file has no more bytes.
bool TextReader::read_more() {
  if (ended_) return false;
  buffer_.erase(0, begin_);
  begin_ = 0;
  const size_t size = buffer_.size();
  buffer_.resize(size + kReadBytes);
  const size_t count = source_->read(buffer_.data() + size, kReadBytes);
  buffer_.resize(size + count);
  file_bytes_ = finished_bytes_ + source_->file_bytes();
  ended_ = count == 0;
  return !ended_;
}

// Moves the next `size` bytes into the piece and drops `skip` more.
void TextReader::take(size_t size, size_t skip, TextPiece& piece) {
  piece.bytes.assign(pending().substr(0, size));
  begin_ += size + skip;
  scanned_ -= std::min(scanned_, size + skip);
}

bool TextReader::next_text(TextPiece& piece) {
  for (;;) {
    const std::string_view text = pending();
    const size_t mark = text.find(kMark, scanned_);
    if (mark != std::string_view::npos) {
      const size_t after = mark + kMark.size();
      scanned_ = mark;
      if (after == text.size() && read_more()) continue;  // is the line longer than the mark?
      const std::string_view now = pending();
      const bool starts_line = mark == 0 ? at_line_start_ : now[mark - 1] == '\n';
      if (!starts_line || (after < now.size() && now[after] != '\n')) {
        scanned_ = mark + 1;
        continue;
      }
      const bool has_document = mark > 0 || in_document_;
      take(mark, kMark.size() + (after < now.size() ? 1 : 0), piece);
      at_line_start_ = true;
      in_document_ = false;
      cut_from_ = piece_bytes_;
      if (!has_document) continue;
      piece.ends_document = true;
      return true;
    }
    if (text.size() >= kMark.size()) scanned_ = std::max(scanned_, text.size() - kMark.size() + 1);
    if (text.size() >= cut_from_ && cut_) {
      // The last bytes may be the start of a mark: they stay together.
      if (const size_t cut = cut_(text.substr(0, scanned_))) {
        at_line_start_ = text[cut - 1] == '\n';
        take(cut, 0, piece);
        in_document_ = true;
        cut_from_ = piece_bytes_;
        piece.ends_document = false;
        return true;
      }
      cut_from_ = 2 * text.size();
    }
    if (read_more()) continue;
    const size_t size = pending().size();
    if (size == 0 && !in_document_) return false;
    take(size, 0, piece);
    in_document_ = false;
    piece.ends_document = true;
    return true;
  }
}

bool TextReader::next_line(TextPiece& piece) {
  for (;;) {
    const std::string_view text = pending();
    size_t end = text.find('\n', scanned_);
    if (end == std::string_view::npos) {
      scanned_ = text.size();
      if (read_more()) continue;
      if (pending().empty()) return false;
      end = pending().size();
    }
    ++line_;
    const std::string_view line = pending().substr(0, end);
    const bool blank = line.find_first_not_of(" \t\r") == std::string_view::npos;
    if (!blank) {
      const auto where = [&] { return fmt::format("{} line {}", files_[file_], line_); };
      json value;
      try {
        value = json::parse(line);
      } catch (const json::exception& error) {
        fail("{}: malformed JSON: {}", where(), error.what());
      }
      expect(value.is_object() && value.contains("text") && value["text"].is_string(),
             "{}: expected an object with a string \"text\"", where());
      piece.bytes = std::move(value["text"].get_ref<std::string&>());
    }
    begin_ += std::min(end + 1, pending().size());
    scanned_ = 0;
    if (blank || piece.bytes.empty()) continue;
    piece.ends_document = true;
    return true;
  }
}

}  // namespace oryx::tokenizer
