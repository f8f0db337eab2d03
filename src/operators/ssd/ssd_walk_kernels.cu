#include <iterator>
#include <type_traits>

#include "operators/ssd/ssd_device.h"
#include "operators/ssd/ssd_kernels.h"

namespace oryx::cuda {

namespace {

constexpr int kDecayThreads = 128;

// One warp a chunk: a prefix sum in float64, because behind a token with a decay of e^−5000 a float would
// leave three digits of the differences.
__global__ void __launch_bounds__(kDecayThreads) decay_kernel(const SsdDecayArguments p) {
  constexpr int own = kSsdChunk / 32;  // neighbouring tokens of a lane
  const int64_t heads = p.shape.state_heads, time = p.shape.time, chunks = p.shape.chunks;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * (kDecayThreads / 32) + threadIdx.x / 32;
  if (index >= p.shape.batch * heads * chunks) return;
  const int64_t stream = index / chunks, first = index % chunks * kSsdChunk + lane * own;
  const int64_t batch = stream / heads, head = stream % heads;
  double sum[own];
  float step[own];
  for (int i = 0; i < own; ++i) {
    const int64_t at = (batch * time + first + i) * heads + head;
    const bool valid = first + i < time;
    sum[i] = (i > 0 ? sum[i - 1] : 0.0) + (valid ? static_cast<double>(p.log_decay[at]) : 0.0);
    step[i] = valid ? p.step[at] : 0.0f;
  }
  double before = sum[own - 1];  // inclusive over lanes, then exclusive
  for (int distance = 1; distance < 32; distance *= 2) {
    const double other = __shfl_up_sync(0xffffffffu, before, distance);
    if (lane >= distance) before += other;
  }
  const double end = __shfl_sync(0xffffffffu, before, 31);
  before -= sum[own - 1];
  const double log2e = 1.4426950408889634;
  const int64_t to = index * kSsdChunk + lane * own;
  for (int i = 0; i < own; ++i) {
    const double total = before + sum[i];
    const float high = static_cast<float>(total * log2e);
    p.decay.cumulative[2 * (to + i)] = high;
    p.decay.cumulative[2 * (to + i) + 1] = static_cast<float>(total * log2e - high);
    p.decay.step[to + i] = step[i];
    p.decay.gamma[to + i] = exp2f(high);
    p.decay.weight[to + i] = exp2f(static_cast<float>((end - total) * log2e)) * step[i];
  }
}

constexpr int kWalkThreads = 128;
constexpr int kStages = 3;
constexpr int kSlice = 64;  // columns of the state that a block holds

template <int key_dim>
struct WalkStage {
  static constexpr size_t left_bytes = Tile<key_dim>::bytes(kSsdChunk),
                          right_bytes = Tile<kSlice>::bytes(kSsdChunk);
  static constexpr size_t bytes = left_bytes + right_bytes + 1024;
  Tile<key_dim> left;
  Tile<kSlice> right;
  float* weight;  // [64]
  float* factor;  // [4], the last is γ_64

