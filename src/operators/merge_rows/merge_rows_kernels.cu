#include "operators/merge_rows/merge_rows_kernels.h"

#include <algorithm>

#include "operators/device/pointwise.h"

namespace oryx::cuda {

using namespace device;

namespace {

constexpr int kThreads = 256;
// Rows of one block, and units of a thread whose loads are under way together.
constexpr int kRows = 8, kAhead = 4;

template <int bytes>
struct alignas(bytes) Unit {
  uint16_t words[bytes / 2];
};

// blockIdx.y is the part; a warp a row.
template <int bytes>
__global__ void __launch_bounds__(kThreads) merge_rows_kernel(const RowMerge p) {
  using Element = Unit<bytes>;
  const MergePart& part = p.part[blockIdx.y];
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kRows + threadIdx.x / 32;
  if (row >= part.count) return;
  const int64_t units = p.row_bytes / bytes;
  Element* whole = static_cast<Element*>(p.whole) + part.rows[row] * units;
  Element* packed = static_cast<Element*>(part.packed) + row * units;
  const Element* from = p.scatter ? packed : whole;
  Element* to = p.scatter ? whole : packed;
  for (int64_t first = threadIdx.x % 32; first < units; first += 32 * kAhead) {
    Element values[kAhead];
#pragma unroll
    for (int k = 0; k < kAhead; ++k)
      if (first + 32 * k < units) values[k] = from[first + 32 * k];
#pragma unroll
    for (int k = 0; k < kAhead; ++k)
      if (first + 32 * k < units) to[first + 32 * k] = values[k];
  }
}

}  // namespace

void merge_rows(const RowMerge& p, void* stream) {
  int64_t most = 0;
  for (int i = 0; i < p.parts; ++i) most = std::max(most, p.part[i].count);
  const dim3 grid(static_cast<unsigned>((most + kRows - 1) / kRows), static_cast<unsigned>(p.parts));
  switch (p.unit) {
    case 16:
      return launch<merge_rows_kernel<16>>(grid, kThreads, 0, stream, p);
    case 8:
      return launch<merge_rows_kernel<8>>(grid, kThreads, 0, stream, p);
    case 4:
      return launch<merge_rows_kernel<4>>(grid, kThreads, 0, stream, p);
    default:
      return launch<merge_rows_kernel<2>>(grid, kThreads, 0, stream, p);
  }
}

}  // namespace oryx::cuda
