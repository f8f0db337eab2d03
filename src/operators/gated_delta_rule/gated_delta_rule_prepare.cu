// What a chunk needs before its state is known: the inverse and the transfer, one block of threads per chunk.
#include "operators/gated_delta_rule/gated_delta_rule_device.h"

namespace oryx::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kPitch = 68;  // of float32 squares: fragments of tf32 products lie in different banks

// G and β of the chunk by the first warp, two tokens a lane.
__device__ void write_gates(const GatedDeltaArguments& p, const Block& block, float* gates) {
  const int lane = static_cast<int>(threadIdx.x);
  float decay[2], beta[2];
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    const int i = 2 * lane + e;
    const int64_t at = (block.token(p) + i) * p.state_heads + block.head;
    decay[e] = i < block.valid ? p.log_decay[at] : 0.0f;
    beta[e] = i < block.valid ? p.beta[at] : 0.0f;
  }
  float sum = decay[0] + decay[1];
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const float before = __shfl_up_sync(0xffffffffu, sum, distance);
    if (lane >= distance) sum += before;
  }
  const float before = __shfl_up_sync(0xffffffffu, sum, 1);
  const float first = (lane > 0 ? before : 0.0f) + decay[0];
  float* kept = p.gates + block.index * kGates;
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    const int i = 2 * lane + e;
    const float log_gamma = (e == 0 ? first : sum) * log2_of_e;
    gates[i] = log_gamma, gates[kChunk + i] = beta[e];
    kept[i] = log_gamma, kept[kChunk + i] = beta[e];
  }
}

// The inverse of the warp's square of 16 on the diagonal of I + L by forward substitution, a column a lane.
__device__ void invert_diagonal(const float* lower, float* inverse) {
  const int first = static_cast<int>(threadIdx.x) / 32 * 16, column = static_cast<int>(threadIdx.x) % 16;
  const float* l = lower + first * kPitch + first;
  float x[16];
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    x[i] = i == column ? 1.0f : 0.0f;
#pragma unroll
    for (int j = 0; j < i; ++j) x[i] -= l[i * kPitch + j] * x[j];
  }
  if (threadIdx.x % 32 < 16) {
#pragma unroll
    for (int i = 0; i < 16; ++i) inverse[(first + i) * kPitch + first + column] = x[i];
  }
}

// The warp's 8 columns from `column` of the square below the diagonal squares [first, first + size) and
// [first + size, first + 2 size), both inverted: A₂₁ = −A₂₂ (L₂₁ A₁₁), in tf32.
template <int size>
__device__ void merge(const float* lower, float* inverse, int first, int column) {
  const int lane = static_cast<int>(threadIdx.x) % 32, g = lane / 4, t = lane % 4;
  const int second = first + size;
  const auto product = [&](float(&sum)[size / 16][4], const float* left, int left_column, int right_row) {
#pragma unroll
    for (int k = 0; k < size; k += 8) {
      const float* right = inverse + (right_row + k + t) * kPitch + first + column + g;
      const uint32_t b0 = to_tf32(right[0]), b1 = to_tf32(right[4 * kPitch]);
#pragma unroll
      for (int i = 0; i < size / 16; ++i) {
        const float* row = left + (second + 16 * i + g) * kPitch + left_column + k + t;
        const uint32_t a[4] = {to_tf32(row[0]), to_tf32(row[8 * kPitch]), to_tf32(row[4]),
                               to_tf32(row[8 * kPitch + 4])};
        multiply_add_tf32(sum[i], a, b0, b1);
      }
    }
  };
  const auto store = [&](const float(&sum)[size / 16][4], float sign) {
#pragma unroll
    for (int i = 0; i < size / 16; ++i)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        inverse[(second + 16 * i + g + 8 * (e / 2)) * kPitch + first + column + 2 * t + e % 2] =
            sign * sum[i][e];
      }
  };
  float inner[size / 16][4] = {}, outer[size / 16][4] = {};
  product(inner, lower, first, first);
  store(inner, 1.0f);  // where the result goes: only this warp has business in these columns
  __syncwarp();
  product(outer, inverse, second, second);
  __syncwarp();
  store(outer, -1.0f);
}

template <int key_dim>
struct PrepareMemory {
  Tile<key_dim> key{nullptr};
  float *gates, *lower, *inverse;
  Tile<64> weighted{nullptr}, rest{nullptr};  // ρ ⊙ A rounded, and what the rounding took

  static constexpr size_t square = kChunk * kPitch * sizeof(float);
  static constexpr size_t bytes = Tile<key_dim>::bytes(kChunk) + kGates * sizeof(float) + 2 * square;