  __device__ explicit WalkStage(char* base)
      : left{reinterpret_cast<bf16*>(base)},
        right{reinterpret_cast<bf16*>(base + left_bytes)},
        weight(reinterpret_cast<float*>(base + left_bytes + right_bytes)),
        factor(weight + kSsdChunk) {}
};

// sum += Leftᵀ (weight ⊙ Right) for rows m0 … of the state. The weights go to the left operand: its fragments
// belong to one warp only.
template <int row_tiles, int key_dim>
__device__ inline void add_weighted(Accumulator<row_tiles, kSlice / 8>& sum, const WalkStage<key_dim>& stage,
                                    int m0) {
  const int t = static_cast<int>(threadIdx.x) % 4;
  const auto left = Fragments<Layout::transposed, key_dim>::left(stage.left, m0);
  const auto right = Fragments<Layout::transposed, kSlice>::right(stage.right, 0);
#pragma unroll
  for (int k = 0; k < kSsdChunk; k += 16) {
    const float2 weight[2] = {*reinterpret_cast<const float2*>(stage.weight + k + 2 * t),
                              *reinterpret_cast<const float2*>(stage.weight + k + 2 * t + 8)};
    uint32_t a[row_tiles][4];
#pragma unroll
    for (int i = 0; i < row_tiles; ++i) {
      left.load(a[i], 16 * i, k);
      scale_a(a[i], weight);
    }
#pragma unroll
    for (int j = 0; j < kSlice / 8; j += 2) {
      uint32_t b[4];
      right.load(b, 8 * j, k);
#pragma unroll
      for (int i = 0; i < row_tiles; ++i) {
        multiply_add(sum.value[i][j], a[i], b[0], b[1]);
        multiply_add(sum.value[i][j + 1], a[i], b[2], b[3]);
      }
    }
  }
}

template <int key_dim, bool is_reverse>
__device__ inline void walk(const SsdWalk& p, int part) {
  constexpr int row_tiles = key_dim / 64;
  const cpu::MixerShape& shape = p.shape;
  const int64_t value_dim = shape.value_dim, stream = blockIdx.x;
  const int column0 = static_cast<int>(blockIdx.y) * kSlice;
  const bool is_local = p.local_pieces > 0;
  const int pieces = is_local ? static_cast<int>(p.local_pieces) : 1;
  const int segment = part / pieces;
  const int64_t batch = stream / shape.state_heads, head = stream % shape.state_heads;
  const int chunks = static_cast<int>(shape.chunks);
  // Output heads that answer from this state: in reverse each adds to its gradient.
  const int group = is_reverse ? static_cast<int>(shape.output_heads / shape.state_heads) : 1;
  const int segment_chunks = static_cast<int>(p.segment_chunks), segment_begin = segment * segment_chunks;
  const int segment_end = segment_begin + segment_chunks < chunks ? segment_begin + segment_chunks : chunks;
  const int piece_chunks = (segment_chunks + pieces - 1) / pieces;
  const int begin = segment_begin + part % pieces * piece_chunks;
  const int items =
      ((begin + piece_chunks < segment_end ? begin + piece_chunks : segment_end) - begin) * group;

  const auto stage_at = [&](int item) {
    return WalkStage<key_dim>(shared_memory() + item % kStages * WalkStage<key_dim>::bytes);
  };
  const auto chunk_of = [&](int item) {
    const int chunk = begin + item / group;
    return is_reverse ? chunks - 1 - chunk : chunk;
  };
  const auto has_product = [&](int chunk) { return !is_reverse || p.has_rows[batch * chunks + chunk] != 0; };
  // Reverse: the packed rows that this thread copies for the next item, read while the last one is worked on.
  constexpr int left_units = key_dim / 8, right_units = kSlice / 8;
  int32_t left_rows[kSsdChunk * left_units / kWalkThreads],
      right_rows[kSsdChunk * right_units / kWalkThreads];
  const auto find_rows = [&](int item) {
    if (!is_reverse || item >= items) return;
    const int64_t time = static_cast<int64_t>(chunk_of(item)) * kSsdChunk;
    const auto find = [&](auto& rows, int first, int apart) {
#pragma unroll
      for (int pass = 0; pass < static_cast<int>(std::size(rows)); ++pass) {
        const int64_t at = time + first + pass * apart;
        rows[pass] = at < shape.time ? p.row_of[batch * shape.time + at] : -1;
      }
    };
    find(left_rows, static_cast<int>(threadIdx.x) / left_units, kWalkThreads / left_units);
    find(right_rows, static_cast<int>(threadIdx.x) / right_units, kWalkThreads / right_units);
  };
  const int key_head = static_cast<int>(head) / static_cast<int>(shape.state_heads / shape.key_heads);
  const int query_readers = static_cast<int>(shape.output_heads / shape.query_heads);
  const auto load = [&](int item) {
    if (item < items) {
      const WalkStage<key_dim> stage = stage_at(item);
      const int chunk = chunk_of(item);
      const int64_t time = static_cast<int64_t>(chunk) * kSsdChunk, valid = shape.time - time;
      if (has_product(chunk)) {
        if constexpr (is_reverse) {
          const int output_head = static_cast<int>(head) * group + item % group;
          const int query_head = output_head / query_readers;
          load_rows<key_dim, kSsdChunk, kWalkThreads>(stage.left, p.left.data, [&](int, int pass) {
            return left_rows[pass] >= 0 ? packed_row(p.left, left_rows[pass], query_head) : nullptr;
          });
          load_rows<kSlice, kSsdChunk, kWalkThreads>(stage.right, p.right.data, [&](int, int pass) {
            return right_rows[pass] >= 0 ? packed_row(p.right, right_rows[pass], output_head) + column0
                                         : nullptr;
          });
        } else {
          const int count = valid < kSsdChunk ? static_cast<int>(valid) : kSsdChunk;
          load_even_rows<key_dim, kSsdChunk, kWalkThreads>(
              stage.left, count, token_row(p.left, batch, time, key_head), p.left.time);
          load_even_rows<kSlice, kSsdChunk, kWalkThreads>(
              stage.right, count, token_row(p.right, batch, time, head) + column0, p.right.time);
        }
      }
      const int64_t at = (stream * chunks + chunk) * kSsdChunk;
      load_floats(stage.weight, p.weight + at, kSsdChunk);
      load_floats(stage.factor, p.gamma + at + kSsdChunk - 4, 4);
    }
    commit_copies();
    find_rows(item + 1);
  };

  find_rows(0);
  load(0);
  load(1);
  const int m0 = static_cast<int>(threadIdx.x) / 32 * 16 * row_tiles;
  const int64_t state_size = key_dim * value_dim;
  Accumulator<row_tiles, kSlice / 8> state;
  state.clear();
  if (p.first_state != nullptr) {
    const float* from = p.first_state + (stream * p.segments + segment) * state_size + column0;
    state.for_pairs([&](int row, int column, float& first, float& second) {
      const float2 pair = *reinterpret_cast<const float2*>(from + (m0 + row) * value_dim + column);
      first = pair.x, second = pair.y;
    });
  }
  float total = 1.0f;  // decay over the segment
  for (int item = 0; item < items; ++item) {
    wait_copies<kStages - 2>();
    __syncthreads();
    load(item + kStages - 1);
    const WalkStage<key_dim> stage = stage_at(item);
    const int chunk = chunk_of(item);
    const bool is_first = item % group == 0;
    if (p.states != nullptr && is_first) {
      bf16* to = static_cast<bf16*>(p.states) + (stream * shape.chunks + chunk) * state_size + column0;
      store_rows(state, [&](int row) { return to + (m0 + row) * value_dim; });
    }
    if (is_first) {
      const float factor = stage.factor[3];
      total *= factor;
      state.for_pairs([&](int, int, float& first, float& second) { first *= factor, second *= factor; });
    }
    if (has_product(chunk)) add_weighted(state, stage, m0);
  }
  wait_copies<0>();
  const int64_t piece = stream * (p.segments - 1) * pieces + part;
  if (p.last_state != nullptr && (is_local || segment == p.segments - 1)) {
    float* to = p.last_state + (is_local ? piece : stream) * state_size + column0;
    state.for_pairs([&](int row, int column, float& first, float& second) {
      *reinterpret_cast<float2*>(to + (m0 + row) * value_dim + column) = {first, second};
    });
  }
  if (is_local && threadIdx.x == 0 && blockIdx.y == 0) p.last_factor[piece] = total;
}

struct SsdWalks {
  SsdWalk forward, reverse;
  int parts;  // of forward
};

template <int key_dim, bool has_forward, bool has_reverse>
__global__ void __launch_bounds__(kWalkThreads, 3) walk_kernel(const SsdWalks p) {
  const int part = static_cast<int>(blockIdx.z);
  if (has_forward && (!has_reverse || part < p.parts)) {
    walk<key_dim, false>(p.forward, part);
  } else {
    walk<key_dim, true>(p.reverse, part - p.parts);
  }
}

constexpr int kJoinThreads = 256;

__global__ void __launch_bounds__(kJoinThreads) join_segments_kernel(const SsdSegments p) {
  const int64_t stream = blockIdx.y;
  const int64_t at = (static_cast<int64_t>(blockIdx.x) * kJoinThreads + threadIdx.x) * 4;
  if (at >= p.state_size) return;
  float4 state = {0.0f, 0.0f, 0.0f, 0.0f};
  if (p.first_state != nullptr) {
    state = *reinterpret_cast<const float4*>(p.first_state + stream * p.state_size + at);
  }
  float* to = p.states + stream * p.segments * p.state_size + at;
  *reinterpret_cast<float4*>(to) = state;
  const int pieces = static_cast<int>(p.local_pieces), count = static_cast<int>(p.segments - 1) * pieces;
  const float* from = p.local_states + stream * count * p.state_size + at;
  const float* factors = p.factor + stream * count;
  float4 local = *reinterpret_cast<const float4*>(from);
  for (int piece = 0; piece < count; ++piece) {
    from += p.state_size;
    float4 next = {};  // on its way while this one is added
    if (piece + 1 < count) next = *reinterpret_cast<const float4*>(from);
    const float factor = factors[piece];
    state = {factor * state.x + local.x, factor * state.y + local.y, factor * state.z + local.z,
             factor * state.w + local.w};
    local = next;
    if ((piece + 1) % pieces == 0) {
      to += p.state_size;
      *reinterpret_cast<float4*>(to) = state;
    }
  }
}

}  // namespace

void ssd_decay(const SsdDecayArguments& a, void* stream) {
  const int64_t warps = a.shape.batch * a.shape.state_heads * a.shape.chunks;
  const dim3 grid(static_cast<unsigned>((warps + kDecayThreads / 32 - 1) / (kDecayThreads / 32)));
  launch<decay_kernel>(grid, kDecayThreads, 0, stream, a);
}

void ssd_walk(const SsdWalk* forward, const SsdWalk* reverse, void* stream) {
  const auto parts = [](const SsdWalk* walk) -> int64_t {
    if (walk == nullptr) return 0;
    return walk->local_pieces > 0 ? (walk->segments - 1) * walk->local_pieces : walk->segments;
  };
  const cpu::MixerShape& shape = forward != nullptr ? forward->shape : reverse->shape;
  const dim3 grid(static_cast<unsigned>(shape.batch * shape.state_heads),
                  static_cast<unsigned>(shape.value_dim / kSlice),
                  static_cast<unsigned>(parts(forward) + parts(reverse)));
  SsdWalks walks{};
  if (forward != nullptr) walks.forward = *forward, walks.parts = static_cast<int>(parts(forward));
  if (reverse != nullptr) walks.reverse = *reverse;
  with_dimensions(shape, [&](auto key_dim, auto) {
    const auto launch_of = [&]<bool has_forward, bool has_reverse>() {
      launch<walk_kernel<key_dim, has_forward, has_reverse>>(
          grid, kWalkThreads, kStages * WalkStage<key_dim>::bytes, stream, walks);
    };
    if (reverse == nullptr) {
      launch_of.template operator()<true, false>();
    } else if (forward == nullptr) {
      launch_of.template operator()<false, true>();
    } else {
      launch_of.template operator()<true, true>();
    }
  });
}

void ssd_join_segments(const SsdSegments& a, void* stream) {
  const dim3 grid(static_cast<unsigned>((a.state_size + 4 * kJoinThreads - 1) / (4 * kJoinThreads)),
                  static_cast<unsigned>(a.streams));
  launch<join_segments_kernel>(grid, kJoinThreads, 0, stream, a);
}

}  // namespace oryx::cuda
