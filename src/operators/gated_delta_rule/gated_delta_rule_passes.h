// What the serial passes share. A block of threads walks over the chunks of a segment with `width` columns of
// the state; a warpgroup has 64 of them, transposed, in registers, where they are, rounded, an operand of
// products as they lie: warps meet only once a chunk, for the loads, which four more warps issue ahead.
#pragma once

#include "operators/device/warpgroup.h"
#include "operators/gated_delta_rule/gated_delta_rule_device.h"

namespace oryx::cuda {

constexpr int kLoaders = 128;

template <int key_dim, int width, bool has_query>
struct PassMemory {
  static constexpr int walkers = 2 * width, threads = walkers + kLoaders;
  using Rows = Panels<kChunk, key_dim>;
  using Slice = Panels<kChunk, width>;
  using Square = Panels<kChunk, kChunk>;
  struct Stage {
    Rows key, query;
    Slice slice;     // of the values or dO
    Square inverse;  // C
    float* gates;
  };
  static constexpr size_t stage_bytes =
      (has_query ? 2 : 1) * Rows::bytes + Slice::bytes + Square::bytes;  // a multiple of 1024
  static constexpr int stages = has_query ? 3 : 4;
  static constexpr size_t scores_at = stages * stage_bytes,
                          gates_at = scores_at + (has_query ? 2 * Square::bytes : 0);
  static constexpr size_t gate_bytes = kGates * sizeof(float);
  static constexpr size_t rows_at = gates_at + stages * gate_bytes;
  static constexpr size_t row_bytes = gated_delta_row_table * sizeof(int32_t);
  static constexpr size_t bytes = rows_at + 2 * stages * row_bytes;

  char* shared;
  __device__ Stage stage(int step) const {
    bf16* at = reinterpret_cast<bf16*>(shared + step % stages * stage_bytes);
    const auto take = [&](size_t size) {
      bf16* taken = at;
      at += size / sizeof(bf16);
      return taken;
    };
    Stage s;
    s.key.base = take(Rows::bytes);
    s.query.base = take(has_query ? Rows::bytes : 0);
    s.slice.base = take(Slice::bytes);
    s.inverse.base = take(Square::bytes);
    s.gates = reinterpret_cast<float*>(shared + gates_at + step % stages * gate_bytes);
    return s;
  }
  // scale · P of a step, made while the step before it is worked on.
  __device__ Square scores(int step) const {
    return {reinterpret_cast<bf16*>(shared + scores_at + step % 2 * Square::bytes)};
  }
  // The table of rows, which is there when the loads of its step are issued and still when the step runs.
  __device__ int32_t* rows(int step) const {
    return reinterpret_cast<int32_t*>(shared + rows_at + step % (2 * stages) * row_bytes);
  }
};

// What a block walks over: a segment of a stream with the columns part · width … of the state.
struct Segment {
  int64_t stream;
  int part, index, first, chunks;  // the first of its chunks, and how many

  __device__ Segment(const GatedDeltaArguments& p, int of_grid, int parts)
      : stream(of_grid / parts / p.segments), part(of_grid % parts), index(of_grid / parts % p.segments) {
    first = index * p.segment_chunks;
    const int left = p.chunks - first;
    chunks = left < p.segment_chunks ? left : p.segment_chunks;
  }
  // Its [key_dim, value_dim] of tensors like segment_states.
  __device__ int64_t state_at(const GatedDeltaArguments& p) const {
    return (stream * p.segments + index) * p.key_dim * p.value_dim;
  }
  // The stream's in tensors like initial_state.
  __device__ int64_t stream_at(const GatedDeltaArguments& p) const {
    return stream * p.key_dim * p.value_dim;
  }
  // S before the segment, or null for zeros.
  __device__ const float* start(const GatedDeltaArguments& p) const {
    if (p.segments > 1) return p.segment_states + state_at(p);
    if (p.initial_state == nullptr) return nullptr;
    if (p.initial_rows == nullptr) return p.initial_state + stream_at(p);
    const int64_t from = p.initial_rows[stream / p.state_heads] * p.state_heads + stream % p.state_heads;
    return p.initial_state + from * p.key_dim * p.value_dim;
  }
  // dS after it, or null for zeros.
  __device__ const float* d_end(const GatedDeltaArguments& p) const {
    if (p.segments > 1) return p.d_segment_states + state_at(p);
    return p.d_final_state == nullptr ? nullptr : p.d_final_state + stream_at(p);
  }
};

// What a warp holds of the state: 16 columns from column0() on, as rows, by key_dim.
template <int key_dim>
struct StateRows {
  using Operand = uint32_t[key_dim / 16][4];  // the rows rounded
  Accumulator<1, key_dim / 8> values;

  __device__ static int column0() { return static_cast<int>(threadIdx.x) / 32 * 16; }

