#include "base/progress.h"

#include <algorithm>
#include <cmath>

namespace oryx {
namespace {

// 950, 12.3k, 4.56M: three digits.
std::string short_number(double number) {
  static constexpr const char* kSuffixes[] = {"", "k", "M", "G", "T"};
  size_t suffix = 0;
  while (std::abs(number) >= 999.5 && suffix + 1 < std::size(kSuffixes)) {
    number /= 1000;
    ++suffix;
  }
  const bool whole = suffix == 0 && number == std::floor(number);
  const int decimals = whole || std::abs(number) >= 99.95 ? 0 : std::abs(number) >= 9.995 ? 1 : 2;
  return fmt::format("{:.{}f}{}", number, decimals, kSuffixes[suffix]);
}

std::string duration_text(double seconds) {
  const auto total = static_cast<int64_t>(std::ceil(std::min(seconds, 359999.0)));
  if (total >= 3600) return fmt::format("{}:{:02}:{:02}", total / 3600, total / 60 % 60, total % 60);
  return fmt::format("{}:{:02}", total / 60, total % 60);
}

// Cut to `width` columns, counting one for each code point.
std::string cut_to_width(std::string text, int width) {
  int columns = 0;
  for (size_t i = 0; i < text.size(); ++i) {
    const bool starts_character = (static_cast<unsigned char>(text[i]) & 0xC0) != 0x80;
    if (starts_character && ++columns > width) return text.substr(0, i);
  }
  return text;
}

}  // namespace

std::string progress_text(const Progress& progress, int width) {
  constexpr int kCells = 20;
  const std::string unit = progress.unit.empty() ? "" : " " + progress.unit;
  const double rate =
      progress.seconds > 0 ? static_cast<double>(progress.done - progress.start) / progress.seconds : 0;
  std::string text = progress.label;
  if (progress.total > 0) {
    const double share =
        std::clamp(static_cast<double>(progress.done) / static_cast<double>(progress.total), 0.0, 1.0);
    const int filled = static_cast<int>(share * kCells);
    text +=
        fmt::format(" [{}{}] {:3.0f}% {}/{}{}", std::string(filled, '#'), std::string(kCells - filled, '.'),
                    std::floor(share * 100), short_number(static_cast<double>(progress.done)),
                    short_number(static_cast<double>(progress.total)), unit);
  } else {
    text += fmt::format(" {}{}", short_number(static_cast<double>(progress.done)), unit);
  }
  if (rate > 0) text += fmt::format(" {}/s", short_number(rate));
  if (rate > 0 && progress.total > progress.done) {
    text +=
        fmt::format(" {} left", duration_text(static_cast<double>(progress.total - progress.done) / rate));
  }
  if (!progress.note.empty()) text += " " + progress.note;
  return cut_to_width(std::move(text), width);
}

ProgressBar::ProgressBar(int64_t total, std::string label, ProgressOptions options, Console& console)
    : total_(total),
      label_(std::move(label)),
      options_(std::move(options)),
      console_(console),
      begin_(Clock::now()),
      done_(options_.start),
      next_draw_(begin_ + options_.delay) {
  const std::lock_guard lock(console_.mutex_);
  console_.bars_.push_back(this);
}

ProgressBar::~ProgressBar() {
  const std::lock_guard lock(console_.mutex_);
  if (console_.bars_.back() == this) console_.show("");
  std::erase(console_.bars_, this);
}

void ProgressBar::advance(int64_t amount) {
  done_ += amount;
  draw_if_due();
}

void ProgressBar::set(int64_t done) {
  done_ = done;
  draw_if_due();
}

void ProgressBar::draw_if_due() {
  if (!console_.terminal_) return;
  auto due = next_draw_.load();
  const auto now = Clock::now();
  constexpr std::chrono::milliseconds kInterval{100};
  // One thread wins the right to draw.
  if (now >= due && next_draw_.compare_exchange_strong(due, now + kInterval)) draw();
}

void ProgressBar::note(std::string text) {
  const std::lock_guard lock(console_.mutex_);
  note_ = std::move(text);
}

void ProgressBar::draw() {
  const std::lock_guard lock(console_.mutex_);
  if (console_.bars_.back() != this) return;
  const double seconds = std::chrono::duration<double>(Clock::now() - begin_).count();
  // The last column stays free: a full line would wrap.
  console_.show(progress_text({label_, options_.unit, note_, options_.start, done_, total_, seconds},
                              console_.width() - 1));
}

}  // namespace oryx
