#include "cli/options.h"

#include <ATen/Context.h>

#include <csignal>
#include <cstdlib>
#include <filesystem>

#include "base/error.h"

namespace oryx::cli {

namespace {
std::atomic<bool> interrupt_flag{false};

void on_signal(int) {
  if (interrupt_flag.exchange(true)) std::_Exit(130);
}
}  // namespace

void ComputeOptions::add_to(CLI::App& command) {
  command.add_option("--device", device, "cpu, cuda or auto")->capture_default_str();
  command.add_option("--dtype", dtype, "float32, bfloat16, or float64 on the CPU")->capture_default_str();
}

c10::Device ComputeOptions::resolve_device() const {
  if (device == "cpu") return c10::Device(c10::kCPU);
  if (device != "auto" && device != "cuda") {
    fail_usage("unknown device '{}': expected cpu, cuda or auto", device);
  }
  if (at::hasCUDA()) return c10::Device(c10::kCUDA, 0);
  expect(device == "auto", "device cuda was asked for, but no CUDA device is usable here");
  return c10::Device(c10::kCPU);
}

c10::ScalarType ComputeOptions::resolve_dtype() const {
  if (dtype == "float32") return c10::kFloat;
  if (dtype == "bfloat16") return c10::kBFloat16;
  if (dtype != "float64") fail_usage("unknown dtype '{}': expected float32, bfloat16 or float64", dtype);
  if (!resolve_device().is_cpu()) fail_usage("dtype float64 is for the CPU: pass --device cpu");
  return c10::kDouble;
}

const std::atomic<bool>& interrupted() { return interrupt_flag; }

void watch_for_interrupt() {
  std::signal(SIGINT, on_signal);
  std::signal(SIGTERM, on_signal);
}

void expect_parent_directory(const std::string& file) {
  const std::filesystem::path parent = std::filesystem::absolute(file).parent_path();
  expect(std::filesystem::is_directory(parent), "cannot write {}: {} is not a directory", file,
         parent.string());
}

}  // namespace oryx::cli
