// Products of a warpgroup: four warps that own 64 rows of the result, 16 each. On sm_90a they are wgmma,
// which reads its operands from shared memory once for all four warps and works while they do something else;
// elsewhere the same results come from mma.sync on the same tiles, at once.
//
// A product is issued between warpgroup_fence() (after which it may read registers that were written before)
// and warpgroup_commit(), which ends a group. Groups finish in order. Neither the accumulator nor operands
// may be touched before warpgroup_wait(); settle() after it keeps the compiler from reading accumulators
// earlier. All branches around these functions are taken by whole warpgroups.
#pragma once

#include "operators/device/tile.h"

#ifdef ORYX_EMULATED
#include <algorithm>
#include <deque>
#include <vector>
#endif

namespace oryx::device {

#ifdef ORYX_EMULATED
inline bool has_warpgroup_products = true;  // a test tries both
#elif defined(__CUDA_ARCH_FEAT_SM90_ALL)
constexpr bool has_warpgroup_products = true;
#else
constexpr bool has_warpgroup_products = false;
#endif

// A tile as wgmma takes it: panels of 64 columns, each a Tile<64> of `rows` rows. A multiple of 8 rows; the
// base is aligned to 1024 bytes.
template <int rows, int columns>
struct Panels {
  static_assert(rows % 8 == 0 && columns % 64 == 0);
  bf16* base;

  static constexpr size_t bytes = sizeof(bf16) * rows * columns, panel_bytes = sizeof(bf16) * rows * 64;

  __device__ Tile<64> panel(int column) const { return {base + column / 64 * (rows * 64)}; }
  // As those of Tile.
  __device__ bf16* unit(int row, int column) const { return panel(column).unit(row, column % 64); }
  __device__ void store2(int row, int column, float first, float second) const {
    panel(column).store2(row, column % 64, first, second);
  }
};

// What wgmma is told about an operand in shared memory: eight rows of 128 bytes make an atom of 1024,
// swizzled by address bits 7 to 9. Atoms that follow along rows lie `stride` bytes apart; those that follow
// along columns, where the operand has more than 64, `leading` bytes.
__device__ inline uint64_t operand_descriptor(const void* first, size_t leading, size_t stride) {
#ifdef ORYX_EMULATED
  const auto address = static_cast<uint64_t>(static_cast<const char*>(first) - shared_memory());
#else
  const uint64_t address = shared_address(first);
#endif
  return (address & 0x3ffff) >> 4 | leading >> 4 << 16 | stride >> 4 << 32 | uint64_t{1} << 62;
}

#ifdef ORYX_EMULATED
namespace emulator {

// A wgmma of 64 rows, 16 summed columns and 8·tiles columns as the PTX manual describes it, by the part of
// this warp. `a` points at registers, or is null and a_descriptor says where A lies. It happens when its
// group is waited for, so that operands that are overwritten and results that are read too early show.
struct WarpgroupProduct {
  float (*c)[4];
  const uint32_t (*a)[4];
  uint64_t a_descriptor, b_descriptor;
  int warp, tiles;
  bool is_b_transposed, adds, is_a_transposed = false;

