#include "operators/device/mma.h"
#include "operators/linear/linear_kernels.h"

namespace oryx::cuda {

using namespace device;

namespace {

constexpr int kThreads = 256;

struct Arguments {
  Rows rows;
  const char* from;
  char* to;
};

__device__ inline uint32_t sum_of(uint32_t x, uint32_t y, bool is_bf16) {
  if (!is_bf16) return __float_as_uint(__uint_as_float(x) + __uint_as_float(y));
  const float2 a = unpack(x), b = unpack(y);
  return pack(a.x + b.x, a.y + b.y);
}

template <bool is_bf16>
__global__ void __launch_bounds__(kThreads) add_kernel(const Arguments p) {
  const int64_t units = p.rows.row_bytes / 16, total = units * p.rows.count;
  const auto* from = reinterpret_cast<const uint4*>(p.from);
  auto* to = reinterpret_cast<uint4*>(p.to);
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < total;
       i += static_cast<int64_t>(gridDim.x) * kThreads) {
    uint4* target = to + p.rows.rows[i / units] * units + i % units;
    const uint4 x = from[i], y = *target;
    *target = {sum_of(x.x, y.x, is_bf16), sum_of(x.y, y.y, is_bf16), sum_of(x.z, y.z, is_bf16),
               sum_of(x.w, y.w, is_bf16)};
  }
}

dim3 grid_of(int64_t units) {
  const int64_t blocks = (units + kThreads - 1) / kThreads;
  return dim3(static_cast<unsigned>(blocks < 16384 ? blocks : 16384));
}

}  // namespace

void add_rows(const Rows& rows, const void* packed, void* to, bool is_bf16, void* stream) {
  const Arguments arguments{rows, static_cast<const char*>(packed), static_cast<char*>(to)};
  const dim3 grid = grid_of(rows.count * rows.row_bytes / 16);
  if (is_bf16) {
    launch<add_kernel<true>>(grid, kThreads, 0, stream, arguments);
  } else {
    launch<add_kernel<false>>(grid, kThreads, 0, stream, arguments);
  }
}

}  // namespace oryx::cuda
