// Rows picked out of a matrix and put back, 16 bytes at a time where they allow it.
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

// packed[r] = from[rows[r]], zeros where rows[r] is negative
void gather_rows(const Rows& rows, const void* from, void* packed, void* stream);
// to[rows[r]] += packed[r], elements of bf16 (else float32); the rows are distinct.
void add_rows(const Rows& rows, const void* packed, void* to, bool is_bf16, void* stream);

}  // namespace oryx::cuda