  __device__ explicit PrepareMemory(char* shared) {
    key.base = reinterpret_cast<bf16*>(shared);
    shared += Tile<key_dim>::bytes(kChunk);
    gates = reinterpret_cast<float*>(shared);
    shared += kGates * sizeof(float);
    lower = reinterpret_cast<float*>(shared);
    weighted.base = reinterpret_cast<bf16*>(shared);  // once L has served
    rest.base = weighted.base + kChunk * kChunk;
    inverse = reinterpret_cast<float*>(shared + square);
  }
};

template <int key_dim>
__global__ void __launch_bounds__(kThreads) prepare_kernel(const GatedDeltaArguments p) {
  const Block block = Block::of_grid(p);
  const PrepareMemory<key_dim> memory(shared_memory());
  const int warp = static_cast<int>(threadIdx.x) / 32, m0 = 16 * warp;
  bf16* kept = static_cast<bf16*>(p.inverse) + block.index * kChunk * kChunk;

  const bf16* key = block.key_rows(p);
  load_tile<key_dim, kChunk, kThreads>(memory.key, block.valid,
                                       [&](int row) { return key + row * p.key.time; });
  commit_copies();
  if (warp == 0) write_gates(p, block, memory.gates);
  wait_copies<0>();
  __syncthreads();
  const Gates gates(memory.gates);

  Accumulator<1, 8> products;
  products.clear();
  multiply<Layout::plain, Layout::plain>(products, memory.key, m0, memory.key, 0, 0, key_dim);
  products.for_pairs([&](int row, int column, float& first, float& second) {
    const int i = m0 + row;
    float2 lower{0.0f, 0.0f};
    if (i > column) lower.x = gates.beta[i] * gates.between(i, column) * first;
    if (i > column + 1) lower.y = gates.beta[i] * gates.between(i, column + 1) * second;
    *reinterpret_cast<float2*>(memory.lower + i * kPitch + column) = lower;
    *reinterpret_cast<float2*>(memory.inverse + i * kPitch + column) = {0.0f, 0.0f};
  });
  __syncthreads();
  invert_diagonal(memory.lower, memory.inverse);
  __syncthreads();
  merge<16>(memory.lower, memory.inverse, warp / 2 * 32, warp % 2 * 8);
  __syncthreads();
  merge<32>(memory.lower, memory.inverse, 0, 8 * warp);
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x); i < kChunk * kChunk / 8; i += kThreads) {
    const int row = i / 8, column = i % 8 * 8;
    const float* a = memory.inverse + row * kPitch + column;
    const float rho = gates.rho(row);
    uint4 rounded, weighted, rest;
    auto* to = reinterpret_cast<uint32_t*>(&rounded);
    auto *high = reinterpret_cast<uint32_t*>(&weighted), *low = reinterpret_cast<uint32_t*>(&rest);
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      to[e] = pack(a[2 * e], a[2 * e + 1]);
      const float first = rho * a[2 * e], second = rho * a[2 * e + 1];
      high[e] = pack(first, second);
      const float2 kept_part = unpack(high[e]);
      low[e] = pack(first - kept_part.x, second - kept_part.y);
    }
    *reinterpret_cast<uint4*>(kept + row * kChunk + column) = rounded;
    *reinterpret_cast<uint4*>(memory.weighted.unit(row, column)) = weighted;
    *reinterpret_cast<uint4*>(memory.rest.unit(row, column)) = rest;
  }
  __syncthreads();

  // E: what A does to keys that are alike cancels, so it enters unrounded. Stored through the rows of this
  // warp in the key's tile once everyone has read that.
  Accumulator<1, key_dim / 8> transfer;
  transfer.clear();
  multiply<Layout::transposed, Layout::transposed>(transfer, memory.weighted, m0, memory.key, 0, 0, kChunk);
  multiply<Layout::transposed, Layout::transposed>(transfer, memory.rest, m0, memory.key, 0, 0, kChunk);
  __syncthreads();
  transfer.store(memory.key, m0, 0);
  __syncwarp();
  bf16* out = static_cast<bf16*>(p.transfer) + (block.index * kChunk + m0) * key_dim;
  for (int i = static_cast<int>(threadIdx.x) % 32; i < 16 * key_dim / 8; i += 32) {
    const int row = i / (key_dim / 8), column = i % (key_dim / 8) * 8;
    *reinterpret_cast<uint4*>(out + row * key_dim + column) =
        *reinterpret_cast<const uint4*>(memory.key.unit(m0 + row, column));
  }
}

}  // namespace

void gated_delta_prepare(const GatedDeltaArguments& p, void* stream) {
  const dim3 grid(static_cast<unsigned>(blocks_of(p)));
  if (p.key_dim == 128) {
    launch<prepare_kernel<128>>(grid, kThreads, PrepareMemory<128>::bytes, stream, p);
  } else {
    launch<prepare_kernel<64>>(grid, kThreads, PrepareMemory<64>::bytes, stream, p);
  }
}

}  // namespace oryx::cuda
