// What a chunk needs before its state is known, one block of threads per chunk: C with A = I + β ⊙ C and, for
// backward, the transfer E = Aᵀ (ρ ⊙ K) and the weights P A of outputs.
#include <cmath>

#include "operators/gated_delta_rule/gated_delta_rule_device.h"
#include "operators/gated_delta_rule/gated_delta_rule_products.h"

namespace oryx::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kPitch = 68;  // of a float32 square: fragments of tf32 products lie in different banks

// The logarithms of the decays and β of the lane's two tokens, read before they are needed.
struct GatesOfLane {
  float decay[2], beta[2];

  __device__ GatesOfLane(const GatedDeltaArguments& p, const Block& block) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int i = static_cast<int>(threadIdx.x) % 32 * 2 + e;
      const int64_t at = (block.token(p) + i) * p.state_heads + block.head;
      decay[e] = i < block.valid ? p.log_decay[at] : 0.0f;
      beta[e] = i < block.valid ? p.beta[at] : 0.0f;
    }
  }
};

// G, β, ρ and β ⊙ ρ of the chunk by the first warp.
__device__ void write_gates(const GatedDeltaArguments& p, const Block& block, const GatesOfLane& of_lane,
                            float* gates) {
  const int lane = static_cast<int>(threadIdx.x);
  const auto& [decay, beta] = of_lane;
  float sum = decay[0] + decay[1];
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const float before = __shfl_up_sync(0xffffffffu, sum, distance);
    if (lane >= distance) sum += before;
  }
  const float before = __shfl_up_sync(0xffffffffu, sum, 1);
  const float first = (lane > 0 ? before : 0.0f) + decay[0];
  const float last = __shfl_sync(0xffffffffu, sum, 31);
  float* kept = p.gates + block.index * kGates;
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    const int i = 2 * lane + e;
    const float log_gamma = (e == 0 ? first : sum) * log2_of_e;
    const float rho = exp2_fast(last * log2_of_e - log_gamma);
    gates[i] = log_gamma, gates[kChunk + i] = beta[e];
    gates[2 * kChunk + i] = rho, gates[3 * kChunk + i] = beta[e] * rho;
    kept[i] = log_gamma, kept[kChunk + i] = beta[e];
  }
}

// The square holds L' below its diagonal, L = β ⊙ L', and C transposed above it.
__device__ inline float* lower_at(float* square, int i, int j) { return square + i * kPitch + j; }
__device__ inline float* inverse_at(float* square, int i, int j) { return square + j * kPitch + i; }

// C of the warp's square of 16 on the diagonal by forward substitution, a column a lane: x = e + β ⊙ c is a
// column of A, c = −L' x.
__device__ void invert_diagonal(float* square, const float* beta) {
  const int first = static_cast<int>(threadIdx.x) / 32 * 16, column = static_cast<int>(threadIdx.x) % 16;
  float c[16], x[16];
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    c[i] = 0.0f;
    const float4* row = reinterpret_cast<const float4*>(lower_at(square, first + i, first));
#pragma unroll
    for (int j = 0; j < i; j += 4) {
      const float4 l = row[j / 4];
      c[i] -= l.x * x[j];
      if (j + 1 < i) c[i] -= l.y * x[j + 1];
      if (j + 2 < i) c[i] -= l.z * x[j + 2];
      if (j + 3 < i) c[i] -= l.w * x[j + 3];
    }
    x[i] = (i == column ? 1.0f : 0.0f) + beta[first + i] * c[i];
  }
  __syncwarp();  // L' has been read; the zeros around C take its place
  if (threadIdx.x % 32 < 16) {
#pragma unroll
    for (int i = 0; i < 16; i += 4)
      *reinterpret_cast<float4*>(inverse_at(square, first + i, first + column)) = {c[i], c[i + 1], c[i + 2],
                                                                                   c[i + 3]};
  }
}

