#include <type_traits>

#include "operators/ssd/ssd_device.h"
#include "operators/ssd/ssd_kernels.h"

namespace oryx::cuda {

namespace {

constexpr int kChunk = kSsdOutputChunk;
constexpr int kThreads = 2 * kChunk;  // a warp for 16 rows

// Shared memory of a block. The value comes into the place of the key once the scores are made.
template <int key_dim, int value_dim>
struct OutputTiles {
  static constexpr size_t query_bytes = Tile<key_dim>::bytes(kChunk);
  static constexpr size_t key_bytes = Tile<(key_dim > value_dim ? key_dim : value_dim)>::bytes(kChunk);
  static constexpr size_t state_bytes = Tile<value_dim>::bytes(key_dim);
  static constexpr size_t bytes = query_bytes + key_bytes + state_bytes + 4 * kChunk * sizeof(float);
  Tile<key_dim> query, key;
  Tile<value_dim> value, state;
  float* cumulative;  // [kChunk, 2]
  float* step;        // [kChunk]
  int32_t* row;       // [kChunk]

  __device__ explicit OutputTiles(char* base)
      : query{reinterpret_cast<bf16*>(base)},
        key{reinterpret_cast<bf16*>(base + query_bytes)},
        value{key.base},
        state{reinterpret_cast<bf16*>(base + query_bytes + key_bytes)},
        cumulative(reinterpret_cast<float*>(base + query_bytes + key_bytes + state_bytes)),
        step(cumulative + 2 * kChunk),
        row(reinterpret_cast<int32_t*>(step + kChunk)) {}
};

// O = γ ⊙ (Q S) + M V + D ⊙ V for one chunk of one output head.
template <int key_dim, int value_dim>
__global__ void __launch_bounds__(kThreads, 2) output_kernel(const SsdOutput p) {
  const OutputTiles<key_dim, value_dim> tiles(shared_memory());
  const cpu::MixerShape& shape = p.shape;
  const int output_heads = static_cast<int>(shape.output_heads),
            state_heads = static_cast<int>(shape.state_heads);
  const int output_head = static_cast<int>(blockIdx.x) % output_heads;
  const int head = output_head / (output_heads / state_heads);
  const int key_head = head / (state_heads / static_cast<int>(shape.key_heads));
  const int query_head = output_head / (output_heads / static_cast<int>(shape.query_heads));
  const int place = p.active[static_cast<int>(blockIdx.x) / output_heads],
            chunks = static_cast<int>(shape.chunks);
  const int batch = place / chunks, chunk = place % chunks, time = chunk * kChunk;
  const int64_t state_index = static_cast<int64_t>(batch * state_heads + head) * chunks + chunk;
  const int count =
      static_cast<int>(shape.time) - time < kChunk ? static_cast<int>(shape.time) - time : kChunk;

  const int thread = static_cast<int>(threadIdx.x);
  load_tile<key_dim, kChunk, kThreads>(
      tiles.key, count, [&](int row) { return token_row(p.key, batch, time + row, key_head); });
  const int64_t at = state_index * kChunk;
  load_floats(tiles.cumulative, p.decay.cumulative + 2 * at, 2 * kChunk);
  load_floats(tiles.step, p.decay.step + at, kChunk);
  if (thread < kChunk) tiles.row[thread] = thread < count ? p.row_of[batch * shape.time + time + thread] : -1;
  __syncthreads();
  load_rows<key_dim, kChunk, kThreads>(tiles.query, p.query.data, [&](int row, int) -> const bf16* {
    return tiles.row[row] >= 0 ? packed_row(p.query, tiles.row[row], query_head) : nullptr;
  });
  commit_copies();
  const bf16* state = static_cast<const bf16*>(p.states) + state_index * (key_dim * value_dim);
  load_tile<value_dim, key_dim, kThreads>(tiles.state, key_dim,
                                          [&](int row) { return state + row * value_dim; });
  commit_copies();
  wait_copies<1>();
  __syncthreads();

  const int lane = thread % 32, m0 = thread / 32 * 16;
  const int own_row = tiles.row[m0 + lane % 16];
  const bool has_rows = __any_sync(0xffffffffu, own_row >= 0);
  const float2* cumulative = reinterpret_cast<const float2*>(tiles.cumulative);
  uint32_t scores[kChunk / 16][4];  // M as A operands
  if (has_rows) {
    const float2 own[2] = {cumulative[m0 + lane / 4], cumulative[m0 + lane / 4 + 8]};
#pragma unroll
    for (int block = 0; block < kChunk / 32; ++block) {
      if (32 * block > m0) break;
      Accumulator<1, 4> product;
      product.clear();
      multiply<Layout::plain, Layout::plain>(product, tiles.query, m0, tiles.key, 32 * block, 0, key_dim);
      product.for_pairs([&](int row, int column, float& first, float& second) {
        const int j = 32 * block + column, i = m0 + row;
        const float4 other = *reinterpret_cast<const float4*>(tiles.cumulative + 2 * j);
        const float2 step = *reinterpret_cast<const float2*>(tiles.step + j);
        const float2 mine = row < 8 ? own[0] : own[1];
        const float x = first * step.x * exp2_fast((mine.x - other.x) + (mine.y - other.y));
        const float y = second * step.y * exp2_fast((mine.x - other.z) + (mine.y - other.w));
        first = j <= i ? x : 0.0f;
        second = j + 1 <= i ? y : 0.0f;
      });
      product.as_a(scores[2 * block], 0, 0);
      product.as_a(scores[2 * block + 1], 0, 1);
    }
  }
  __syncthreads();  // the key is read
  load_tile<value_dim, kChunk, kThreads>(
      tiles.value, count, [&](int row) { return token_row(p.value, batch, time + row, head); });
  commit_copies();
  wait_copies<1>();
  __syncthreads();

  constexpr int part = 64;  // columns at a time: all of them would not fit into registers
#pragma unroll 1
  for (int n0 = 0; n0 < value_dim; n0 += part) {
    Accumulator<1, part / 8> output;
    output.clear();
    if (has_rows) {
      multiply<Layout::plain, Layout::transposed>(output, tiles.query, m0, tiles.state, n0, 0, key_dim);
      output.for_pairs([&](int row, int, float& first, float& second) {
        const float2 total = cumulative[m0 + row];
        const float gamma = exp2_fast(total.x + total.y);
        first *= gamma, second *= gamma;
      });
    }
    if (n0 == 0) {
      wait_copies<0>();
      __syncthreads();
    }
    if (!has_rows) continue;
#pragma unroll
    for (int k = 0; k < kChunk / 16; ++k) {
      if (16 * k > m0) break;
#pragma unroll
      for (int j = 0; j < part / 8; j += 2) {
        uint32_t b[4];
        load_b<Layout::transposed>(b, tiles.value, n0 + 8 * j, 16 * k);
        multiply_add(output.value[0][j], scores[k], b[0], b[1]);
        multiply_add(output.value[0][j + 1], scores[k], b[2], b[3]);
      }
    }
    if (p.skip != nullptr) {
      const float skip = p.skip[output_head];
      output.for_pairs([&](int row, int column, float& first, float& second) {
        const float2 value = tiles.value.load2(m0 + row, n0 + column);
        first += skip * value.x, second += skip * value.y;
      });
    }
    store_rows(output, [&](int row) -> bf16* {
      const int packed = tiles.row[m0 + row];
      return packed >= 0 ? const_cast<bf16*>(packed_row(p.output, packed, output_head)) + n0 : nullptr;
    });
  }
}

}  // namespace

void ssd_output(const SsdOutput& a, void* stream) {
  const dim3 grid(static_cast<unsigned>(a.active_count * a.shape.output_heads));
  with_dimensions(a.shape, [&](auto key_dim, auto value_dim) {
    launch<output_kernel<key_dim, value_dim>>(grid, kThreads, OutputTiles<key_dim, value_dim>::bytes, stream,
                                              a);
  });
}

}  // namespace oryx::cuda
