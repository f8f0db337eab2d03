// Options that several subcommands share, and how a command ends early.
#pragma once

#include <c10/core/Device.h>
#include <c10/core/ScalarType.h>

#include <CLI/CLI.hpp>
#include <atomic>
#include <string>

namespace oryx::cli {

struct ComputeOptions {
  std::string device = "auto";
  std::string dtype = "float32";

  // Adds --device and --dtype.
  void add_to(CLI::App& command);
  // cpu, cuda, or auto: cuda where there is one. Throws Error when cuda is asked for and absent.
  c10::Device resolve_device() const;
  // Throws UsageError on an unknown name, and on float64 with a device that is not the CPU.
  c10::ScalarType resolve_dtype() const;
};

// Thrown by a command that stopped because of Ctrl-C after saving what it could: exit code 130.
struct Interrupted {};

// Set by SIGINT and SIGTERM once watch_for_interrupt has been called; a second signal ends the process at
// once.
const std::atomic<bool>& interrupted();
void watch_for_interrupt();

// Throws Error unless the folder that is to hold `file` exists.
void expect_parent_directory(const std::string& file);

}  // namespace oryx::cli
