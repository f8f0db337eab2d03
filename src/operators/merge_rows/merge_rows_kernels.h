// CUDA kernels of merge_rows.
#pragma once

#include <cstdint>

namespace oryx::cuda {

// Parts of one launch: as many as a model's mixers, with room.
inline constexpr int merge_parts = 16;

struct MergePart {
  void* packed;         // [count, row_bytes], contiguous
  const int64_t* rows;  // [count]
  int64_t count;
};

struct RowMerge {
  int parts;
  MergePart part[merge_parts];
  void* whole;        // rows of row_bytes, contiguous
  int64_t row_bytes;  // a multiple of `unit`
  int unit;           // bytes that every address is aligned to: 16, 8, 4 or 2
  bool scatter;       // whole[rows[j]] = packed[j], else packed[j] = whole[rows[j]]
};
void merge_rows(const RowMerge& arguments, void* stream);

}  // namespace oryx::cuda
