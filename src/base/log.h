// Lines for people on standard error. A line is written whole, from any thread, and never runs into a
// progress bar (base/progress.h): the bar is cleared first and drawn again below.
#pragma once

#include <fmt/format.h>

#include <mutex>
#include <string>
#include <string_view>
#include <vector>

namespace oryx {

class ProgressBar;

// Where log lines and progress bars go: one per descriptor.
class Console {
 public:
  Console(int descriptor, bool terminal);
  static Console& standard_error();

  // Writes the text and a newline.
  void line(std::string_view text);

  bool terminal() const { return terminal_; }

 private:
  friend class ProgressBar;

  void show(std::string_view bar);  // with mutex_ held: replaces the bar on screen, "" clears it
  void write(std::string_view bytes) const;
  int width() const;

  const int descriptor_;
  const bool terminal_;
  std::mutex mutex_;
  std::string shown_;               // the bar on screen
  std::vector<ProgressBar*> bars_;  // alive; the innermost, last, is the one drawn
};

template <typename... Args>
void log(fmt::format_string<Args...> format, Args&&... args) {
  Console::standard_error().line(fmt::format(format, std::forward<Args>(args)...));
}

template <typename... Args>
void log_warning(fmt::format_string<Args...> format, Args&&... args) {
  Console::standard_error().line("warning: " + fmt::format(format, std::forward<Args>(args)...));
}

}  // namespace oryx
