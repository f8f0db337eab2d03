// oryx report: one page of plots and tables over runs, models, evaluations, switch curves and samples.
#include <fmt/ranges.h>

#include <ctime>
#include <filesystem>
#include <memory>

#include "base/error.h"
#include "base/log.h"
#include "cli/commands.h"
#include "cli/options.h"
#include "evaluation/report/report.h"
#include "formats/file.h"

namespace oryx::cli {

namespace {

struct Options {
  std::vector<std::string> sources;
  std::string output, title = "Oryx report";
};

std::string now() {
  const std::time_t seconds = std::time(nullptr);
  char text[32];
  const size_t size = std::strftime(text, sizeof(text), "%Y-%m-%d at %H:%M UTC", std::gmtime(&seconds));
  return {text, size};
}

void report(const Options& options) {
  // Before anything is read: sources may be many.
  expect_parent_directory(options.output);
  expect(!std::filesystem::is_directory(options.output), "cannot write {}: it is a directory",
         options.output);
  const evaluation::Sources sources = evaluation::read_sources(options.sources);
  const std::string page = evaluation::report_html(
      sources, {.title = options.title,
                .made = fmt::format("Made on {} by oryx {}", now(), ORYX_VERSION),
                .command = fmt::format("oryx report {} --output {}", fmt::join(options.sources, " "),
                                       options.output)});
  formats::write_file_atomic(options.output, page);
  log("wrote {} ({:.1f} KiB)", options.output, static_cast<double>(page.size()) / 1024);
}

}  // namespace

void add_report(CLI::App& app) {
  CLI::App* command =
      app.add_subcommand("report", "One HTML page over runs, evaluations, curves and samples");
  const auto options = std::make_shared<Options>();
  command
      ->add_option(
          "sources", options->sources,
          "PATH or LABEL=PATH: directories of training runs, models, evaluations (oryx evaluate) and switch "
          "curves (oryx curve), and files of samples (oryx generate --json)")
      ->required();
  command->add_option("--output", options->output, "the page, an .html file that opens offline")->required();
  command->add_option("--title", options->title, "of the page")->capture_default_str();
  command->callback([options] { report(*options); });
}

}  // namespace oryx::cli