  // From columns first_column … of [key_dim, value_dim] in float32; null stands for zeros.
  __device__ void read(const float* from, int first_column, int pitch) {
    values.for_pairs([&](int row, int column, float& first, float& second) {
      const float* at = from + (column * pitch + first_column + column0() + row);
      first = from == nullptr ? 0.0f : at[0], second = from == nullptr ? 0.0f : at[pitch];
    });
  }
  // To them, `to` being the place of the first.
  __device__ void write(float* to, int pitch) {
    values.for_pairs([&](int row, int column, float& first, float& second) {
      float* at = to + (column * pitch + column0() + row);
      at[0] = first, at[pitch] = second;
    });
  }
  __device__ void scale(float factor) {
    values.for_pairs([&](int, int, float& first, float& second) { first *= factor, second *= factor; });
  }
  // Writes the rows, rounded, from `to` on.
  __device__ static void write_rounded(const Operand& rounded, bf16* to) {
    const int row = static_cast<int>(threadIdx.x) % 32 / 4, column = pair_column();
#pragma unroll
    for (int below = 0; below < 2; ++below)
#pragma unroll
      for (int k = 0; k < key_dim / 16; ++k) {
        *reinterpret_cast<uint2*>(to + (row + 8 * below) * key_dim + 16 * k + column) =
            pair_up(rounded[k][below], rounded[k][2 + below]);
      }
  }
};

// Begins a group of products; finish_products() waits for all groups but the latest few and gives the sum of
// one.
template <typename Products>
__device__ inline void begin_products(Products products) {
  warpgroup_fence();
  products();
  warpgroup_commit();
}
template <int pending, int column_tiles>
__device__ inline void finish_products(Accumulator<1, column_tiles>& sum) {
  warpgroup_wait<pending>();
  settle(sum);
}

// A warpgroup's registers a thread from here on, where the target has the instruction: of 168 a thread at
// first, loaders hand to walkers what they do not need.
template <int registers, bool more>
__device__ inline void change_registers() {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  if constexpr (more) {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(registers));
  } else {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(registers));
  }
#endif
}

constexpr int kLoadersMeet = 1;  // their barrier; that of a step is the block's

// The part of the loaders in a walk over `steps` steps: load(step) copies what a step needs, load_table(step)
// the table of rows that load(step) reads, and make(step) makes of the copies what else the step needs.
// Publishing what has come may wait for copies that have just been issued. With four stages they are issued
// after it, while the step before is still being read, to the place of the one before that.
//
// All threads of the block come to a barrier B(s) at every step s: loaders after make(s), walkers before they
// read what it made. So all that is read in step s was written before B(s), and walkers are done with it when
// they come to B(s + 1). Its place is next written, for step s + stages, by copies issued after B(s + 1); the
// scores' place, of two, for step s + 2, by make() after B(s + 1).
template <typename Memory, typename LoadTable, typename Load, typename Make>
__device__ inline void load_steps(int steps, LoadTable load_table, Load load, Make make) {
  constexpr bool is_early = Memory::stages > 3;
  constexpr int ahead = Memory::stages - (is_early ? 2 : 1);
  const auto load_ahead = [&](int step) {
    if (step < steps) load(step);
    if (step + ahead < steps) load_table(step + ahead);
    commit_copies();
  };
  for (int step = 0; step < ahead && step < steps; ++step) load_table(step);
  commit_copies();
  wait_copies<0>();
  named_barrier(kLoadersMeet, kLoaders);
#pragma unroll 1
  for (int step = -ahead; step < steps; ++step) {
    if (step >= 0) {
      wait_copies<ahead - 1>();
      publish_to_products();
      named_barrier(kLoadersMeet, kLoaders);
    }
    if (is_early) load_ahead(step + ahead);
    if (step >= 0) {
      make(step);
      __syncthreads();
    }
    if (!is_early) load_ahead(step + ahead);
  }
  wait_copies<0>();
}

// Whether the thread is one of the loaders.
template <typename Memory>
__device__ inline bool is_loader() {
  return warpgroup() == Memory::walkers / 128;
}

// A flag that all threads read alike, in a form that the compiler knows to be the same for a warp: products
// in branches that might part lanes wait for each other.
__device__ inline bool same_in_warp(bool flag) {
  return __shfl_sync(0xffffffffu, static_cast<int>(flag), 0) != 0;
}

// The part of the other warps.
template <typename Memory, typename Walk>
__device__ inline void walk_steps(int steps, Walk walk) {
  for (int step = 0; step < steps; ++step) {
    __syncthreads();  // the step's stage is there, and the one to be loaded has been read
    walk(step);
  }
}
template <typename Memory>
__device__ inline void begin_walk() {
  if constexpr (Memory::walkers == 256) change_registers<216, true>();
}
template <typename Memory>
__device__ inline void begin_loads() {
  if constexpr (Memory::walkers == 256) change_registers<72, false>();
}

// All columns in a block, unless that leaves multiprocessors idle: each of two parts reads all of K and E.
// For `walks` blocks of threads if there were one part.
inline int width_of_parts(const GatedDeltaArguments& p, int64_t walks) {
  return p.value_dim == 128 && walks > p.multiprocessors / 2 ? 128 : 64;
}

// Makes of what the segments of a stream leave for each other the states between them, in reverse their
// gradients.
void join_segments(const GatedDeltaArguments& p, bool reverse, void* stream);

// For `passes` passes side by side, calls function.template operator()<key_dim, width>().
template <typename Function>
void with_width(const GatedDeltaArguments& p, int passes, Function function) {
  const int width = width_of_parts(p, static_cast<int64_t>(p.batch) * p.state_heads * p.segments * passes);
  const auto with_key_dim = [&]<int key_dim>() {
    width == 128 ? function.template operator()<key_dim, 128>() : function.template operator()<key_dim, 64>();
  };
  p.key_dim == 128 ? with_key_dim.template operator()<128>() : with_key_dim.template operator()<64>();
}

}  // namespace oryx::cuda
