// The processes that train one model together: sums and copies of tensors between them, over NCCL on GPUs and
// Gloo on CPUs. Every rank makes the same calls in the same order.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Device.h>

#include <chrono>
#include <cstdint>
#include <memory>
#include <string>

#include "training/launch.h"
#include "training/rank_board.h"

namespace oryx::training {

class ProcessGroup;

// One exchange under way. Its tensors belong to it until wait().
class Exchange {
 public:
  Exchange() = default;

  // What this thread does next with the tensors sees the result: on a GPU the stream waits, not the host.
  // Throws Error naming the rank to blame when there will be none.
  void wait();
  // The same, and the host waits too.
  void finish();

 private:
  friend class ProcessGroup;
  struct Work;
  explicit Exchange(std::shared_ptr<Work> work) : work_(std::move(work)) {}
  std::shared_ptr<Work> work_;
};

class ProcessGroup {
 public:
  // Reaches the store where the ranks meet. Throws Error when it does not answer within `timeout`.
  explicit ProcessGroup(const Launch& launch, std::chrono::seconds timeout = std::chrono::seconds(600));
  ~ProcessGroup();
  ProcessGroup(const ProcessGroup&) = delete;
  ProcessGroup& operator=(const ProcessGroup&) = delete;

  int64_t rank() const;
  int64_t size() const;
  // Rank 0 reads and writes the run directory, and speaks.
  bool leads() const { return rank() == 0; }

  c10::Device device() const;

  // Waits for all ranks and connects them. From here on an exchange that takes longer than `timeout` fails.
  void start(c10::Device device, std::chrono::seconds timeout);

  // Rank 0's text. Every key once.
  std::string share(const std::string& key, const std::string& text);

  // Contiguous tensors on the device of start(). Sums are taken in the tensor's own type, in an order that
  // depends on the number of ranks and the size alone.
  Exchange all_reduce(const at::Tensor& tensor);                             // in place
  Exchange reduce_scatter(const at::Tensor& whole, const at::Tensor& part);  // part r of the sum to rank r
  Exchange all_gather(const at::Tensor& part, const at::Tensor& whole);      // the parts in rank order
  Exchange broadcast(const at::Tensor& tensor, int64_t from = 0);

  // Tells the others that this rank ends with this message, so that they end with one that names it.
  void report(const std::string& message) noexcept;

  // The orderly end: waits for all ranks. Throws Error when one of them failed meanwhile.
  void leave();

 private:
  friend class Exchange;
  class Store;
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace oryx::training
