// Documents out of text files. In .txt files a line that is exactly `<|endoftext|>` ends a document: the line
// and its line feed are the mark, every other byte belongs to a document; a file without such a line is one
// document. In .jsonl files every line is an object whose "text" is a document. Either may be compressed
// (.gz, .xz, .zst). Empty documents are skipped.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "tokenizer/byte_source.h"

namespace oryx::tokenizer {

// The files that `paths` stand for: files as given, directories walked in name order for the extensions above
// (links to directories are not followed). "-" is standard input, plain text, as are pipes and devices.
// Throws Error for a path that does not exist, a file with another extension, and a directory without a text
// file.
std::vector<std::string> find_text_files(const std::vector<std::string>& paths);

// A document or, where it is long, a part of one.
struct TextPiece {
  std::string bytes;
  bool ends_document = true;
};

class TextReader {
 public:
  // Where a text may be cut, as Tokenizer::safe_cut.
  using Cut = std::function<size_t(std::string_view)>;

  // Reads `files` one after the other. Documents of .txt files that are longer than `piece_bytes` are given
  // out in pieces of about that size, cut where `cut` allows it.
  explicit TextReader(std::vector<std::string> files, size_t piece_bytes = SIZE_MAX, Cut cut = {});

  // The next piece; false at the end. Throws Error naming the file (and line of a .jsonl file) that is
  // unreadable, corrupt or malformed.
  bool next(TextPiece& piece);

  // Bytes read from the files so far, before decompression. May be called from another thread.
  uint64_t file_bytes() const { return file_bytes_; }

 private:
  bool next_text(TextPiece& piece);
  bool next_line(TextPiece& piece);
  bool read_more();
  void open_next();
  std::string_view pending() const { return std::string_view(buffer_).substr(begin_); }
  void take(size_t size, size_t skip, TextPiece& piece);

  std::vector<std::string> files_;
  size_t piece_bytes_;
  Cut cut_;

  // The file being read. buffer_[begin_, …) has been read and not given out, and no mark starts in the first
  // scanned_ bytes of it.
  size_t file_ = 0;
  std::unique_ptr<ByteSource> source_;
  bool lines_ = false;  // .jsonl
  bool ended_ = false;  // the source gave its last byte
  std::string buffer_;
  size_t begin_ = 0, scanned_ = 0;
  bool at_line_start_ = true;  // pending() starts a line
  bool in_document_ = false;   // a piece of the document has been given out
  size_t cut_from_ = 0;        // try to cut when pending() is this long
  uint64_t line_ = 0;
  uint64_t finished_bytes_ = 0;
  std::atomic<uint64_t> file_bytes_{0};
};

}  // namespace oryx::tokenizer
