#include "base/progress.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <thread>

namespace oryx {
namespace {

// A console whose output can be read back.
class Pipe {
 public:
  Pipe() {
    if (::pipe(ends_) != 0) throw std::runtime_error("no pipe");
  }
  ~Pipe() {
    ::close(ends_[0]);
    if (ends_[1] >= 0) ::close(ends_[1]);
  }
  int input() const { return ends_[1]; }
  std::string drain() {
    ::close(ends_[1]);
    ends_[1] = -1;
    std::string text;
    char buffer[4096];
    for (ssize_t size; (size = ::read(ends_[0], buffer, sizeof buffer)) > 0;) text.append(buffer, size);
    return text;
  }

 private:
  int ends_[2];
};

// What a terminal shows in the end: carriage return with erase empties the current line.
std::string on_screen(const std::string& bytes) {
  std::string screen;
  for (size_t i = 0; i < bytes.size(); ++i) {
    if (bytes.compare(i, 4, "\r\x1b[K") == 0) {
      screen.erase(screen.rfind('\n') + 1);
      i += 3;
    } else {
      screen += bytes[i];
    }
  }
  return screen;
}

TEST(ProgressText, ShowsShareRateAndTimeLeft) {
  EXPECT_EQ(progress_text({"train", "tok", "loss 3.21", 0, 500, 2000, 10}, 200),
            "train [#####...............]  25% 500/2.00k tok 50/s 0:30 left loss 3.21");
  // What was done before does not count as fast.
  EXPECT_EQ(progress_text({"train", "", "", 1000, 1500, 2000, 10}, 200),
            "train [###############.....]  75% 1.50k/2.00k 50/s 0:10 left");
  EXPECT_EQ(progress_text({"read", "B", "", 0, 12345678, 0, 2}, 200), "read 12.3M B 6.17M/s");
  EXPECT_EQ(progress_text({"train", "", "", 0, 0, 100, 0}, 200), "train [....................]   0% 0/100");
  EXPECT_EQ(progress_text({"x", "", "", 0, 100, 100, 1}, 200), "x [####################] 100% 100/100 100/s");
  EXPECT_EQ(progress_text({"x", "", "", 0, 1, 100000, 1}, 200).substr(37), "1/s 27:46:39 left");
}

TEST(ProgressText, FitsTheWidthWithoutSplittingCharacters) {
  const Progress progress{"größer", "", "", 0, 1, 10, 1};
  EXPECT_EQ(progress_text(progress, 3), "grö");
  EXPECT_EQ(progress_text(progress, 0), "");
}

TEST(ProgressBar, IsSilentWithoutATerminalAndForShortWork) {
  Pipe pipe;
  Console plain(pipe.input(), false), terminal(pipe.input(), true);
  {
    ProgressBar no_terminal(10, "a", {.unit = "", .start = 0, .delay = std::chrono::milliseconds(0)}, plain);
    ProgressBar fast(10, "b", {}, terminal);
    for (int i = 0; i < 10; ++i) no_terminal.advance(), fast.advance();
  }
  EXPECT_EQ(pipe.drain(), "");
}

TEST(ProgressBar, NeverMixesWithLogLines) {
  Pipe pipe;
  Console console(pipe.input(), true);
  {
    ProgressBar bar(10, "bar", {.unit = "", .start = 0, .delay = std::chrono::milliseconds(0)}, console);
    console.line("before");
    bar.advance();
    console.line("during");
    {
      ProgressBar inner(10, "inner", {.unit = "", .start = 0, .delay = std::chrono::milliseconds(0)},
                        console);
      inner.advance();
      console.line("nested");
    }
  }
  console.line("after");
  const std::string bytes = pipe.drain();
  EXPECT_NE(bytes.find("bar ["), std::string::npos);
  EXPECT_NE(bytes.find("inner ["), std::string::npos);
  EXPECT_EQ(on_screen(bytes), "before\nduring\nnested\nafter\n");
}

TEST(Console, LinesOfThreadsStayWhole) {
  Pipe pipe;
  Console console(pipe.input(), false);
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([&console, t] {
      for (int i = 0; i < 50; ++i) console.line(std::string(20, static_cast<char>('a' + t)));
    });
  }
  for (std::thread& thread : threads) thread.join();
  const std::string bytes = pipe.drain();
  ASSERT_EQ(bytes.size(), 4u * 50 * 21);
  for (size_t i = 0; i < bytes.size(); i += 21) {
    EXPECT_EQ(bytes.substr(i, 20), std::string(20, bytes[i]));
    EXPECT_EQ(bytes[i + 20], '\n');
  }
}

}  // namespace
}  // namespace oryx
