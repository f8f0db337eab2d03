// What a chunk needs before its state is known, one block of threads per chunk: C with A = I + β ⊙ C, the
// transfer E = Aᵀ (ρ ⊙ K) and the weights P A of outputs.
#include "operators/gated_delta_rule/gated_delta_rule_device.h"

namespace oryx::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kPitch = 68;  // of a float32 square: fragments of tf32 products lie in different banks

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
  if (threadIdx.x % 32 < 16) {
#pragma unroll
    for (int i = 0; i < 16; ++i)
      if (i > column) *inverse_at(square, first + i, first + column) = c[i];
  }
}

// The warp's 8 columns from `column` of the square below the diagonal squares [first, first + size) and
// [first + size, first + 2 size), whose C are there: C₂₁ = −(I + C₂₂ ⊙ β) L'₂₁ (I + β ⊙ C₁₁), in tf32.
template <int size>
__device__ void merge(float* square, const float* beta, int first, int column) {
  const int lane = static_cast<int>(threadIdx.x) % 32, g = lane / 4, t = lane % 4;
  const int second = first + size;
  constexpr int tiles = size / 16;
  // The element of C of a square on the diagonal; what else lies around is left out.
  const auto kept = [&](int from, int i, int j) {
    return i > j ? *inverse_at(square, from + i, from + j) : 0.0f;
  };
  float sum[tiles][4];
  const auto store = [&](float sign) {
#pragma unroll
    for (int i = 0; i < tiles; ++i)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        *inverse_at(square, second + 16 * i + g + 8 * (e / 2), first + column + 2 * t + e % 2) =
            sign * sum[i][e];
      }
  };
#pragma unroll
  for (int i = 0; i < tiles; ++i)
#pragma unroll
    for (int e = 0; e < 4; ++e)
      sum[i][e] = *lower_at(square, second + 16 * i + g + 8 * (e / 2), first + column + 2 * t + e % 2);
#pragma unroll
  for (int k = 0; k < size; k += 8) {
    const float beta0 = beta[first + k + t], beta1 = beta[first + k + t + 4];
    const uint32_t b0 = to_tf32(beta0 * kept(first, k + t, column + g));
    const uint32_t b1 = to_tf32(beta1 * kept(first, k + t + 4, column + g));
#pragma unroll
    for (int i = 0; i < tiles; ++i) {
      const float* row = lower_at(square, second + 16 * i + g, first + k + t);
      const uint32_t a[4] = {to_tf32(row[0]), to_tf32(row[8 * kPitch]), to_tf32(row[4]),
                             to_tf32(row[8 * kPitch + 4])};
      multiply_add_tf32(sum[i], a, b0, b1);
    }
  }
  store(1.0f);  // where the result goes: only this warp has business in these columns
  __syncwarp();
#pragma unroll
  for (int k = 0; k < size; k += 8) {
    const float* right = inverse_at(square, second + k + t, first + column + g);
    const uint32_t b0 = to_tf32(beta[second + k + t] * right[0]);
    const uint32_t b1 = to_tf32(beta[second + k + t + 4] * right[4]);
#pragma unroll
    for (int i = 0; i < tiles; ++i) {
      const int row = 16 * i + g;
      const uint32_t a[4] = {to_tf32(kept(second, row, k + t)), to_tf32(kept(second, row + 8, k + t)),
                             to_tf32(kept(second, row, k + t + 4)),
                             to_tf32(kept(second, row + 8, k + t + 4))};
      multiply_add_tf32(sum[i], a, b0, b1);
    }
  }
  __syncwarp();
  store(-1.0f);
}

template <int key_dim>
struct PrepareMemory {
  Tile<key_dim> key{nullptr}, query{nullptr};
  float *gates, *square;
  Tile<64> inverse{nullptr};  // in the square's place

  static constexpr size_t bytes(bool solves) {
    return 2 * Tile<key_dim>::bytes(kChunk) + kGates * sizeof(float) +
           (solves ? kChunk * kPitch * sizeof(float) : Tile<64>::bytes(kChunk));
  }
  __device__ explicit PrepareMemory(char* shared) {
    key.base = reinterpret_cast<bf16*>(shared);
    query.base = key.base + kChunk * key_dim;
    inverse.base = query.base + kChunk * key_dim;
    square = reinterpret_cast<float*>(inverse.base);
    gates = reinterpret_cast<float*>(shared + 2 * Tile<key_dim>::bytes(kChunk));
    inverse.base += kGates * 2, square += kGates;
  }
};

