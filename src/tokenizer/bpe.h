// Byte-pair encoding of one piece of text: the rank-ordered merges of a byte-level BPE, exact for pieces of
// any length in O(n log n).
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

namespace oryx::tokenizer {

struct BpeModel {
  std::vector<std::pair<std::string, int32_t>> vocabulary;  // bytes and id of each token made of bytes
  std::vector<std::pair<std::string, std::string>> merges;  // bytes of left and right, best first
  bool ignore_merges = false;                               // a piece that is a token is that token
};

class Bpe {
 public:
  // Throws Error when a byte has no token, or a merge's parts or result are not in the vocabulary.
  explicit Bpe(const BpeModel& model);
  Bpe(const Bpe&) = delete;
  Bpe& operator=(const Bpe&) = delete;

  // Buffers of encode(), one per thread.
  struct Workspace {
    std::vector<uint32_t> ids, ranks, merged, previous, next;
    std::vector<uint64_t> heap;
  };

  // Appends the ids of the piece.
  void encode(std::string_view piece, Workspace& work, std::vector<int32_t>& ids) const;

 private:
  struct Merge {
    uint32_t rank;  // kNoMerge when the pair does not merge
    uint32_t id;
  };
  static constexpr uint32_t kNoMerge = UINT32_MAX;

  // Open addressing; an empty slot has the key kEmpty, which no pair of ids makes.
  struct Slot {
    uint64_t pair;
    Merge merge;
  };
  static constexpr uint64_t kEmpty = UINT64_MAX;

  size_t slot_of(uint64_t pair) const { return (pair * 0x9E3779B97F4A7C15u) >> shift_; }
  Merge find_merge(uint32_t left, uint32_t right) const;
  void merge_short(Workspace& work) const;
  void merge_long(Workspace& work) const;

  std::unordered_map<std::string, int32_t> by_bytes_;
  std::array<uint32_t, 256> byte_ids_;
  std::vector<Slot> slots_;
  int shift_ = 0;
  bool ignore_merges_;
};

// Remembers the ids of short pieces, which repeat: a fixed number of entries, each overwritten by the last
// piece that falls on it.
class PieceCache {
 public:
  static constexpr size_t kMaxBytes = 23, kMaxIds = 9;

  // A piece's bytes, zero-padded, with their number in the last byte.
  using Key = std::array<uint64_t, 3>;

  struct alignas(64) Entry {
    Key key{};
    uint32_t count = 0;
    std::array<int32_t, kMaxIds> ids;
  };

  PieceCache() : entries_(std::make_unique<Entry[]>(kEntries)) {}

  // The key of a piece of 1 to kMaxBytes bytes, within a text that ends at `text_end`.
  static Key key_of(std::string_view piece, const char* text_end) {
    const size_t size = piece.size();
    Key key{};
    if (text_end - piece.data() >= static_cast<std::ptrdiff_t>(sizeof(key))) {
      // A copy of fixed size and masks cost a tenth of a copy of the piece's own size.
      std::memcpy(key.data(), piece.data(), sizeof(key));
      for (size_t i = 0; i < key.size(); ++i) {
        const size_t bytes = size < 8 * i ? 0 : size - 8 * i;
        key[i] &= bytes >= 8 ? ~uint64_t{0} : (uint64_t{1} << 8 * bytes) - 1;
      }
    } else {
      std::memcpy(key.data(), piece.data(), size);
    }
    key[2] |= uint64_t{size} << 56;
    return key;
  }

  // As ==, which compilers make a call of memcmp.
  static bool same(const Key& a, const Key& b) {
    return ((a[0] ^ b[0]) | (a[1] ^ b[1]) | (a[2] ^ b[2])) == 0;
  }

  // The entry where the piece's ids are, or belong.
  Entry& entry(const Key& key) {
    uint64_t hash = key[0] * 0x9E3779B97F4A7C15u;
    hash = (hash ^ (hash >> 29) ^ key[1]) * 0xBF58476D1CE4E5B9u;
    hash = (hash ^ (hash >> 32) ^ key[2]) * 0x94D049BB133111EBu;
    return entries_[hash >> (64 - kBits)];
  }

 private:
  static constexpr int kBits = 16;
  static constexpr size_t kEntries = size_t{1} << kBits;
  std::unique_ptr<Entry[]> entries_;
};

}  // namespace oryx::tokenizer
