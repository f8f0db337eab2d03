#include "cli/measure.h"

#include <ATen/DeviceAccelerator.h>
#include <sys/resource.h>
#include <torch/csrc/autograd/profiler_kineto.h>

#include <algorithm>
#include <chrono>
#include <map>

namespace oryx::cli {

namespace {

double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

}  // namespace

void synchronize(c10::Device device) {
  if (!device.is_cpu()) at::accelerator::synchronizeDevice(device.index());
}

std::vector<double> time_calls(c10::Device device, int64_t warmup, int64_t repeats,
                               const std::function<void()>& call) {
  for (int64_t i = 0; i < warmup; ++i) call();
  std::vector<double> seconds;
  if (device.is_cpu()) {
    for (int64_t i = 0; i < repeats; ++i) {
      const double start = now();
      call();
      seconds.push_back(now() - start);
    }
    return seconds;
  }
  const c10::Stream stream = at::accelerator::getCurrentStream(device.index());
  std::vector<c10::Event> marks;
  for (int64_t i = 0; i <= repeats; ++i) marks.emplace_back(device.type(), c10::EventFlag::BACKEND_DEFAULT);
  synchronize(device);
  marks[0].record(stream);
  for (int64_t i = 0; i < repeats; ++i) {
    call();
    marks[i + 1].record(stream);
  }
  synchronize(device);
  for (int64_t i = 0; i < repeats; ++i) seconds.push_back(1e-3 * marks[i].elapsedTime(marks[i + 1]));
  return seconds;
}

double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

void Stopwatch::mark() {
  if (device_.is_cpu()) return times_.push_back(now());
  events_.emplace_back(device_.type(), c10::EventFlag::BACKEND_DEFAULT);
  events_.back().record(at::accelerator::getCurrentStream(device_.index()));
}

std::vector<double> Stopwatch::take() {
  synchronize(device_);
  std::vector<double> laps;
  for (size_t i = 0; i + 1 < times_.size(); i += 2) laps.push_back(times_[i + 1] - times_[i]);
  for (size_t i = 0; i + 1 < events_.size(); i += 2) {
    laps.push_back(1e-3 * events_[i].elapsedTime(events_[i + 1]));
  }
  times_.clear();
  events_.clear();
  return laps;
}

int64_t peak_memory(c10::Device device) {
  if (!device.is_cpu()) {
    return at::accelerator::getDeviceStats(device.index()).allocated_bytes[0].peak;
  }
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  return usage.ru_maxrss * 1024;
}

void reset_peak_memory(c10::Device device) {
  if (!device.is_cpu()) at::accelerator::resetPeakStats(device.index());
}

std::vector<KernelTime> profile_kernels(c10::Device device, const std::function<void()>& work) {
  using torch::profiler::impl::ActivityType;
  const torch::profiler::impl::ProfilerConfig config(torch::profiler::impl::ProfilerState::KINETO);
  const std::set<ActivityType> activities = {ActivityType::CUDA};
  synchronize(device);
  torch::autograd::profiler::prepareProfiler(config, activities);
  torch::autograd::profiler::enableProfiler(config, activities);
  work();
  synchronize(device);
  const auto result = torch::autograd::profiler::disableProfiler();
  std::map<std::string, KernelTime> by_name;
  for (const auto& event : result->events()) {
    if (event.deviceType() != device.type()) continue;
    KernelTime& kernel = by_name[event.name()];
    kernel.name = event.name();
    kernel.seconds += 1e-9 * static_cast<double>(event.durationNs());
    ++kernel.calls;
  }
  std::vector<KernelTime> kernels;
  for (auto& [name, kernel] : by_name) kernels.push_back(kernel);
  std::sort(kernels.begin(), kernels.end(),
            [](const auto& a, const auto& b) { return a.seconds > b.seconds; });
  return kernels;
}

}  // namespace oryx::cli
