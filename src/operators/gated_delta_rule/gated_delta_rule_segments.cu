// A sequence in segments that are walked over side by side: what each makes of the state before it,
// S' = T S + N, then the states between them, one after another.
#include <algorithm>

#include "operators/gated_delta_rule/gated_delta_rule_walk.h"

namespace oryx::cuda {
namespace {

template <int key_dim, int width>
using Memory = PassMemory<key_dim, width, false>;

// N is the state after the segment if it begins with 0, T the same if it begins with I and all values are 0:
// so the columns of T are walked with like more columns of N.
template <int key_dim, int width>
__global__ void __launch_bounds__(Memory<key_dim, width>::threads, 1)
    split_kernel(const GatedDeltaArguments p) {
  using Memory = oryx::cuda::Memory<key_dim, width>;
  const Memory memory{shared_memory()};
  const int value_parts = p.value_dim / width;
  const Segment segment(p, static_cast<int>(blockIdx.x), value_parts + key_dim / width);
  const bool is_last = segment.index == p.segments - 1, is_transfer = segment.part >= value_parts;
  const bool is_needed =
      is_transfer ? (segment.index > 0 || p.initial_state != nullptr) && (!is_last || p.wants_last_transfer)
                  : !is_last;
  if (!is_needed) return;
  const int part_column = (segment.part - (is_transfer ? value_parts : 0)) * width;

  if (is_loader<Memory>()) {
    begin_loads<Memory>();
    const StreamLoads<key_dim, width> loads(p, segment.stream, part_column);
    return load_steps<Memory>(
        segment.chunks, [](int) {},
        [&](int step) {
          const auto stage = memory.stage(step);
          const int chunk = segment.first + step;
          loads.load_keys(stage.key, chunk);
          if (!is_transfer) loads.load_values(stage.slice, chunk);
          loads.load_gates(stage.gates, chunk);
          loads.load_inverse(stage.inverse, chunk);
        },
        [](int) {});
  }
  begin_walk<Memory>();
  StateRows<key_dim> state;
  state.values.for_pairs([&](int row, int column, float& first, float& second) {
    const int diagonal = part_column + state.column0() + row;
    first = is_transfer && column == diagonal ? 1.0f : 0.0f;
    second = is_transfer && column + 1 == diagonal ? 1.0f : 0.0f;
  });
  walk_steps<Memory>(segment.chunks, [&](int step) {
    take_step(
        state, memory.stage(step), !is_transfer, [](const auto&) {}, [](const auto&) {});
  });
  const int64_t at = segment.stream * p.segments + segment.index;
  if (is_transfer) {
    state.write(p.segment_transfers + at * key_dim * key_dim + part_column, key_dim);
  } else {
    state.write(p.segment_states + (at + 1) * key_dim * p.value_dim + part_column, p.value_dim);
  }
}

// The states between the segments of a stream, 16 columns a block and 16 rows a warp: from the first on what
// lies there, N, becomes T S + N; in reverse, from the last dS on, Z becomes Tᵀ dS + Z. In tf32, summed in
// float32.
constexpr int kJoined = 16;

template <int key_dim>
struct JoinMemory {
  static constexpr int threads = 2 * key_dim;
  // Fragments along rows as along columns lie in different banks.
  static constexpr int transfer_pitch = key_dim + 4, state_pitch = kJoined + 8;
  static constexpr int transfer_floats = key_dim * transfer_pitch, state_floats = key_dim * state_pitch;
  static constexpr size_t bytes = sizeof(float) * 2 * (transfer_floats + state_floats);
};

template <int key_dim, bool reverse>
__global__ void __launch_bounds__(JoinMemory<key_dim>::threads, 1) join_kernel(const GatedDeltaArguments p) {
  using Memory = JoinMemory<key_dim>;
  float* memory = reinterpret_cast<float*>(shared_memory());
  const int thread = static_cast<int>(threadIdx.x), g = thread % 32 / 4, t = thread % 4;
  const int row0 = thread / 32 * 16;
  const int parts = p.value_dim / kJoined, column0 = static_cast<int>(blockIdx.x) % parts * kJoined;
  const int64_t stream = static_cast<int64_t>(blockIdx.x) / parts;
  const int64_t state_size = static_cast<int64_t>(key_dim) * p.value_dim;
  const float* begin = reverse ? p.d_final_state : p.initial_state;
  float* states = (reverse ? p.d_segment_states : p.segment_states) + stream * p.segments * state_size;
  // The segments in the order of this kernel.
  const auto segment = [&](int step) { return reverse ? p.segments - 1 - step : step; };
  const auto transfer = [&](int step) { return memory + step % 2 * Memory::transfer_floats; };
  const auto state = [&](int step) {
    return memory + 2 * Memory::transfer_floats + step % 2 * Memory::state_floats;
  };
  const int first = begin == nullptr ? 1 : 0;  // of the steps that have a state
  const auto load = [&](int step) {
    if (step >= first && step + 1 < p.segments) {
      const float* from = p.segment_transfers + (stream * p.segments + segment(step)) * key_dim * key_dim;
#pragma unroll 8
      for (int i = thread; i < key_dim * key_dim / 4; i += Memory::threads) {
        const int at = i / (key_dim / 4), unit = i % (key_dim / 4) * 4;
        copy_async(transfer(step) + at * Memory::transfer_pitch + unit, from + at * key_dim + unit);
      }
    }
    commit_copies();
  };

  load(0);
  load(1);
  using Sums = float[2][4];
  // function(row, column, pair) for what the thread has of the block's columns.
  const auto for_pairs = [&](Sums& x, auto function) {
#pragma unroll
    for (int j = 0; j < 2; ++j)
#pragma unroll
      for (int below = 0; below < 2; ++below)
        function(row0 + g + 8 * below, 8 * j + 2 * t, *reinterpret_cast<float2*>(x[j] + 2 * below));
  };
  const auto read = [&](Sums& x, const float* from) {
    for_pairs(x, [&](int row, int column, float2& pair) {
      pair = from == nullptr ? float2{0.0f, 0.0f}
                             : *reinterpret_cast<const float2*>(from + row * p.value_dim + column0 + column);
    });
  };
  // What lies there of a step, read while the step before it is worked on.
  const auto read_step = [&](Sums& x, int step) {
    read(x, step < p.segments ? states + segment(step) * state_size : nullptr);
  };
  Sums sum, next, following;
  read(sum, begin == nullptr ? nullptr : begin + stream * state_size);
  read_step(next, 1);
  for (int step = 0;; ++step) {
    float* to = states + segment(step) * state_size;
    for_pairs(sum, [&](int row, int column, float2& pair) {
      *reinterpret_cast<float2*>(to + row * p.value_dim + column0 + column) = pair;
      *reinterpret_cast<float2*>(state(step) + row * Memory::state_pitch + column) = pair;
    });
    if (step + 1 == p.segments) break;
    read_step(following, step + 2);
#pragma unroll
    for (int j = 0; j < 2; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) sum[j][e] = next[j][e];
    wait_copies<1>();
    __syncthreads();
    if (step >= first) {
      // Of A, element (i, k) of the warp's rows.
      const float *left = transfer(step) + (reverse ? row0 : row0 * Memory::transfer_pitch),
                  *right = state(step);
      const auto element = [&](int i, int k) {
        return to_tf32(left[reverse ? k * Memory::transfer_pitch + i : i * Memory::transfer_pitch + k]);
      };
#pragma unroll 4
      for (int k = 0; k < key_dim; k += 8) {
        const uint32_t a[4] = {element(g, k + t), element(g + 8, k + t), element(g, k + t + 4),
                               element(g + 8, k + t + 4)};
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const float* b = right + (k + t) * Memory::state_pitch + 8 * j + g;
          multiply_add_tf32(sum[j], a, to_tf32(b[0]), to_tf32(b[4 * Memory::state_pitch]));
        }
      }
    }
    __syncthreads();
    load(step + 2);
#pragma unroll
    for (int j = 0; j < 2; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) next[j][e] = following[j][e];
  }
  wait_copies<0>();
}

// What a chunk costs a block of a pass on an H200 with 128 columns and key_dim 128: the time that its
// products wait for each other, estimated and not measured, and the bytes that it moves.
struct Step {
  double microseconds, bytes;
};
constexpr Step kOutputs{2.4, 74e3}, kSplit{1.8, 34e3}, kBackward{2.8, 104e3}, kSplitGradients{2.6, 58e3};
constexpr double kBytesPerMicrosecond = 4e6, kJoin = 2.0, kLaunches = 10.0;

}  // namespace