// The warp's 8 columns from `column` of the square below the diagonal squares [first, first + size) and
// [first + size, first + 2 size), whose C are there: C₂₁ = −(I + C₂₂ ⊙ β) L'₂₁ (I + β ⊙ C₁₁), in tf32.
template <int size>
__device__ void merge(float (&sum)[size / 16][4], float* square, const float* beta, int first, int column) {
  const int lane = static_cast<int>(threadIdx.x) % 32, g = lane / 4, t = lane % 4;
  const int second = first + size;
  constexpr int tiles = size / 16;
  // Into the place of the result: only this warp has business in these columns.
  const auto store = [&] {
#pragma unroll
    for (int i = 0; i < tiles; ++i)
#pragma unroll
      for (int e = 0; e < 4; ++e)
        *inverse_at(square, second + 16 * i + g + 8 * (e / 2), first + column + 2 * t + e % 2) = sum[i][e];
  };
#pragma unroll
  for (int i = 0; i < tiles; ++i)
#pragma unroll
    for (int e = 0; e < 4; ++e)
      sum[i][e] = *lower_at(square, second + 16 * i + g + 8 * (e / 2), first + column + 2 * t + e % 2);
#pragma unroll
  for (int k = 0; k < size; k += 8) {
    if (k < column / 16 * 16) continue;  // squares of 16 above C's diagonal hold other things
    const float* left = inverse_at(square, first + k + t, first + column + g);
    const uint32_t b0 = to_tf32(beta[first + k + t] * left[0]);
    const uint32_t b1 = to_tf32(beta[first + k + t + 4] * left[4]);
#pragma unroll
    for (int i = 0; i < tiles; ++i) {
      const float* row = lower_at(square, second + 16 * i + g, first + k + t);
      const uint32_t a[4] = {to_tf32(row[0]), to_tf32(row[8 * kPitch]), to_tf32(row[4]),
                             to_tf32(row[8 * kPitch + 4])};
      multiply_add_tf32(sum[i], a, b0, b1);
    }
  }
  store();
  __syncwarp();
#pragma unroll
  for (int k = 0; k < size; k += 8) {
    const float* right = inverse_at(square, second + k + t, first + column + g);
    const uint32_t b0 = to_tf32(beta[second + k + t] * right[0]);
    const uint32_t b1 = to_tf32(beta[second + k + t + 4] * right[4]);
#pragma unroll
    for (int i = k / 16; i < tiles; ++i) {
      const float* below = inverse_at(square, second + 16 * i + g, second + k + t);
      const uint32_t a[4] = {to_tf32(below[0]), to_tf32(below[8]), to_tf32(below[4 * kPitch]),
                             to_tf32(below[4 * kPitch + 8])};
      multiply_add_tf32(sum[i], a, b0, b1);
    }
  }
#pragma unroll
  for (int i = 0; i < tiles; ++i)
#pragma unroll
    for (int e = 0; e < 4; ++e) sum[i][e] = -sum[i][e];
  if (size == kChunk / 2) return;  // nobody needs it there
  __syncwarp();
  store();
}

// Keeps 16 rows from i0 and 8 columns from j0 of C, a product's result.
__device__ inline void keep(Tile<64> inverse, const float (&c)[4], int i0, int j0) {
  const int lane = static_cast<int>(threadIdx.x) % 32, g = lane / 4, t = lane % 4;
#pragma unroll
  for (int below = 0; below < 2; ++below) {
    const int i = i0 + 8 * below;
    const uint32_t high = pack(c[2 * below], c[2 * below + 1]);
    const float2 kept = unpack(high);
    *reinterpret_cast<uint32_t*>(inverse.at(i + g, j0 + 2 * t)) = high;
    *reinterpret_cast<uint32_t*>(inverse.at(j0 + g, i + 2 * t)) =
        transpose_matrix(pack(c[2 * below] - kept.x, c[2 * below + 1] - kept.y));
  }
}
// The warp's square on the diagonal: its lower left quarter by lanes as results of products lie, and the two
// on the diagonal, of which C and its rest, transposed, are halves.
struct Diagonal {
  float c[3][2];

