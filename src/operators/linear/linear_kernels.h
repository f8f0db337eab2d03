// Rows added to those of a matrix, 16 bytes at a time.
#pragma once

#include <cstdint>

namespace oryx::cuda {

// Matrices of `row_bytes` a row, contiguous; rows[r] names a row of the large one for row r of the packed
// one.
struct Rows {
  const int64_t* rows;
  int64_t count;
  int64_t row_bytes;
};

// to[rows[r]] += packed[r], elements of bf16 (else float32); the rows are distinct and row_bytes a multiple
// of 16.
void add_rows(const Rows& rows, const void* packed, void* to, bool is_bf16, void* stream);

}  // namespace oryx::cuda
