#include <algorithm>
#include <csignal>
#include <cstdio>
#include <exception>
#include <new>
#include <string>
#include <vector>

#include "base/error.h"
#include "base/memory.h"
#include "base/nearest_name.h"
#include "cli/commands.h"
#include "cli/options.h"

// LibTorch's BLAS takes a slow path on processors whose vendor string it does not know, though they have the
// instructions of its fast one. It asks this function, which the executable's own definition overrides.
extern "C" int mkl_serv_intel_cpu_true() { return 1; }

namespace oryx::cli {

namespace {

std::vector<std::string> command_names(const CLI::App& app) {
  std::vector<std::string> names;
  for (const CLI::App* command : app.get_subcommands([](const CLI::App*) { return true; })) {
    names.push_back(command->get_name());
  }
  return names;
}

int report_unknown_command(const std::string& name, const std::vector<std::string>& names) {
  std::fprintf(stderr, "oryx: unknown command '%s', did you mean '%s'?\n", name.c_str(),
               nearest_name(name, names).c_str());
  return 2;
}

int run(int argc, char** argv) {
  CLI::App app{"Language models that switch between attention and a linear recurrence at any token"};
  app.require_subcommand(1);
  app.set_version_flag("--version", ORYX_VERSION);
  add_prepare(app);
  add_train(app);
  add_inspect(app);
  add_generate(app);
  add_logits(app);
  add_evaluate(app);
  add_curve(app);
  add_report(app);
  add_benchmark(app);
  const std::vector<std::string> names = command_names(app);
  if (argc > 1 && argv[1][0] != '-' && std::find(names.begin(), names.end(), argv[1]) == names.end()) {
    return report_unknown_command(argv[1], names);
  }
  try {
    app.parse(argc, argv);
  } catch (const CLI::Success& help) {
    return app.exit(help);
  } catch (const CLI::ParseError& error) {
    std::fprintf(stderr, "oryx: %s\n", error.what());
    return 2;
  }
  return 0;
}

}  // namespace

}  // namespace oryx::cli

int main(int argc, char** argv) {
  oryx::tune_allocator();
  std::signal(SIGXFSZ, SIG_IGN);  // a file size limit is then an error of write(), like a full disk
  try {
    return oryx::cli::run(argc, argv);
  } catch (const oryx::cli::Interrupted&) {
    return 130;
  } catch (const oryx::UsageError& error) {
    std::fprintf(stderr, "oryx: %s\n", error.what());
    return 2;
  } catch (const std::bad_alloc&) {
    std::fprintf(stderr, "oryx: out of memory\n");
    return 1;
  } catch (const std::exception& error) {
    // LibTorch appends a backtrace to its messages: the first line says what is wrong.
    const std::string text = error.what();
    std::fprintf(stderr, "oryx: %s\n", text.substr(0, text.find('\n')).c_str());
    return 1;
  }
}