  __device__ explicit Diagonal(float* square) {
    const int lane = static_cast<int>(threadIdx.x) % 32, first = static_cast<int>(threadIdx.x) / 32 * 16;
#pragma unroll
    for (int quarter = 0; quarter < 3; ++quarter)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        c[quarter][e] = *inverse_at(square, first + lane / 4 + (quarter > 0 ? 8 : 0),
                                    first + 2 * (lane % 4) + e + (quarter > 1 ? 8 : 0));
      }
  }
  __device__ void keep(Tile<64> inverse) const {
    const int lane = static_cast<int>(threadIdx.x) % 32, g = lane / 4, column = 2 * (lane % 4);
    const int first = static_cast<int>(threadIdx.x) / 32 * 16;
    const uint32_t above = (column > g ? 0xffffu : 0u) | (column + 1 > g ? 0xffff0000u : 0u);
#pragma unroll
    for (int quarter = 0; quarter < 3; ++quarter) {
      const int i = first + g + (quarter > 0 ? 8 : 0), j = first + column + (quarter > 1 ? 8 : 0);
      const uint32_t high = pack(c[quarter][0], c[quarter][1]);
      const float2 kept = unpack(high);
      const uint32_t low = transpose_matrix(pack(c[quarter][0] - kept.x, c[quarter][1] - kept.y));
      auto* here = reinterpret_cast<uint32_t*>(inverse.at(i, j));
      if (quarter == 1) {
        *here = high;
        *reinterpret_cast<uint32_t*>(inverse.at(first + g, first + 8 + column)) = low;
      } else {
        *here = below_diagonal_by_columns(high) | (low & above);
      }
    }
  }
};

template <int key_dim>
struct PrepareMemory {
  using Keys = Panels<kChunk, key_dim>;
  Keys key{nullptr}, query{nullptr};
  float *gates, *square;
  Tile<64> inverse{nullptr};  // in the square's place

  static constexpr size_t bytes(bool solves) {
    return (solves ? 1 : 2) * Keys::bytes + 2 * kGates * sizeof(float) +
           (solves ? kChunk * kPitch * sizeof(float) : Tile<64>::bytes(kChunk));
  }
  __device__ PrepareMemory(char* shared, bool with_query) {
    key.base = reinterpret_cast<bf16*>(shared);
    query.base = key.base + kChunk * key_dim;
    gates = reinterpret_cast<float*>(shared + (with_query ? 2 : 1) * Keys::bytes);
    square = gates + 2 * kGates;
    inverse.base = reinterpret_cast<bf16*>(square);
  }
  __device__ float rho(int i) const { return gates[2 * kChunk + i]; }
  __device__ const float* beta_rho() const { return gates + 3 * kChunk; }
};

// left Kᵀ ⊙ Γ, and 0 on the diagonal too where `strictly`; only the warp's squares up to the diagonal.
template <bool strictly, int key_dim>
__device__ void multiply_keys(Accumulator<1, 8>& sum, const PrepareMemory<key_dim>& memory,
                              Panels<kChunk, key_dim> left) {
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  warpgroup_fence();
  multiply_group<Layout::plain, Layout::plain, key_dim>(sum, left, memory.key, 0, false);
  warpgroup_commit();
  const int row = 16 * warp + lane / 4;
  const float of_row[2] = {memory.gates[row], memory.gates[row + 8]};
  warpgroup_wait<0>();
  settle(sum);
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    if (j / 2 > warp) continue;
    const int column = 8 * j + 2 * (lane % 4);
    const float2 of_column = *reinterpret_cast<const float2*>(memory.gates + column);
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int i = lane / 4 + e / 2 * 8, k = 8 * (j % 2) + 2 * (lane % 4) + e % 2;
      sum.value[0][j][e] *= exp2_fast(of_row[e / 2] - (e % 2 == 0 ? of_column.x : of_column.y));
      if (j / 2 == warp && !(strictly ? i > k : i >= k)) sum.value[0][j][e] = 0.0f;
    }
  }
}

