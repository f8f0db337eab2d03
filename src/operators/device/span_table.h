// The spans of an operator call as its kernels read them: made once per spans tensor and kept for all layers.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/intrusive_ptr.h>

#include <functional>
#include <list>
#include <memory>
#include <mutex>

namespace oryx::operators {

// What `make` says of a spans tensor, remembered for the last few of them (by identity: spans are never
// written after they are made). Thread-safe.
template <typename Value>
class SpanCache {
 public:
  std::shared_ptr<const Value> get(const at::Tensor& spans, int64_t batch, int64_t time, at::Device device,
                                   const std::function<Value()>& make) {
    const std::lock_guard lock(mutex_);
    for (const Entry& entry : entries_) {
      if (entry.spans.is_same(spans) && entry.batch == batch && entry.time == time && entry.device == device)
        return entry.value;
    }
    entries_.push_front({spans, batch, time, device, std::make_shared<const Value>(make())});
    if (entries_.size() > kEntries) entries_.pop_back();
    return entries_.front().value;
  }

 private:
  static constexpr size_t kEntries = 8;
  struct Entry {
    at::Tensor spans;  // held, so that its identity stays its own
    int64_t batch, time;
    at::Device device;
    std::shared_ptr<const Value> value;
  };
  std::mutex mutex_;
  std::list<Entry> entries_;
};

// A host vector as a tensor on `device`, copied without waiting for the device.
at::Tensor to_device(const std::vector<int32_t>& values, at::Device device);

struct SpanTable {
  at::Tensor
      row_of;  // int32 [batch · time]: the packed row of token sequence · time + t, or −1 where none is
  at::Tensor token_of;    // int32 [N]: sequence · time + t of every packed row
  bool is_unique = true;  // no token has two rows; where one has, row_of names one of them
};

// `spans` as in the operators' contracts: int64 [n, 3] on the CPU, (sequence, begin, end).
std::shared_ptr<const SpanTable> span_table(const at::Tensor& spans, int64_t batch, int64_t time,
                                            at::Device device);

}  // namespace oryx::operators
