// Products of a warpgroup with both operands in shared memory, where either may lie along any of its two
// indices. Rules and fallback are those of operators/device/warpgroup.h.
#pragma once

#include "operators/device/warpgroup.h"
#include "operators/gated_delta_rule/gated_delta_rule_device.h"

namespace oryx::cuda {

// The instruction, for 8·tiles = 32 or 64 columns: c = A B or c += A B.
template <bool is_a_transposed, bool is_b_transposed, int tiles>
__device__ inline void wgmma(float (&c)[tiles][4], uint64_t a, uint64_t b, bool adds) {
#ifdef ORYX_EMULATED
  emulator::issue({c, nullptr, a, b, warp_of_group(), tiles, is_b_transposed, adds, is_a_transposed});
#elif defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define ORYX_TILE(j) "+f"(c[j][0]), "+f"(c[j][1]), "+f"(c[j][2]), "+f"(c[j][3])
#define ORYX_TILES(j) ORYX_TILE(j), ORYX_TILE(j + 1), ORYX_TILE(j + 2), ORYX_TILE(j + 3)
  if constexpr (tiles == 4) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %18, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, "
        "%16, %17, p, 1, 1, %19, %20;\n}"
        : ORYX_TILES(0)
        : "l"(a), "l"(b), "r"(static_cast<int>(adds)), "n"(is_a_transposed ? 1 : 0),
          "n"(is_b_transposed ? 1 : 0));
  } else {
    static_assert(tiles == 8);
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, "
        "%21, "
        "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
        "%32, %33, p, 1, 1, %35, %36;\n}"
        : ORYX_TILES(0), ORYX_TILES(4)
        : "l"(a), "l"(b), "r"(static_cast<int>(adds)), "n"(is_a_transposed ? 1 : 0),
          "n"(is_b_transposed ? 1 : 0));
  }
#undef ORYX_TILE
#undef ORYX_TILES
#endif
}

// sum = A B, or sum += A B where it `adds`, over `depth`: 64 rows of the result and its 8·column_tiles
// columns from n0 on (of a B along the columns, a multiple of 64).
template <Layout layout_a, Layout layout_b, int depth, int column_tiles, int a_rows, int a_columns,
          int b_rows, int b_columns>
__device__ inline void multiply_group(Accumulator<1, column_tiles>& sum, Panels<a_rows, a_columns> a,
                                      Panels<b_rows, b_columns> b, int n0, bool adds) {
  constexpr bool is_a_transposed = layout_a == Layout::transposed,
                 is_b_transposed = layout_b == Layout::transposed;
  static_assert((is_a_transposed ? a_rows : a_columns) >= depth &&
                (is_a_transposed ? a_columns : a_rows) == 64);
  static_assert((is_b_transposed ? b_rows : b_columns) >= depth);
  if (has_warpgroup_products) {
    const uint64_t first_a = operand_descriptor(a.base, 16, 1024),
                   first_b =
                       operand_descriptor(is_b_transposed ? b.panel(n0).base : b.base + n0 * 64, 16, 1024);
    // From one 16 of the summed index to the next.
    const auto step = [](bool is_transposed, size_t panel_bytes, int k) {
      return (is_transposed ? k * 128 : k % 64 * 2 + k / 64 * panel_bytes) / 16;
    };
#pragma unroll
    for (int k = 0; k < depth; k += 16) {
      wgmma<is_a_transposed, is_b_transposed>(sum.value[0], first_a + step(is_a_transposed, a.panel_bytes, k),
                                              first_b + step(is_b_transposed, b.panel_bytes, k),
                                              adds || k > 0);
    }
    return;
  }
  const int lane = static_cast<int>(threadIdx.x) % 32, low = lane % 8, middle = lane / 8 % 2 * 8,
            high = lane / 16 * 8, m0 = 16 * warp_of_group();
  const SharedAddress first_a =
      shared_address(is_a_transposed ? a.unit(low + high, m0 + middle) : a.unit(m0 + low + middle, high));
  const SharedAddress first_b =
      shared_address(is_b_transposed ? b.unit(low + middle, n0 + high) : b.unit(n0 + low + high, middle));
  if (!adds) sum.clear();
#pragma unroll 2
  for (int k = 0; k < depth; k += 16) {
    uint32_t left[4];
    if constexpr (is_a_transposed) {
      load_matrices_transposed(left, fragment<a_rows>(first_a, k, 0));
    } else {
      load_matrices(left, fragment<a_rows>(first_a, 0, k));
    }
#pragma unroll
    for (int j = 0; j < column_tiles; j += 2) {
      uint32_t right[4];
      if constexpr (is_b_transposed) {
        load_matrices_transposed(right, fragment<b_rows>(first_b, k, 8 * j));
      } else {
        load_matrices(right, fragment<b_rows>(first_b, 8 * j, k));
      }
      multiply_add(sum.value[0][j], left, right[0], right[1]);
      multiply_add(sum.value[0][j + 1], left, right[2], right[3]);
    }
  }
}

// Divides what is less than 2³¹ by a multiplication (by 1 where there is nothing to divide by).
struct Divisor {
  uint32_t multiplier;
  int shift = 31;

