// Timing of work on the CPU or a GPU, and where a GPU's time goes.
#pragma once

#include <c10/core/Device.h>
#include <c10/core/Event.h>

#include <functional>
#include <string>
#include <vector>

namespace oryx::cli {

// Waits until everything queued on the device is done.
void synchronize(c10::Device device);

// Seconds of each of `repeats` calls after `warmup` others. On a GPU the time between two events on its
// stream: what the host does meanwhile counts only where the device waits for it.
std::vector<double> time_calls(c10::Device device, int64_t warmup, int64_t repeats,
                               const std::function<void()>& call);

double median(std::vector<double> values);

// Laps within calls that time_calls() measures, on the same time line.
class Stopwatch {
 public:
  explicit Stopwatch(c10::Device device) : device_(device) {}
  void start() { mark(); }
  void stop() { mark(); }
  // Of every lap so far, which are forgotten.
  std::vector<double> take();

 private:
  void mark();

  c10::Device device_;
  std::vector<double> times_;       // on a CPU
  std::vector<c10::Event> events_;  // on a GPU
};

// The most memory held so far, in bytes: of the process for a CPU, of tensors for a GPU (since
// reset_peak_memory).
int64_t peak_memory(c10::Device device);
void reset_peak_memory(c10::Device device);

struct KernelTime {
  std::string name;
  double seconds = 0;
  int64_t calls = 0;
};

// GPU time of every kernel and copy that `work` queues, longest first.
std::vector<KernelTime> profile_kernels(c10::Device device, const std::function<void()>& work);

}  // namespace oryx::cli