int gated_delta_segments(const GatedDeltaArguments& p, bool differentiates) {
  const int64_t streams = static_cast<int64_t>(p.batch) * p.state_heads;
  const auto time = [&](int segments) {
    const int length = (p.chunks + segments - 1) / segments;
    const auto walk = [&](int64_t blocks, const Step& step, double width) {
      const int64_t rounds = (blocks + p.multiprocessors - 1) / p.multiprocessors;
      const double bytes = step.bytes * (p.key_dim + width) / 256;
      return length * std::max(static_cast<double>(rounds) * step.microseconds,
                               static_cast<double>(blocks) * bytes / kBytesPerMicrosecond);
    };
    const auto walk_all = [&](int64_t passes, const Step& step) {
      const int width = width_of_parts(p, passes * streams * segments);
      return walk(passes * streams * segments * (p.value_dim / width), step, width);
    };
    const double joins = kLaunches + kJoin * segments;
    double sum = walk_all(1, kOutputs);
    if (segments > 1) sum += walk(2 * streams * (segments - 1), kSplit, p.value_dim) + joins;
    if (differentiates) {
      sum += walk_all(2, kBackward);
      if (segments > 1) sum += walk(streams * (segments - 1), kSplitGradients, p.value_dim) + joins;
    }
    return sum;
  };
  int best = 1;
  double shortest = time(best);
  for (int segments = 2; segments <= 64 && 2 * segments <= p.chunks; ++segments) {
    const double t = time(segments);
    if (t < shortest) best = segments, shortest = t;
  }
  return best;
}

void join_segments(const GatedDeltaArguments& p, bool reverse, void* stream) {
  const auto join = [&]<int key_dim>() {
    const auto grid = static_cast<unsigned>(p.batch * p.state_heads * (p.value_dim / kJoined));
    using Memory = JoinMemory<key_dim>;
    reverse ? launch<join_kernel<key_dim, true>>(dim3(grid), Memory::threads, Memory::bytes, stream, p)
            : launch<join_kernel<key_dim, false>>(dim3(grid), Memory::threads, Memory::bytes, stream, p);
  };
  p.key_dim == 128 ? join.template operator()<128>() : join.template operator()<64>();
}

void gated_delta_split(const GatedDeltaArguments& p, void* stream) {
  with_width(p, 2, [&]<int key_dim, int width>() {
    constexpr int part = key_dim == 128 ? width : 64;
    const int parts = p.value_dim / part + key_dim / part;
    const auto grid = static_cast<unsigned>(p.batch * p.state_heads * p.segments * parts);
    launch<split_kernel<key_dim, part>>(dim3(grid), Memory<key_dim, part>::threads,
                                        Memory<key_dim, part>::bytes, stream, p);
  });
  join_segments(p, /*reverse=*/false, stream);
}

}  // namespace oryx::cuda
