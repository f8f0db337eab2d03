// What a chunk needs before its state is known, one block of threads per chunk: C with A = I + β ⊙ C.
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

// The chunk's gates by the first warp, which leaves G and β in shared memory too.
__device__ void write_gates(const GatedDeltaArguments& p, const Block& block, const GatesOfLane& of_lane,
                            float* log_gammas, float* betas) {
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
  const float2 log_gamma{first * log2_of_e, sum * log2_of_e};
  const float total = __shfl_sync(0xffffffffu, log_gamma.y, 31);
  const float2 rho{exp2_fast(total - log_gamma.x), exp2_fast(total - log_gamma.y)};
  const Gates kept(p.gates + block.index * kGates);
  const auto write = [&](float* to, float2 pair) { *reinterpret_cast<float2*>(to + 2 * lane) = pair; };
  write(log_gammas, log_gamma), write(kept.log_gamma, log_gamma);
  write(betas, {beta[0], beta[1]}), write(kept.beta, {beta[0], beta[1]});
  write(kept.gamma, {exp2_fast(log_gamma.x), exp2_fast(log_gamma.y)});
  write(kept.rho, rho);
  write(kept.beta_rho, {beta[0] * rho.x, beta[1] * rho.y});
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
  const int lane = static_cast<int>(threadIdx.x) % 32, g = lane / 4, column = j0 + 2 * (lane % 4);
  inverse.store2(i0 + g, column, c[0], c[1]);
  inverse.store2(i0 + g + 8, column, c[2], c[3]);
}
// What the warp's square on the diagonal has on and below its own diagonal, by lanes as results of products
// lie: the quarters on the diagonal and that below it.
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
    const int lane = static_cast<int>(threadIdx.x) % 32, g = lane / 4, t = 2 * (lane % 4);
    const int i = static_cast<int>(threadIdx.x) / 32 * 16 + g, j = i - g + t;
    const auto keep_below = [&](int row, int column, const float(&pair)[2]) {
      inverse.store2(row, column, t < g ? pair[0] : 0.0f, t + 1 < g ? pair[1] : 0.0f);
    };
    keep_below(i, j, c[0]);
    inverse.store2(i, j + 8, 0.0f, 0.0f);
    inverse.store2(i + 8, j, c[1][0], c[1][1]);
    keep_below(i + 8, j + 8, c[2]);
  }
};

template <int key_dim>
struct PrepareMemory {
  using Keys = Panels<kChunk, key_dim>;
  Keys key{nullptr};
  float *log_gamma, *beta, *square;
  Tile<64> inverse{nullptr};  // in the square's place

  static constexpr size_t bytes = Keys::bytes + (2 + kPitch) * kChunk * sizeof(float);
  __device__ explicit PrepareMemory(char* shared) {
    key.base = reinterpret_cast<bf16*>(shared);
    log_gamma = reinterpret_cast<float*>(shared + Keys::bytes);
    beta = log_gamma + kChunk;
    square = beta + kChunk;
    inverse.base = reinterpret_cast<bf16*>(square);
  }
};

// L' = strictly lower part of (K Kᵀ) ⊙ Γ, the warp's 16 rows of it up to the diagonal's square.
template <int key_dim>
__device__ void find_lower(Accumulator<1, 8>& sum, const PrepareMemory<key_dim>& memory) {
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  warpgroup_fence();
  multiply_group<Layout::plain, Layout::plain, key_dim>(sum, memory.key, memory.key, 0, false);
  warpgroup_commit();
  const int row = 16 * warp + lane / 4;
  const float of_row[2] = {memory.log_gamma[row], memory.log_gamma[row + 8]};
  warpgroup_wait<0>();
  settle(sum);
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    if (j / 2 > warp) continue;
    const int column = 8 * j + 2 * (lane % 4);
    const float2 of_column = *reinterpret_cast<const float2*>(memory.log_gamma + column);
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int i = lane / 4 + e / 2 * 8, k = 8 * (j % 2) + 2 * (lane % 4) + e % 2;
      sum.value[0][j][e] *= exp2_fast(of_row[e / 2] - (e % 2 == 0 ? of_column.x : of_column.y));
      if (j / 2 == warp && i <= k) sum.value[0][j][e] = 0.0f;
    }
  }
}

// L' and C of the chunk, then C as it is kept.
template <int key_dim>
__device__ void solve(const PrepareMemory<key_dim>& memory) {
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, m0 = 16 * warp;
  Accumulator<1, 8> products;
  find_lower(products, memory);
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
  invert_diagonal(memory.square, memory.beta);
  __syncthreads();
  float below16[1][4], below32[2][4];
  const int half = warp / 2 * 32, column16 = warp % 2 * 8;
  merge<16>(below16, memory.square, memory.beta, half, column16);
  __syncthreads();
  merge<32>(below32, memory.square, memory.beta, 0, 8 * warp);
  const Diagonal diagonal(memory.square);
  __syncthreads();
  diagonal.keep(memory.inverse);
  keep(memory.inverse, below16[0], half + 16, half + column16);
  keep(memory.inverse, below32[0], 32, 8 * warp);
  keep(memory.inverse, below32[1], 48, 8 * warp);
  __syncthreads();
}

template <int key_dim>
__global__ void __launch_bounds__(kThreads, 6) prepare_kernel(const ChunkArguments p) {
  const Block block = p.block(/*from_last=*/true);
  const PrepareMemory<key_dim> memory(shared_memory());
  const int thread = static_cast<int>(threadIdx.x);
  const GatesOfLane gates(p, block);
  load_rows<kThreads>(memory.key, p.key_rows(block), p.key.time, block.valid);
  commit_copies();
  if (thread < 32) write_gates(p, block, gates, memory.log_gamma, memory.beta);
  wait_copies<0>();
  publish_to_products();
  __syncthreads();
  solve(memory);
  auto* inverse = reinterpret_cast<uint4*>(static_cast<bf16*>(p.inverse) + block.index * kChunk * kChunk);
#pragma unroll
  for (int i = thread; i < kChunk * kChunk / 8; i += kThreads)
    inverse[i] = *reinterpret_cast<const uint4*>(memory.inverse.unit(i / 8, i % 8 * 8));
}

}  // namespace

void gated_delta_prepare(const GatedDeltaArguments& p, void* stream) {
  const auto grid = static_cast<unsigned>(blocks_of(p));
  const auto run = [&]<int key_dim>() {
    launch<prepare_kernel<key_dim>>(dim3(grid), kThreads, PrepareMemory<key_dim>::bytes, stream,
                                    ChunkArguments(p));
  };
  p.key_dim == 128 ? run.template operator()<128>() : run.template operator()<64>();
}
}  // namespace oryx::cuda
