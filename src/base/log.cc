#include "base/log.h"

#include <sys/ioctl.h>
#include <unistd.h>

#include <cerrno>

namespace oryx {

Console::Console(int descriptor, bool terminal) : descriptor_(descriptor), terminal_(terminal) {}

Console& Console::standard_error() {
  // Never destroyed: bars and lines may still come from other objects' destructors at exit.
  static Console* console = new Console(STDERR_FILENO, ::isatty(STDERR_FILENO) == 1);
  return *console;
}

void Console::line(std::string_view text) {
  const std::lock_guard lock(mutex_);
  const std::string bar = shown_;
  show("");
  write(std::string(text) + "\n");
  show(bar);
}

void Console::show(std::string_view bar) {
  if (!shown_.empty()) write("\r\x1b[K");
  shown_ = bar;
  if (!shown_.empty()) write(shown_);
}

// What a closed or full stderr cannot take is lost: a log line must not end the work it reports.
void Console::write(std::string_view bytes) const {
  while (!bytes.empty()) {
    const ssize_t written = ::write(descriptor_, bytes.data(), bytes.size());
    if (written > 0) {
      bytes.remove_prefix(written);
    } else if (errno != EINTR) {
      return;
    }
  }
}

int Console::width() const {
  winsize size{};
  if (::ioctl(descriptor_, TIOCGWINSZ, &size) == 0 && size.ws_col > 0) return size.ws_col;
  return 80;
}

}  // namespace oryx
