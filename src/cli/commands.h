// The subcommands of the `oryx` binary: one small file each, wiring options to the rooms below.
#pragma once

#include <CLI/CLI.hpp>

namespace oryx::cli {

// Each adds its subcommand; the work runs in the subcommand's callback, and throws Error on failure.
void add_prepare(CLI::App& app);
void add_train(CLI::App& app);
void add_inspect(CLI::App& app);
void add_generate(CLI::App& app);
void add_logits(CLI::App& app);
void add_evaluate(CLI::App& app);
void add_curve(CLI::App& app);
void add_report(CLI::App& app);
void add_benchmark(CLI::App& app);

}  // namespace oryx::cli