  explicit Divisor(int divisor_or_zero) {
    const int divisor = divisor_or_zero > 0 ? divisor_or_zero : 1;
    while (int64_t{1} << (shift - 31) < divisor) ++shift;
    multiplier = static_cast<uint32_t>(((uint64_t{1} << shift) + static_cast<uint32_t>(divisor) - 1) /
                                       static_cast<uint32_t>(divisor));
  }
  __device__ int quotient(int x) const {
    return static_cast<int>(static_cast<uint64_t>(static_cast<uint32_t>(x)) * multiplier >> shift);
  }
};

// What kernels are given whose blocks are chunks, so that these need no division to begin.
struct ChunkArguments : GatedDeltaArguments {
  int streams, readers;  // states; output heads of each
  Divisor by_streams, by_state_heads, by_states_of_key, by_readers_of_query;

  explicit ChunkArguments(const GatedDeltaArguments& p)
      : GatedDeltaArguments(p),
        streams(p.batch * p.state_heads),
        readers(p.output_heads / p.state_heads),
        by_streams(streams),
        by_state_heads(p.state_heads),
        by_states_of_key(p.state_heads / p.key_heads),
        by_readers_of_query(p.output_heads / p.query_heads) {}

  // Chunk by chunk of all streams, so that a serial pass finds in the cache what it begins with (or left
  // last).
  __device__ Block block(bool from_last) const {
    const int index = static_cast<int>(blockIdx.x), chunk = by_streams.quotient(index),
              stream = index - chunk * streams, batch_of_stream = by_state_heads.quotient(stream);
    return Block(*this, batch_of_stream, stream - batch_of_stream * state_heads,
                 from_last ? chunks - 1 - chunk : chunk);
  }
  __device__ const bf16* key_rows(const Block& block) const {
    return block.rows_of(key, by_states_of_key.quotient(block.head));
  }
  __device__ int query_head(int output_head) const { return by_readers_of_query.quotient(output_head); }
};

// Copies of the rows of a tile by all `threads` threads of a block. Asynchronous: commit and wait.
template <int threads, int rows, int columns>
struct PanelLoad {
  static constexpr int units = columns / 8, step = threads / units, count = rows / step;
  static_assert(rows % step == 0 && step % 8 == 0);  // so a thread's units keep their place in the swizzle
  int row = static_cast<int>(threadIdx.x) / units, column = static_cast<int>(threadIdx.x) % units * 8;
  bf16* target;  // of the thread's first unit; the next is `step` rows on

  __device__ explicit PanelLoad(Panels<rows, columns> tile) : target(tile.unit(row, column)) {}
};

// Rows that lie `stride` apart; those at and past `valid` become zero.
template <int threads, int rows, int columns>
__device__ inline void load_rows(Panels<rows, columns> tile, const bf16* first, int64_t stride, int valid) {
  using Load = PanelLoad<threads, rows, columns>;
  const Load load(tile);
  const bf16* from = first + load.row * stride + load.column;
#pragma unroll
  for (int i = 0; i < Load::count; ++i, from += Load::step * stride)
    copy_async(load.target + i * Load::step * 64, from, load.row + i * Load::step < valid);
}
// Rows that lie together.
template <int threads, int rows, int columns>
__device__ inline void load_whole(Panels<rows, columns> tile, const bf16* first) {
  using Load = PanelLoad<threads, rows, columns>;
  const Load load(tile);
  const bf16* from = first + load.row * columns + load.column;
#pragma unroll
  for (int i = 0; i < Load::count; ++i)
    copy_async(load.target + i * Load::step * 64, from + i * Load::step * columns);
}
// What the thread needs of a block's table of rows, in which −1 stands for zeros, to copy tiles of `columns`
// columns by it; read early, so that the copies need not wait for it.
template <int threads, int columns>
struct RowsOfThread {
  using Load = PanelLoad<threads, kChunk, columns>;
  int32_t packed[Load::count];

  __device__ explicit RowsOfThread(const int32_t* table) {
#pragma unroll
    for (int i = 0; i < Load::count; ++i)
      packed[i] = table[static_cast<int>(threadIdx.x) / Load::units + i * Load::step];
  }
  __device__ void copy(Panels<kChunk, columns> tile, const GatedDeltaRows& x, int head) const {
    const Load load(tile);
    const bf16* first = packed_row(x, 0, head) + load.column;
    const int64_t stride = static_cast<int32_t>(x.time);  // one instruction multiplies by it
#pragma unroll
    for (int i = 0; i < Load::count; ++i) {
      copy_async(load.target + i * Load::step * 64, first + (packed[i] < 0 ? 0 : packed[i]) * stride,
                 packed[i] >= 0);
    }
  }
};

// Asks for `bytes` of memory, a multiple of 16, that will be copied later.
template <int bytes>
__device__ inline void prefetch([[maybe_unused]] const bf16* first) {
#if !defined(ORYX_EMULATED) && __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(first), "n"(bytes) : "memory");
#endif
}

}  // namespace oryx::cuda
