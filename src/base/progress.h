// A progress bar with rate and time left, on standard error: silent when that is no terminal, and for work
// that ends within two seconds.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <string>

#include "base/log.h"

namespace oryx {

struct ProgressOptions {
  std::string unit = "";                  // of the counts, such as "tok"
  int64_t start = 0;                      // done before: shown, but not counted in the rate
  std::chrono::milliseconds delay{2000};  // before the bar first shows
};

// Shows while it lives and clears its line at the end. advance(), set() and note() may be called from any
// thread. Of nested bars the innermost is shown.
class ProgressBar {
 public:
  // total 0: unknown, shows count and rate only.
  ProgressBar(int64_t total, std::string label, ProgressOptions options = {},
              Console& console = Console::standard_error());
  ~ProgressBar();
  ProgressBar(const ProgressBar&) = delete;
  ProgressBar& operator=(const ProgressBar&) = delete;

  void advance(int64_t amount = 1);
  void set(int64_t done);
  void note(std::string text);  // shown after the numbers: "loss 3.21"

 private:
  using Clock = std::chrono::steady_clock;

  void draw_if_due();
  void draw();

  const int64_t total_;
  const std::string label_;
  const ProgressOptions options_;
  Console& console_;
  const Clock::time_point begin_;
  std::atomic<int64_t> done_;
  std::atomic<Clock::time_point> next_draw_;
  std::string note_;  // guarded by the console's mutex
};

struct Progress {
  std::string label, unit, note;
  int64_t start = 0, done = 0, total = 0;
  double seconds = 0;
};

// The bar as text, no wider than `width` columns.
std::string progress_text(const Progress& progress, int width);

}  // namespace oryx
