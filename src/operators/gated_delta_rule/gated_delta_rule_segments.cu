// A sequence in segments that are walked over side by side: what each makes of the state before it,
// S' = T S + N, then the states between them, one after another.
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

  const auto load = [&](int step, int thread) {
    const Block block(p, segment.stream, segment.first + step);
    const auto stage = memory.stage(step);
    load_keys(p, block, stage.key, thread);
    if (!is_transfer) load_values<width>(p, block, stage.slice, part_column, thread);
    load_gates(p, block, stage.gates, thread);
    load_transfer(p, block, stage.transfer, thread);
  };

  if (threadIdx.x >= Memory::walkers)
    return load_chunks<Memory>(
        segment.chunks, [](int, int) {}, load);
  begin_walk<Memory>();
  StateRows<key_dim> state;
  state.values.for_pairs([&](int row, int column, float& first, float& second) {
    const int diagonal = part_column + state.column0() + row;
    first = is_transfer && column == diagonal ? 1.0f : 0.0f;
    second = is_transfer && column + 1 == diagonal ? 1.0f : 0.0f;
  });
  walk_chunks<Memory>(segment.chunks, [&](int step) {
    const auto stage = memory.stage(step);
    const Gates gates(stage.gates);
    Accumulator<1, 8> residual;
    uint32_t weighted[4][4];
    is_transfer ? find_residual<false>(residual, weighted, state, stage.key, stage.slice, gates)
                : find_residual<true>(residual, weighted, state, stage.key, stage.slice, gates);
    state.scale(gates.total());
    const FragmentsB<Layout::transposed, key_dim> transfer(stage.transfer);
#pragma unroll
    for (int k = 0; k < 4; ++k) state.add(weighted[k], transfer, k);
  });
  const int64_t at = segment.stream * p.segments + segment.index;
  if (is_transfer) {
    state.write(p.segment_transfers + at * key_dim * key_dim + part_column, key_dim);
  } else {
    state.write(p.segment_states + (at + 1) * key_dim * p.value_dim + part_column, p.value_dim);
  }
}

// The states between the segments of a stream, 16 columns a block: from the first on what lies there, N,
// becomes T S + N; in reverse, from the last dS on, Z becomes Tᵀ dS + Z.
constexpr int kJoined = 16;

template <int key_dim>
struct JoinMemory {
  static constexpr int threads = 2 * key_dim;
  static constexpr int pitch = key_dim + 4;  // neither rows nor columns conflict
  static constexpr int transfer_floats = key_dim * pitch, state_floats = key_dim * kJoined;
  static constexpr size_t bytes = sizeof(float) * 2 * (transfer_floats + state_floats);
};

template <int key_dim, bool reverse>
__global__ void __launch_bounds__(JoinMemory<key_dim>::threads, 1) join_kernel(const GatedDeltaArguments p) {
  using Memory = JoinMemory<key_dim>;
  float* memory = reinterpret_cast<float*>(shared_memory());
  const int thread = static_cast<int>(threadIdx.x), row = thread % key_dim, half = thread / key_dim * 8;
  const int parts = p.value_dim / kJoined, column = static_cast<int>(blockIdx.x) % parts * kJoined + half;
  const int64_t stream = static_cast<int64_t>(blockIdx.x) / parts;
  const int64_t state_size = static_cast<int64_t>(key_dim) * p.value_dim, own = row * p.value_dim + column;
  const float* begin = reverse ? p.d_final_state : p.initial_state;
  float* states = (reverse ? p.d_segment_states : p.segment_states) + stream * p.segments * state_size + own;
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
        copy_async(transfer(step) + at * Memory::pitch + unit, from + at * key_dim + unit);
      }
    }
    commit_copies();
  };

  load(0);
  load(1);
  float sum[8];
  const auto read = [&](const float* from) {
#pragma unroll
    for (int e = 0; e < 8; ++e) sum[e] = from == nullptr ? 0.0f : from[e];
  };
  const auto write = [&](float* to) {
    reinterpret_cast<float4*>(to)[0] = {sum[0], sum[1], sum[2], sum[3]};
    reinterpret_cast<float4*>(to)[1] = {sum[4], sum[5], sum[6], sum[7]};
  };
  read(begin == nullptr ? nullptr : begin + stream * state_size + own);
  for (int step = 0;; ++step) {
    write(states + segment(step) * state_size);
    write(state(step) + row * kJoined + half);
    if (step + 1 == p.segments) break;
    read(states + segment(step + 1) * state_size);
    wait_copies<1>();
    __syncthreads();
    if (step >= first) {
      const float *left = transfer(step), *right = state(step) + half;
#pragma unroll 4
      for (int k0 = 0; k0 < key_dim; k0 += 4) {
        float factor[4];
        if constexpr (reverse) {
#pragma unroll
          for (int k = 0; k < 4; ++k) factor[k] = left[(k0 + k) * Memory::pitch + row];
        } else {
          const float4 four = *reinterpret_cast<const float4*>(left + row * Memory::pitch + k0);
          factor[0] = four.x, factor[1] = four.y, factor[2] = four.z, factor[3] = four.w;
        }
#pragma unroll
        for (int k = 0; k < 4; ++k)
#pragma unroll
          for (int e = 0; e < 8; e += 4) {
            const float4 four = *reinterpret_cast<const float4*>(right + (k0 + k) * kJoined + e);
            sum[e] += factor[k] * four.x, sum[e + 1] += factor[k] * four.y;
            sum[e + 2] += factor[k] * four.z, sum[e + 3] += factor[k] * four.w;
          }
      }
    }
    __syncthreads();
    load(step + 2);
  }
  wait_copies<0>();
}

// Microseconds of a chunk on an H200 for a block with `width` columns, of the passes that do more than
// `split`.
double step_time(int width, bool split) { return (1.6 + 0.033 * width) * (split ? 0.7 : 1.0); }

}  // namespace

int gated_delta_segments(const GatedDeltaArguments& p, bool differentiates) {
  const int64_t streams = static_cast<int64_t>(p.batch) * p.state_heads;
  const auto time = [&](int segments) {
    const double length = (p.chunks + segments - 1) / segments;
    const auto walk = [&](int64_t blocks, int width, bool split) {
      return static_cast<double>((blocks + p.multiprocessors - 1) / p.multiprocessors) * length *
             step_time(width, split);
    };
    const auto main = [&](int64_t passes) {
      const int width = width_of_parts(p, passes * streams * segments);
      return walk(passes * streams * segments * (p.value_dim / width), width, false);
    };
    constexpr double join = 2.0, launches = 10.0;
    double sum = main(1) + (differentiates ? main(2) : 0.0);
    if (segments > 1) {
      sum += walk(streams * (segments - 1) * 2, 128, true) + launches + join * segments;
      if (differentiates) sum += walk(streams * (segments - 1), 128, false) + launches + join * segments;
    }
    return sum;
  };
  int best = 1;
  for (int segments = 2; segments <= 64 && 2 * segments <= p.chunks; ++segments)
    if (time(segments) < time(best)) best = segments;
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
    constexpr int part = width == 128 && key_dim == 128 ? 128 : 64;
    const int parts = p.value_dim / part + key_dim / part;
    const auto grid = static_cast<unsigned>(p.batch * p.state_heads * p.segments * parts);
    launch<split_kernel<key_dim, part>>(dim3(grid), Memory<key_dim, part>::threads,
                                        Memory<key_dim, part>::bytes, stream, p);
  });
  join_segments(p, /*reverse=*/false, stream);
}

}  // namespace oryx::cuda