// The warp's 16 rows of left Kᵀ in the columns up to its diagonal.
template <int key_dim>
__device__ void multiply_keys(Accumulator<1, 8>& sum, Tile<key_dim> left, Tile<key_dim> key) {
  const int warp = static_cast<int>(threadIdx.x) / 32;
  sum.clear();
#pragma unroll 4
  for (int k = 0; k < key_dim; k += 16) {
    uint32_t a[4];
    load_a<Layout::plain>(a, left, 16 * warp, k);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (j > warp) continue;
      uint32_t b[4];
      load_b<Layout::plain>(b, key, 16 * j, k);
      multiply_add(sum.value[0][2 * j], a, b[0], b[1]);
      multiply_add(sum.value[0][2 * j + 1], a, b[2], b[3]);
    }
  }
}

// L' and C of the chunk, then C as it is kept.
template <int key_dim>
__device__ void solve(const PrepareMemory<key_dim>& memory) {
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, m0 = 16 * warp;
  const Gates gates(memory.gates);
  Accumulator<1, 8> products;
  multiply_keys(products, memory.key, memory.key);
  products.for_pairs([&](int row, int column, float& first, float& second) {
    const int i = m0 + row;
    if (i > column) *lower_at(memory.square, i, column) = gates.between(i, column) * first;
    if (i > column + 1) *lower_at(memory.square, i, column + 1) = gates.between(i, column + 1) * second;
  });
  __syncwarp();  // a warp's diagonal square is its own
  invert_diagonal(memory.square, gates.beta);
  __syncthreads();
  merge<16>(memory.square, gates.beta, warp / 2 * 32, warp % 2 * 8);
  __syncthreads();
  merge<32>(memory.square, gates.beta, 0, 8 * warp);
  __syncthreads();
  uint4 units[4];
#pragma unroll
  for (int n = 0; n < 4; ++n) {
    const int row = thread % kChunk, column0 = (thread / kChunk + 2 * n) * 8;
    float element[8];
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      const int column = column0 + e, i = row > column ? row : column, j = row > column ? column : row;
      const float c = i > j ? *inverse_at(memory.square, i, j) : 0.0f;
      element[e] = row > column ? c : c - __bfloat162float(__float2bfloat16_rn(c));
    }
    units[n] = {pack(element[0], element[1]), pack(element[2], element[3]), pack(element[4], element[5]),
                pack(element[6], element[7])};
  }
  __syncthreads();
#pragma unroll
  for (int n = 0; n < 4; ++n) {
    *reinterpret_cast<uint4*>(memory.inverse.unit(thread % kChunk, (thread / kChunk + 2 * n) * 8)) = units[n];
  }
  __syncthreads();
}

// The warp's 16 rows of E, 64 columns at a time. What A does to keys that are alike cancels, so it enters
// with what its rounding took.
template <int key_dim>
__device__ void write_transfer(const PrepareMemory<key_dim>& memory, bf16* out) {
  const int warp = static_cast<int>(threadIdx.x) / 32, t = static_cast<int>(threadIdx.x) % 4, m0 = 16 * warp;
  const Gates gates(memory.gates);
#pragma unroll 1
  for (int column0 = 0; column0 < key_dim; column0 += 64) {
    Accumulator<1, 8> transfer;
    transfer.for_pairs([&](int row, int column, float& first, float& second) {
      const float2 key = memory.key.load2(m0 + row, column0 + column);
      const float rho = gates.rho(m0 + row);
      first = rho * key.x, second = rho * key.y;
    });
#pragma unroll 1
    for (int i = warp; i < 4; ++i) {
      uint32_t high[4], low[4];
      load_inverse_a(high, low, memory.inverse, i, warp);
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int row = 16 * i + 2 * t + e / 2 * 8;
        const float2 rounded = unpack(high[e]), rest = unpack(low[e]);
        const float first = gates.beta[row] * gates.rho(row) * (rounded.x + rest.x);
        const float second = gates.beta[row + 1] * gates.rho(row + 1) * (rounded.y + rest.y);
        high[e] = pack(first, second);
        const float2 kept = unpack(high[e]);
        low[e] = pack(first - kept.x, second - kept.y);
      }
#pragma unroll
      for (int j = 0; j < 8; j += 2) {
        uint32_t b[4];
        load_b<Layout::transposed>(b, memory.key, column0 + 8 * j, 16 * i);
        multiply_add(transfer.value[0][j], high, b[0], b[1]);
        multiply_add(transfer.value[0][j + 1], high, b[2], b[3]);
        multiply_add(transfer.value[0][j], low, b[0], b[1]);
        multiply_add(transfer.value[0][j + 1], low, b[2], b[3]);
      }
    }
    write_rows(transfer, [&](int row) { return out + (m0 + row) * key_dim + column0; });
  }
}

