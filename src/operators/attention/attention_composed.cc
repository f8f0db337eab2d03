#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "operators/attention/attention_cuda.h"
#include "operators/device/span_table.h"

namespace oryx::operators {

namespace {

constexpr int64_t kMostScores = int64_t{1} << 27;  // of one product

}  // namespace

at::Tensor attention_composed(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                              const at::Tensor& spans, double scale) {
  const int64_t heads = query.size(1), key_heads = key.size(2), group = heads / key_heads;
  const auto accumulate = query.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  std::vector<std::vector<int32_t>> rows(key.size(0)), positions(key.size(0));
  const auto span = spans.accessor<int64_t, 2>();
  int32_t next = 0;
  for (int64_t i = 0; i < span.size(0); ++i) {
    for (int64_t t = span[i][1]; t < span[i][2]; ++t) {
      rows[span[i][0]].push_back(next++);
      positions[span[i][0]].push_back(static_cast<int32_t>(t));
    }
  }
  if (next == 0) {
    return (query.sum() + key.sum() + value.sum()) * at::zeros({0, heads, value.size(3)}, query.options());
  }
  std::vector<at::Tensor> outputs;
  std::vector<int32_t> place(next);  // of a row among the outputs
  int32_t done = 0;
  for (int64_t sequence = 0; sequence < key.size(0); ++sequence) {
    if (rows[sequence].empty()) continue;
    const int64_t keys = *std::max_element(positions[sequence].begin(), positions[sequence].end()) + 1;
    const auto heads_first = [&](const at::Tensor& x) {
      return x[sequence].slice(0, 0, keys).to(accumulate).transpose(0, 1);
    };
    const at::Tensor k = heads_first(key), v = heads_first(value);
    const at::Tensor key_positions = at::arange(keys, query.options().dtype(at::kInt));
    const int64_t count = rows[sequence].size(), step = std::max<int64_t>(1, kMostScores / (heads * keys));
    for (int64_t first = 0; first < count; first += step) {
      const int64_t part = std::min(step, count - first);
      const auto slice = [&](const std::vector<int32_t>& x) {
        return to_device({x.begin() + first, x.begin() + first + part}, query.device());
      };
      // [key heads, group · rows, ·]: the heads of a group read the same keys.
      const at::Tensor q = query.index_select(0, slice(rows[sequence]))
                               .to(accumulate)
                               .view({part, key_heads, group, query.size(2)})
                               .permute({1, 2, 0, 3})
                               .reshape({key_heads, group * part, query.size(2)});
      const at::Tensor later = key_positions.unsqueeze(0) > slice(positions[sequence]).unsqueeze(1);
      const at::Tensor scores = (scale * at::matmul(q, k.transpose(1, 2)))
                                    .view({key_heads, group, part, keys})
                                    .masked_fill(later, -INFINITY)
                                    .softmax(-1)
                                    .view({key_heads, group * part, keys});
      outputs.push_back(at::matmul(scores, v)
                            .view({key_heads, group, part, value.size(3)})
                            .permute({2, 0, 1, 3})
                            .reshape({part, heads, value.size(3)})
                            .to(query.scalar_type()));
      for (int64_t i = 0; i < part; ++i) place[rows[sequence][first + i]] = done++;
    }
  }
  const at::Tensor all = at::cat(outputs);
  return std::is_sorted(place.begin(), place.end()) ? all
                                                    : all.index_select(0, to_device(place, query.device()));
}

}  // namespace oryx::operators
