#include <ATen/ATen.h>

#include "operators/attention/attention.h"

namespace oryx::operators {

at::Tensor attention_reference(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                               const at::Tensor& spans, double scale) {
  const int64_t group = query.size(1) / key.size(2);
  const auto accumulate = query.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const auto rows = spans.accessor<int64_t, 2>();
  std::vector<at::Tensor> outputs;
  int64_t row = 0;
  for (int64_t i = 0; i < rows.size(0); ++i) {
    const int64_t sequence = rows[i][0], begin = rows[i][1], end = rows[i][2];
    // [heads, rows or keys, dim]
    const auto q = query.slice(0, row, row + end - begin).to(accumulate).transpose(0, 1);
    const auto k = key[sequence].slice(0, 0, end).to(accumulate).transpose(0, 1).repeat_interleave(group, 0);
    const auto v =
        value[sequence].slice(0, 0, end).to(accumulate).transpose(0, 1).repeat_interleave(group, 0);
    const auto later = at::ones({end - begin, end}, q.options().dtype(at::kBool)).triu(begin + 1);
    const auto scores = (scale * at::matmul(q, k.transpose(1, 2))).masked_fill(later, -INFINITY);
    outputs.push_back(at::matmul(scores.softmax(-1), v).transpose(0, 1));
    row += end - begin;
  }
  if (outputs.empty())
    return (query.sum() + key.sum() + value.sum()) *
           at::zeros({0, query.size(1), value.size(3)}, query.options());
  return at::cat(outputs).to(query.scalar_type());
}

}  // namespace oryx::operators
