// What of a task's time is not the model's, on all cores.
#pragma once

#include <ATen/Parallel.h>

namespace oryx::evaluation {

// work(0) … work(count − 1), in any order.
template <typename Work>
void for_items(size_t count, Work work) {
  at::parallel_for(0, static_cast<int64_t>(count), /*grain_size=*/256, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) work(static_cast<size_t>(i));
  });
}

}  // namespace oryx::evaluation