// L' and C of the chunk, then C as it is kept.
template <int key_dim>
__device__ void solve(const PrepareMemory<key_dim>& memory) {
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, m0 = 16 * warp;
  const Gates gates(memory.gates);
  Accumulator<1, 8> products;
  multiply_keys<true>(products, memory, memory.key);
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    if (j / 2 > warp) continue;
#pragma unroll
    for (int below = 0; below < 2; ++below) {
      float* to = lower_at(memory.square, m0 + thread % 32 / 4 + 8 * below, 8 * j + 2 * (thread % 4));
      *reinterpret_cast<float2*>(to) = {products.value[0][j][2 * below], products.value[0][j][2 * below + 1]};
    }
  }
  __syncwarp();  // a warp's diagonal square is its own
  invert_diagonal(memory.square, gates.beta);
  __syncthreads();
  float below16[1][4], below32[2][4];
  const int half = warp / 2 * 32, column16 = warp % 2 * 8;
  merge<16>(below16, memory.square, gates.beta, half, column16);
  __syncthreads();
  merge<32>(below32, memory.square, gates.beta, 0, 8 * warp);
  const Diagonal diagonal(memory.square);
  __syncthreads();
  diagonal.keep(memory.inverse);
  keep(memory.inverse, below16[0], half + 16, half + column16);
  keep(memory.inverse, below32[0], 32, 8 * warp);
  keep(memory.inverse, below32[1], 48, 8 * warp);
  __syncthreads();
}

// The warp's 16 rows of E. What A does to keys that are alike cancels, so it enters with what its rounding
// took.
template <int key_dim>
__device__ void write_transfer(const PrepareMemory<key_dim>& memory, bf16* out) {
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32,
            g = lane / 4, t = lane % 4, m0 = 16 * warp;
  uint32_t high[4][4], low[4][4];  // of Aᵀ ⊙ ρ
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (i < warp) {
#pragma unroll
      for (int e = 0; e < 4; ++e) high[i][e] = low[i][e] = 0;
      continue;
    }
    load_inverse_a(high[i], low[i], memory.inverse, i, warp);
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const float2 factor = reinterpret_cast<const float2*>(memory.beta_rho())[8 * i + t + e / 2 * 4];
      const float2 rounded = unpack(high[i][e]), rest = unpack(low[i][e]);
      float first = factor.x * (rounded.x + rest.x), second = factor.y * (rounded.y + rest.y);
      if (i == warp && (e == 0 || e == 3)) {  // the diagonal of A is 1
        const float rho = memory.rho(m0 + g + (e == 0 ? 0 : 8));
        if (2 * t == g) first = rho;
        if (2 * t + 1 == g) second = rho;
      }
      high[i][e] = pack(first, second);
      const float2 kept = unpack(high[i][e]);
      low[i][e] = pack(first - kept.x, second - kept.y);
    }
  }
#pragma unroll 1
  for (int column0 = 0; column0 < key_dim; column0 += 64) {
    const Panels<kChunk, 64> key{memory.key.panel(column0).base};
    Accumulator<1, 8> transfer;
    transfer.clear();
    warpgroup_fence();
    multiply_columns(transfer, high, key);
    multiply_columns(transfer, low, key);
    warpgroup_commit();
    warpgroup_wait<0>();
    settle(transfer);
    write_rows(transfer, [&](int row) { return out + (m0 + row) * key_dim + column0; });
  }
}

// The warp's 16 rows of scale · P A = scale · (P + (P ⊙ β) C).
template <int key_dim>
__device__ void write_weights(const PrepareMemory<key_dim>& memory, float scale, bf16* out) {
  const int warp = static_cast<int>(threadIdx.x) / 32, m0 = 16 * warp;
  const Gates gates(memory.gates);
  Accumulator<1, 8> weights;
  multiply_keys<false>(weights, memory, memory.query);
  const int t = static_cast<int>(threadIdx.x) % 4;
  uint32_t scores[4][4];  // P ⊙ β, an A operand
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    const float2 beta = reinterpret_cast<const float2*>(gates.beta)[4 * j + t];
#pragma unroll
    for (int below = 0; below < 2; ++below) {
      float &first = weights.value[0][j][2 * below], &second = weights.value[0][j][2 * below + 1];
      first = j / 2 > warp ? 0.0f : scale * first;
      second = j / 2 > warp ? 0.0f : scale * second;
      scores[j / 2][j % 2 * 2 + below] = pack(beta.x * first, beta.y * second);
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (i > warp) continue;
    const auto& a = scores[i];
#pragma unroll
    for (int j = 0; j <= i; ++j) {
      uint32_t high[4], low[4];
      load_inverse_b(high, low, memory.inverse, i, j);
      multiply_add(weights.value[0][2 * j], a, high[0], high[1]);
      multiply_add(weights.value[0][2 * j + 1], a, high[2], high[3]);
      multiply_add(weights.value[0][2 * j], a, low[0], low[1]);
      multiply_add(weights.value[0][2 * j + 1], a, low[2], low[3]);
    }
  }
  write_rows(weights, [&](int i) { return out + (m0 + i) * kChunk; });
}

