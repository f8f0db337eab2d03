#include "tokenizer/bpe.h"

#include <algorithm>
#include <bit>
#include <functional>

#include "base/error.h"

namespace oryx::tokenizer {

namespace {

// Up to this many symbols a scan for the best pair beats a heap.
constexpr size_t kShort = 96;

constexpr uint32_t kEnd = UINT32_MAX;

}  // namespace

Bpe::Bpe(const BpeModel& model) : ignore_merges_(model.ignore_merges) {
  by_bytes_.reserve(model.vocabulary.size());
  for (const auto& [bytes, id] : model.vocabulary) by_bytes_.emplace(bytes, id);
  for (int byte = 0; byte < 256; ++byte) {
    const auto found = by_bytes_.find(std::string(1, static_cast<char>(byte)));
    expect(found != by_bytes_.end(),
           "the vocabulary has no token for byte {:#04x}: expected a byte-level BPE", byte);
    byte_ids_[byte] = static_cast<uint32_t>(found->second);
  }
  const size_t size = std::bit_ceil(std::max<size_t>(16, 2 * model.merges.size()));
  slots_.assign(size, Slot{kEmpty, {kNoMerge, 0}});
  shift_ = 64 - std::countr_zero(size);
  for (size_t rank = 0; rank < model.merges.size(); ++rank) {
    const auto& [left, right] = model.merges[rank];
    const auto id_of = [&](const std::string& bytes) {
      const auto found = by_bytes_.find(bytes);
      expect(found != by_bytes_.end(), "merge {} ('{}' and '{}'): the vocabulary has no token '{}'", rank,
             left, right, bytes);
      return static_cast<uint32_t>(found->second);
    };
    const uint64_t pair = uint64_t{id_of(left)} << 32 | id_of(right);
    size_t slot = slot_of(pair);
    while (slots_[slot].pair != kEmpty && slots_[slot].pair != pair) slot = (slot + 1) & (size - 1);
    slots_[slot] = {pair, {static_cast<uint32_t>(rank), id_of(left + right)}};
  }
}

Bpe::Merge Bpe::find_merge(uint32_t left, uint32_t right) const {
  const uint64_t pair = uint64_t{left} << 32 | right;
  for (size_t slot = slot_of(pair);; slot = (slot + 1) & (slots_.size() - 1)) {
    if (slots_[slot].pair == pair) return slots_[slot].merge;
    if (slots_[slot].pair == kEmpty) return {kNoMerge, 0};
  }
}

void Bpe::encode(std::string_view piece, Workspace& work, std::vector<int32_t>& ids) const {
  if (ignore_merges_) {
    const auto found = by_bytes_.find(std::string(piece));
    if (found != by_bytes_.end()) {
      ids.push_back(found->second);
      return;
    }
  }
  expect(piece.size() < kEnd, "a piece of {} bytes without a place to split it is too long", piece.size());
  const size_t count = piece.size();
  work.ids.resize(count);
  work.ranks.resize(count);
  work.merged.resize(count);
  for (size_t i = 0; i < count; ++i) work.ids[i] = byte_ids_[static_cast<uint8_t>(piece[i])];
  for (size_t i = 0; i < count; ++i) {
    const Merge merge = i + 1 < count ? find_merge(work.ids[i], work.ids[i + 1]) : Merge{kNoMerge, 0};
    work.ranks[i] = merge.rank;
    work.merged[i] = merge.id;
  }
  if (count <= kShort) {
    merge_short(work);
  } else {
    merge_long(work);
  }
  ids.insert(ids.end(), work.ids.begin(), work.ids.end());
}

// ranks[i] and merged[i] are the merge of symbols i and i + 1. Repeats: merge the leftmost pair of lowest
// rank.
void Bpe::merge_short(Workspace& work) const {
  uint32_t* const ids = work.ids.data();
  uint32_t* const ranks = work.ranks.data();
  uint32_t* const merged = work.merged.data();
  size_t count = work.ids.size();
  const auto refresh = [&](size_t i) {
    const Merge merge = i + 1 < count ? find_merge(ids[i], ids[i + 1]) : Merge{kNoMerge, 0};
    ranks[i] = merge.rank;
    merged[i] = merge.id;
  };
  while (count > 1) {
    const size_t best = std::min_element(ranks, ranks + count) - ranks;
    if (ranks[best] == kNoMerge) break;
    ids[best] = merged[best];
    std::copy(ids + best + 2, ids + count, ids + best + 1);
    std::copy(ranks + best + 2, ranks + count, ranks + best + 1);
    std::copy(merged + best + 2, merged + count, merged + best + 1);
    --count;
    refresh(best);
    if (best > 0) refresh(best - 1);
  }
  work.ids.resize(count);
}

// The same with a heap of (rank, position) over a linked list. An entry of the heap is stale when its
// position has been merged away or has another rank by now.
void Bpe::merge_long(Workspace& work) const {
  const uint32_t count = static_cast<uint32_t>(work.ids.size());
  std::vector<uint32_t>&ids = work.ids, &ranks = work.ranks, &next = work.next, &previous = work.previous;
  std::vector<uint64_t>& heap = work.heap;
  next.resize(count);
  previous.resize(count);
  heap.clear();
  for (uint32_t i = 0; i < count; ++i) {
    next[i] = i + 1 < count ? i + 1 : kEnd;
    previous[i] = i > 0 ? i - 1 : kEnd;
    if (ranks[i] != kNoMerge) heap.push_back(uint64_t{ranks[i]} << 32 | i);
  }
  std::make_heap(heap.begin(), heap.end(), std::greater<>());
  const auto refresh = [&](uint32_t i) {
    const Merge merge = next[i] == kEnd ? Merge{kNoMerge, 0} : find_merge(ids[i], ids[next[i]]);
    ranks[i] = merge.rank;
    work.merged[i] = merge.id;
    if (merge.rank == kNoMerge) return;
    heap.push_back(uint64_t{merge.rank} << 32 | i);
    std::push_heap(heap.begin(), heap.end(), std::greater<>());
  };
  while (!heap.empty()) {
    const uint32_t rank = static_cast<uint32_t>(heap.front() >> 32), at = static_cast<uint32_t>(heap.front());
    std::pop_heap(heap.begin(), heap.end(), std::greater<>());
    heap.pop_back();
    if (ranks[at] != rank) continue;
    const uint32_t taken = next[at];
    ids[at] = work.merged[at];
    ranks[taken] = kNoMerge;
    next[at] = next[taken];
    if (next[at] != kEnd) previous[next[at]] = at;
    refresh(at);
    if (previous[at] != kEnd) refresh(previous[at]);
  }
  size_t size = 0;
  for (uint32_t i = 0; i != kEnd; i = next[i]) ids[size++] = ids[i];
  ids.resize(size);
}

}  // namespace oryx::tokenizer