  static float element(uint64_t descriptor, int row, int column, bool is_transposed) {
    const uint64_t start = (descriptor & 0x3fff) << 4, leading = (descriptor >> 16 & 0x3fff) << 4,
                   stride = (descriptor >> 32 & 0x3fff) << 4;
    // `row` is that of the result (of A) or its column (of B), `column` is summed.
    const uint64_t offset = is_transposed
                                ? row / 64 * leading + row % 64 * 2 + column / 8 * stride + column % 8 * 128
                                : row / 8 * stride + row % 8 * 128 + column * 2;
    uint64_t address = start + offset;
    address ^= (address >> 7 & 7) << 4;
    bf16 result;
    std::memcpy(&result, shared_memory() + address, 2);
    return __bfloat162float(result);
  }
  static void run(void** deposits) {
    const auto& first = *static_cast<WarpgroupProduct*>(deposits[0]);
    float left[16][16], right[16];
    for (int lane = 0; lane < 32; ++lane) {
      const auto& d = *static_cast<WarpgroupProduct*>(deposits[lane]);
      const int g = lane / 4, t = lane % 4;
      for (int j = 0; j < 4; ++j) {
        const int row = g + 8 * (j % 2), column = 2 * t + 8 * (j / 2);
        for (int e = 0; e < 2; ++e) {
          left[row][column + e] =
              d.a ? (e == 0 ? unpack((*d.a)[j]).x : unpack((*d.a)[j]).y)
                  : element(d.a_descriptor, 16 * d.warp + row, column + e, d.is_a_transposed);
        }
      }
    }
    for (int n = 0; n < 8 * first.tiles; ++n) {
      for (int k = 0; k < 16; ++k) right[k] = element(first.b_descriptor, n, k, first.is_b_transposed);
      for (int m = 0; m < 16; ++m) {
        float sum = 0.0f;
        for (int k = 0; k < 16; ++k) sum += left[m][k] * right[k];
        const auto& d = *static_cast<WarpgroupProduct*>(deposits[m % 8 * 4 + n % 8 / 2]);
        float& target = d.c[n / 8][m / 8 * 2 + n % 2];
        target = d.adds ? target + sum : sum;
      }
    }
  }
};

// Of each thread of the block, the products of its unfinished groups; the last group is open.
inline std::vector<std::deque<std::vector<WarpgroupProduct>>> warpgroup_products(1024);

inline void issue(const WarpgroupProduct& product) {
  if (!product.adds) std::fill_n(product.c[0], 4 * product.tiles, NAN);
  auto& groups = warpgroup_products[here().thread.x];
  if (groups.empty()) groups.emplace_back();
  groups.back().push_back(product);
}
inline void finish_groups(size_t pending) {
  auto& groups = warpgroup_products[here().thread.x];
  static const char operation = 0;
  for (; groups.size() > pending + 1; groups.pop_front()) {
    for (WarpgroupProduct& product : groups.front()) collective(&operation, &product, WarpgroupProduct::run);
  }
}

}  // namespace emulator
#endif

__device__ inline int warp_of_group() { return static_cast<int>(threadIdx.x) / 32 % 4; }

// Number of this thread's warpgroup, known to be the same in all lanes.
__device__ inline int warpgroup() { return __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / 128, 0); }