template <int key_dim>
__global__ void __launch_bounds__(kThreads, 5) prepare_kernel(const ChunkArguments p) {
  const Block block = p.block(/*from_last=*/true);
  const PrepareMemory<key_dim> memory(shared_memory(), /*with_query=*/false);
  const int thread = static_cast<int>(threadIdx.x);
  const GatesOfLane gates(p, block);
  load_rows<kThreads>(memory.key, p.key_rows(block), p.key.time, block.valid);
  commit_copies();
  if (thread < 32) write_gates(p, block, gates, memory.gates);
  wait_copies<0>();
  publish_to_products();
  __syncthreads();
  solve(memory);
  auto* inverse = reinterpret_cast<uint4*>(static_cast<bf16*>(p.inverse) + block.index * kChunk * kChunk);
#pragma unroll
  for (int i = thread; i < kChunk * kChunk / 8; i += kThreads)
    inverse[i] = *reinterpret_cast<const uint4*>(memory.inverse.unit(i / 8, i % 8 * 8));
}

template <int key_dim>
__global__ void __launch_bounds__(kThreads, 4) prepare_again_kernel(const ChunkArguments p) {
  const Block block = p.block(/*from_last=*/false);
  const PrepareMemory<key_dim> memory(shared_memory(), /*with_query=*/true);
  const int thread = static_cast<int>(threadIdx.x);
  const int32_t* rows = block.row_table(p);
  const bf16* inverse = static_cast<const bf16*>(p.inverse) + block.index * kChunk * kChunk;

  using Rows = RowsOfThread<kThreads, key_dim>;
  const int readers = rows[kChunk] > 0 ? p.readers : 0;
  const GatesOfLane gates(p, block);
  const Rows first_rows(rows);
  load_rows<kThreads>(memory.key, p.key_rows(block), p.key.time, block.valid);
  load_whole<kThreads>(Panels<kChunk, kChunk>{memory.inverse.base}, inverse);
  commit_copies();
  const auto load_query = [&](int reader, const Rows& rows_of_query) {
    rows_of_query.copy(memory.query, p.query, p.query_head(block.head * p.readers + reader));
    commit_copies();
  };
  if (readers > 0) load_query(0, first_rows);
  if (thread < 32) write_gates(p, block, gates, memory.gates);
  readers > 0 ? wait_copies<1>() : wait_copies<0>();
  publish_to_products();
  __syncthreads();
  write_transfer(memory, static_cast<bf16*>(p.transfer) + block.index * kChunk * key_dim);
  for (int reader = 0; reader < readers; ++reader) {
    if (reader > 0) {
      __syncthreads();
      load_query(reader, Rows(rows));
    }
    wait_copies<0>();
    publish_to_products();
    __syncthreads();
    write_weights(memory, p.scale,
                  static_cast<bf16*>(p.weights) + (block.index * readers + reader) * kChunk * kChunk);
  }
}

}  // namespace

void gated_delta_prepare(const GatedDeltaArguments& p, void* stream) {
  const auto grid = static_cast<unsigned>(blocks_of(p));
  const auto run = [&]<int key_dim>() {
    launch<prepare_kernel<key_dim>>(dim3(grid), kThreads, PrepareMemory<key_dim>::bytes(true), stream,
                                    ChunkArguments(p));
  };
  p.key_dim == 128 ? run.template operator()<128>() : run.template operator()<64>();
}
void gated_delta_prepare_again(const GatedDeltaArguments& p, void* stream) {
  const auto grid = static_cast<unsigned>(blocks_of(p));
  const auto run = [&]<int key_dim>() {
    launch<prepare_again_kernel<key_dim>>(dim3(grid), kThreads, PrepareMemory<key_dim>::bytes(false), stream,
                                          ChunkArguments(p));
  };
  p.key_dim == 128 ? run.template operator()<128>() : run.template operator()<64>();
}

}  // namespace oryx::cuda
