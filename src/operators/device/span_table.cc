#include "operators/device/span_table.h"

#include <ATen/ATen.h>

#include "base/device_copy.h"

namespace oryx::operators {

at::Tensor to_device(const std::vector<int32_t>& values, at::Device device) {
  return copy_to(at::tensor(values, at::kInt), device);
}

std::shared_ptr<const SpanTable> span_table(const at::Tensor& spans, int64_t batch, int64_t time,
                                            at::Device device) {
  static SpanCache<SpanTable> cache;
  return cache.get(spans, batch, time, device, [&] {
    SpanTable table;
    std::vector<int32_t> row_of(static_cast<size_t>(batch * time), -1), token_of;
    const auto rows = spans.accessor<int64_t, 2>();
    for (int64_t i = 0; i < rows.size(0); ++i) {
      for (int64_t t = rows[i][1]; t < rows[i][2]; ++t) {
        const auto token = static_cast<size_t>(rows[i][0] * time + t);
        if (row_of[token] >= 0) table.is_unique = false;
        row_of[token] = static_cast<int32_t>(token_of.size());
        token_of.push_back(static_cast<int32_t>(token));
      }
    }
    table.row_of = to_device(row_of, device);
    table.token_of = to_device(token_of, device);
    return table;
  });
}

}  // namespace oryx::operators
