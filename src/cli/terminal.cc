#include "cli/terminal.h"

#include <fmt/format.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include <cstdlib>
#include <string_view>

namespace oryx::cli {

bool use_colour(const std::string& choice) {
  if (choice != "auto") return choice == "always";
  const char* no_color = std::getenv("NO_COLOR");
  const char* terminal = std::getenv("TERM");
  if (no_color != nullptr && *no_color != '\0') return false;
  if (terminal == nullptr || std::string_view(terminal) == "dumb") return false;
  return isatty(STDOUT_FILENO) == 1;
}

int terminal_columns() {
  winsize size{};
  if (ioctl(STDOUT_FILENO, TIOCGWINSZ, &size) == 0 && size.ws_col > 0) return size.ws_col;
  return 100;
}

std::string colour_of(schedule::Mode mode) {
  return mode == schedule::Mode::attention ? "\x1b[1;38;5;32m" : "\x1b[38;5;166m";
}

std::string colour_end() { return "\x1b[0m"; }

std::string colour_legend() {
  using schedule::Mode;
  return fmt::format("{}attention{} {}linear{}", colour_of(Mode::attention), colour_end(),
                     colour_of(Mode::linear), colour_end());
}

}  // namespace oryx::cli
