// How the kernels of gated_norm share out work: items (one group of channels of one row) go to teams of
// threads, each thread of which holds the same `vectors` vectors of every item, so that a weight's gradient
// gathers in registers.
#pragma once

#include <algorithm>

#include "operators/device/pointwise.h"
#include "operators/gated_norm/gated_norm_kernels.h"

namespace oryx::cuda {

using namespace device;

inline constexpr int norm_threads = 256;

constexpr bool has_gate(Norm mode) { return mode == Norm::gate_norm || mode == Norm::norm_gate; }

// A team of `size` threads and `vectors` vectors a thread; vectors 0: the tensors take the general kernels.
struct NormLayout {
  int size, vectors;
};

inline int64_t norm_items(const NormTensors& t) { return t.rows * (t.channels / t.group); }

// float64 takes the general kernels: it serves tests. float32 has one width, to keep the binary small. Items
// are counted in 32 bits (with room for one round past the end) outside the general kernels.
inline NormLayout norm_layout(const NormTensors& t) {
  if (!t.aligned || t.element == Element::float64 || norm_items(t) > (1 << 30)) return {norm_threads, 0};
  const int64_t needed = t.group * bytes_of(t.element) / 16;
  NormLayout best{norm_threads, 0};
  int64_t best_slots = 0;
  // Two vectors a thread keep enough loads under way with few registers; more where that leaves fewer lanes
  // idle.
  for (const int vectors : {2, 1, 3, 4}) {
    if (t.element == Element::float32 && vectors != 4) continue;
    int size = 1;
    while (size < norm_threads && size * vectors < needed) size *= 2;
    const int64_t slots = int64_t{size} * vectors;
    if (slots < needed || (best.vectors != 0 && slots >= best_slots)) continue;
    best = {size, vectors};
    best_slots = slots;
  }
  return best;
}

// Blocks of norm_threads that a multiprocessor holds: what __launch_bounds__ promises.
constexpr int norm_blocks(int vectors) { return vectors == 1 ? 4 : vectors == 2 ? 3 : 2; }

inline int64_t norm_grid(const NormTensors& t, NormLayout layout, int multiprocessors) {
  if (layout.vectors == 0) return std::min<int64_t>(norm_items(t), int64_t{4} * multiprocessors);
  const int64_t teams = norm_threads / layout.size;
  return std::min<int64_t>((norm_items(t) + teams - 1) / teams,
                           int64_t{norm_blocks(layout.vectors)} * multiprocessors);
}

struct NormArguments : NormTensors {
  int team;
  int64_t groups;  // of a row
  double share;    // 1 / group

  NormArguments(const NormTensors& tensors, NormLayout layout)
      : NormTensors(tensors),
        team(layout.size),
        groups(tensors.channels / tensors.group),
        share(1.0 / static_cast<double>(tensors.group)) {}
};

// Addresses of item `item`; Index is int where that is known to hold it, for a cheap division.
struct NormItem {
  int64_t x, gate, update, dense;  // offsets in elements

  template <typename Index>
  __device__ NormItem(const NormArguments& p, Index item) {
    const Index groups = static_cast<Index>(p.groups);
    const int64_t row = groups == 1 ? item : item / groups;
    const int64_t column = groups == 1 ? 0 : item % groups * p.group;
    x = row * p.x_stride + column;
    gate = row * p.gate_stride + column;
    update = row * p.update_stride + column;
    dense = row * p.channels + column;
  }
};

// Calls launcher.operator()<T, mode, vectors>() for the kernel that serves the tensors.
template <typename Launcher>
void with_norm_kernel(const NormTensors& t, int vectors, Launcher launcher) {
  const auto with_mode = [&]<typename T, int n>() {
    switch (t.mode) {
      case Norm::norm:
        return launcher.template operator()<T, Norm::norm, n>();
      case Norm::add:
        return launcher.template operator()<T, Norm::add, n>();
      case Norm::gate_norm:
        return launcher.template operator()<T, Norm::gate_norm, n>();
      case Norm::norm_gate:
        return launcher.template operator()<T, Norm::norm_gate, n>();
      case Norm::product:
        return;
    }
  };
  if (vectors == 0) {
    with_element(t.element, [&]<typename T>() { with_mode.template operator()<T, 0>(); });
  } else if (t.element == Element::float32) {
    with_mode.template operator()<float, 4>();
  } else if (vectors == 1) {
    with_mode.template operator()<bf16, 1>();
  } else if (vectors == 2) {
    with_mode.template operator()<bf16, 2>();
  } else if (vectors == 3) {
    with_mode.template operator()<bf16, 3>();
  } else {
    with_mode.template operator()<bf16, 4>();
  }
}

}  // namespace oryx::cuda