__device__ inline void warpgroup_fence() {
#if !defined(ORYX_EMULATED) && defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}
__device__ inline void warpgroup_commit() {
#ifdef ORYX_EMULATED
  emulator::warpgroup_products[threadIdx.x].emplace_back();
#elif defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}
// Waits until at most `pending` of the latest groups are under way.
template <int pending>
__device__ inline void warpgroup_wait() {
#ifdef ORYX_EMULATED
  emulator::finish_groups(pending);
#elif defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
#endif
}
template <int column_tiles>
__device__ inline void settle([[maybe_unused]] Accumulator<1, column_tiles>& sum) {
#if !defined(ORYX_EMULATED) && defined(__CUDA_ARCH_FEAT_SM90_ALL)
#pragma unroll
  for (int j = 0; j < column_tiles; ++j)
#pragma unroll
    for (int e = 0; e < 4; ++e) asm volatile("" : "+f"(sum.value[0][j][e])::"memory");
#endif
}
// Makes what this thread wrote to shared memory, its finished copy_async included, visible to products that
// are issued after the next barrier.
__device__ inline void publish_to_products() {
#if !defined(ORYX_EMULATED) && defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// The instructions, for 8·tiles = 32, 64 or 128 columns. c += A Bᵀ or, without `adds`, c = A Bᵀ, both
// operands along the summed columns. What does not add only writes c, whose registers are free until then.
template <bool adds, int tiles>
__device__ inline void wgmma_shared(float (&c)[tiles][4], uint64_t a, uint64_t b) {
#ifdef ORYX_EMULATED
  emulator::issue({c, nullptr, a, b, warp_of_group(), tiles, false, adds});
#elif defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define ORYX_TILE(io, j) io(c[j][0]), io(c[j][1]), io(c[j][2]), io(c[j][3])
#define ORYX_TILES(io, j) ORYX_TILE(io, j), ORYX_TILE(io, j + 1), ORYX_TILE(io, j + 2), ORYX_TILE(io, j + 3)
#define ORYX_REGISTERS_16 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define ORYX_REGISTERS_32 \
  ORYX_REGISTERS_16       \
  ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define ORYX_REGISTERS_64                                                                                  \
  ORYX_REGISTERS_32                                                                                        \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, " \
  "%52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define ORYX_WGMMA_32(io)                                                        \
  asm volatile(                                                                  \
      "{\n.reg .pred p;\nsetp.ne.b32 p, %18, 0;\n"                               \
      "wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 {" ORYX_REGISTERS_16 \
      "}, %16, %17, p, 1, 1, 0, 0;\n}"                                           \
      : ORYX_TILES(io, 0)                                                        \
      : "l"(a), "l"(b), "n"(adds ? 1 : 0))
#define ORYX_WGMMA_64(io)                                                        \
  asm volatile(                                                                  \
      "{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n"                               \
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" ORYX_REGISTERS_32 \
      "}, %32, %33, p, 1, 1, 0, 0;\n}"                                           \
      : ORYX_TILES(io, 0), ORYX_TILES(io, 4)                                     \
      : "l"(a), "l"(b), "n"(adds ? 1 : 0))
#define ORYX_WGMMA_128(io)                                                          \
  asm volatile(                                                                     \
      "{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"                                  \
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" ORYX_REGISTERS_64   \
      "}, %64, %65, p, 1, 1, 0, 0;\n}"                                              \
      : ORYX_TILES(io, 0), ORYX_TILES(io, 4), ORYX_TILES(io, 8), ORYX_TILES(io, 12) \
      : "l"(a), "l"(b), "n"(adds ? 1 : 0))
  if constexpr (tiles == 4) {
    if constexpr (adds) {
      ORYX_WGMMA_32("+f");
    } else {
      ORYX_WGMMA_32("=f");
    }
  } else if constexpr (tiles == 8) {
    if constexpr (adds) {
      ORYX_WGMMA_64("+f");
    } else {
      ORYX_WGMMA_64("=f");
    }
  } else {
    static_assert(tiles == 16);
    if constexpr (adds) {
      ORYX_WGMMA_128("+f");
    } else {
      ORYX_WGMMA_128("=f");
    }
  }
#undef ORYX_WGMMA_32
#undef ORYX_WGMMA_64
#undef ORYX_WGMMA_128
#endif
}
// The same for 64 or 128 columns with A in registers; B runs along the summed columns or, where
// `is_b_transposed`, along those of c.
template <bool is_b_transposed, int tiles>
__device__ inline void wgmma_registers(float (&c)[tiles][4], const uint32_t (&a)[4], uint64_t b, bool adds) {
#ifdef ORYX_EMULATED
  emulator::issue({c, &a, 0, b, warp_of_group(), tiles, is_b_transposed, adds});
#elif defined(__CUDA_ARCH_FEAT_SM90_ALL)
  if constexpr (tiles == 8) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %37, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" ORYX_REGISTERS_32
        "}, {%32, %33, %34, %35}, %36, p, 1, 1, %38;\n}"
        : ORYX_TILES("+f", 0), ORYX_TILES("+f", 4)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(adds)),
          "n"(is_b_transposed ? 1 : 0));
  } else {
    static_assert(tiles == 16);
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %69, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" ORYX_REGISTERS_64
        "}, {%64, %65, %66, %67}, %68, p, 1, 1, %70;\n}"
        : ORYX_TILES("+f", 0), ORYX_TILES("+f", 4), ORYX_TILES("+f", 8), ORYX_TILES("+f", 12)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(adds)),
          "n"(is_b_transposed ? 1 : 0));
  }
#undef ORYX_TILE
#undef ORYX_TILES
#undef ORYX_REGISTERS_16
#undef ORYX_REGISTERS_32
#undef ORYX_REGISTERS_64
#endif
}

// The address of a fragment that starts at `row` and `column` of Panels, from that of the same place in the
// first atom: units of a row are exchanged by bits 4 to 6 of the address.
template <int rows>
__device__ inline SharedAddress fragment(SharedAddress first, int row, int column) {
  return (first ^ (column % 64 * 2)) + row * 128 + column / 64 * (rows * 128);
}

