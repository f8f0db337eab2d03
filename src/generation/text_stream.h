// What a reader may be shown of a text that arrives token by token: whole characters, and nothing of a stop
// string. Deals in bytes only; the caller decodes ids.
#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace oryx::generation {

class TextStream {
 public:
  // Bytes of one tag (say, the mode of the tokens they came from); always complete, valid UTF-8.
  struct Piece {
    std::string text;
    int tag = 0;
    bool operator==(const Piece&) const = default;
  };

  // The text ends before the first stop string to be completed, wherever token boundaries fall; of several
  // completed by one byte the longest counts. Throws UsageError on an empty stop string.
  explicit TextStream(std::vector<std::string> stops = {});

  // Takes the next bytes and returns what has become certain. Bytes that are not UTF-8 come out as U+FFFD, as
  // the Unicode standard recommends; a character takes the tag of its first byte.
  std::vector<Piece> push(std::string_view bytes, int tag);

  // Ends the text: what was held back is shown, unless a stop string ended it before.
  std::vector<Piece> finish();

  // A stop string was completed; what follows is ignored.
  bool stopped() const { return stopped_; }

 private:
  size_t match_length() const;  // of the longest stop string that pending_ ends with, or 0
  size_t held_length() const;   // of the longest end of pending_ that may begin a stop string
  void release(size_t size, bool final, std::vector<Piece>& pieces);

  std::vector<std::string> stops_;
  std::string pending_;
  std::vector<int> tags_;  // of each byte of pending_
  bool stopped_ = false;
};

}  // namespace oryx::generation