// The warp's 16 rows of scale · P A = scale · (P + (P ⊙ β) C).
template <int key_dim>
__device__ void write_weights(const PrepareMemory<key_dim>& memory, float scale, bf16* out) {
  const int warp = static_cast<int>(threadIdx.x) / 32, m0 = 16 * warp;
  const Gates gates(memory.gates);
  Accumulator<1, 8> weights;
  multiply_keys(weights, memory.query, memory.key);
  const int row = m0 + static_cast<int>(threadIdx.x) % 32 / 4, t = static_cast<int>(threadIdx.x) % 4;
  uint32_t scores[4][4];  // P ⊙ β, an A operand
#pragma unroll
  for (int j = 0; j < 8; ++j)
#pragma unroll
    for (int below = 0; below < 2; ++below) {
      const int i = row + 8 * below, column = 8 * j + 2 * t;
      float &first = weights.value[0][j][2 * below], &second = weights.value[0][j][2 * below + 1];
      first *= scale * gates.between(i, column), second *= scale * gates.between(i, column + 1);
      scores[j / 2][j % 2 * 2 + below] = pack(gates.beta[column] * first, gates.beta[column + 1] * second);
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

template <int key_dim, bool solves>
__global__ void __launch_bounds__(kThreads, 4) prepare_kernel(const GatedDeltaArguments p) {
  const Block block = Block::of_grid(p, /*from_last=*/solves);
  const PrepareMemory<key_dim> memory(shared_memory());
  const int thread = static_cast<int>(threadIdx.x);
  const int32_t* rows = block.row_table(p);
  const int readers = rows[kChunk] > 0 ? p.output_heads / p.state_heads : 0;
  bf16* inverse = static_cast<bf16*>(p.inverse) + block.index * kChunk * kChunk;

  const bf16* key = block.key_rows(p);
  load_rows<key_dim, key_dim, kChunk, kThreads>(memory.key, thread, block.valid,
                                                [&](int row) { return key + row * p.key.time; });
  if (!solves) {
    load_rows<64, 64, kChunk, kThreads>(memory.inverse, thread, kChunk,
                                        [&](int row) { return inverse + row * kChunk; });
  }
  commit_copies();
  const auto load_query = [&](int reader) {
    const int head =
        (block.head * (p.output_heads / p.state_heads) + reader) / (p.output_heads / p.query_heads);
    load_packed<key_dim, key_dim, kThreads>(memory.query, thread, rows, p.query, head, 0);
    commit_copies();
  };
  if (readers > 0) load_query(0);
  if (thread < 32) write_gates(p, block, memory.gates);
  readers > 0 ? wait_copies<1>() : wait_copies<0>();
  __syncthreads();
  if constexpr (solves) {
    solve(memory);
    if (p.inverse != nullptr) {
#pragma unroll
      for (int i = thread; i < kChunk * kChunk / 8; i += kThreads)
        reinterpret_cast<uint4*>(inverse)[i] =
            *reinterpret_cast<const uint4*>(memory.inverse.unit(i / 8, i % 8 * 8));
    }
  }
  write_transfer(memory, static_cast<bf16*>(p.transfer) + block.index * kChunk * key_dim);
  for (int reader = 0; reader < readers; ++reader) {
    if (reader > 0) {
      __syncthreads();
      load_query(reader);
    }
    wait_copies<0>();
    __syncthreads();
    write_weights(memory, p.scale,
                  static_cast<bf16*>(p.weights) + (block.index * readers + reader) * kChunk * kChunk);
  }
}

template <bool solves>
void prepare(const GatedDeltaArguments& p, void* stream) {
  const dim3 grid(static_cast<unsigned>(blocks_of(p)));
  if (p.key_dim == 128) {
    launch<prepare_kernel<128, solves>>(grid, kThreads, PrepareMemory<128>::bytes(solves), stream, p);
  } else {
    launch<prepare_kernel<64, solves>>(grid, kThreads, PrepareMemory<64>::bytes(solves), stream, p);
  }
}

}  // namespace

void gated_delta_prepare(const GatedDeltaArguments& p, void* stream) { prepare<true>(p, stream); }
void gated_delta_prepare_again(const GatedDeltaArguments& p, void* stream) { prepare<false>(p, stream); }

}  // namespace oryx::cuda