// sum = A Bᵀ: rows m0 … m0 + 63 of A (m0 a multiple of 64) and the first 8·column_tiles rows of B.
template <int column_tiles, int a_rows, int b_rows, int columns>
__device__ inline void multiply_rows(Accumulator<1, column_tiles>& sum, Panels<a_rows, columns> a, int m0,
                                     Panels<b_rows, columns> b) {
  static_assert(a_rows % 64 == 0 && 8 * column_tiles <= b_rows);
  if constexpr (column_tiles >= 4) {
    if (has_warpgroup_products) {
      const uint64_t a_first = operand_descriptor(a.base + m0 * 64, 16, 1024),
                     b_first = operand_descriptor(b.base, 16, 1024);
      wgmma_shared<false>(sum.value[0], a_first, b_first);
#pragma unroll
      for (int k = 16; k < columns; k += 16) {
        const int inside = k % 64 * 2;
        wgmma_shared<true>(sum.value[0], a_first + (inside + k / 64 * a.panel_bytes) / 16,
                           b_first + (inside + k / 64 * b.panel_bytes) / 16);
      }
      return;
    }
  }
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const SharedAddress a_first = shared_address(a.unit(m0 + 16 * warp_of_group() + lane % 16, lane / 16 * 8)),
                      b_first = shared_address(b.unit(lane % 8 + lane / 16 * 8, lane / 8 % 2 * 8));
  sum.clear();
#pragma unroll
  for (int k = 0; k < columns; k += 16) {
    uint32_t left[4];
    load_matrices(left, fragment<a_rows>(a_first, 0, k));
#pragma unroll
    for (int j = 0; j < column_tiles; j += 2) {
      uint32_t right[4];
      load_matrices(right, fragment<b_rows>(b_first, 8 * j, k));
      multiply_add(sum.value[0][j], left, right[0], right[1]);
      multiply_add(sum.value[0][j + 1], left, right[2], right[3]);
    }
  }
}

// The same with A in registers.
template <int depth, int column_tiles, int rows, int columns>
__device__ inline void multiply_rows(Accumulator<1, column_tiles>& sum, const uint32_t (&a)[depth][4],
                                     Panels<rows, columns> b) {
  static_assert(columns == 16 * depth && 8 * column_tiles <= rows);
  if constexpr (column_tiles >= 8) {
    if (has_warpgroup_products) {
      const uint64_t first = operand_descriptor(b.base, 16, 1024);
#pragma unroll
      for (int k = 0; k < depth; ++k) {
        wgmma_registers<false>(sum.value[0], a[k], first + (k % 4 * 32 + k / 4 * b.panel_bytes) / 16, k > 0);
      }
      return;
    }
  }
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const SharedAddress first = shared_address(b.unit(lane % 8 + lane / 16 * 8, lane / 8 % 2 * 8));
  sum.clear();
#pragma unroll
  for (int k = 0; k < depth; ++k) {
#pragma unroll
    for (int j = 0; j < column_tiles; j += 2) {
      uint32_t right[4];
      load_matrices(right, fragment<rows>(first, 8 * j, 16 * k));
      multiply_add(sum.value[0][j], a[k], right[0], right[1]);
      multiply_add(sum.value[0][j + 1], a[k], right[2], right[3]);
    }
  }
}

// sum += A B with A in registers (see as_operand) and the first 16·depth rows of B.
template <int depth, int column_tiles, int rows, int columns>
__device__ inline void multiply_columns(Accumulator<1, column_tiles>& sum, const uint32_t (&a)[depth][4],
                                        Panels<rows, columns> b) {
  static_assert(columns == 8 * column_tiles && 16 * depth <= rows);
  if (has_warpgroup_products) {
    const uint64_t first = operand_descriptor(b.base, b.panel_bytes, 1024);
#pragma unroll
    for (int k = 0; k < depth; ++k)
      wgmma_registers<true>(sum.value[0], a[k], first + k * (16 * 128 / 16), true);
    return;
  }
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const SharedAddress first = shared_address(b.unit(lane % 8 + lane / 8 % 2 * 8, lane / 16 * 8));
#pragma unroll
  for (int k = 0; k < depth; ++k) {
#pragma unroll
    for (int j = 0; j < column_tiles; j += 2) {
      uint32_t right[4];
      load_matrices_transposed(right, fragment<rows>(first, 16 * k, 8 * j));
      multiply_add(sum.value[0][j], a[k], right[0], right[1]);
      multiply_add(sum.value[0][j + 1], a[k], right[2], right[3]);
    }
  }
}

// An accumulator rounded to bf16 as the A of multiply_columns().
template <int column_tiles>
__device__ inline void as_operand(uint32_t (&a)[column_tiles / 2][4],
                                  const Accumulator<1, column_tiles>& values) {
#pragma unroll
  for (int k = 0; k < column_tiles / 2; ++k) values.as_a(a[k], 0, k);
}

}  // namespace oryx::device
