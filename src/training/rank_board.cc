#include "training/rank_board.h"

#include <fmt/ranges.h>

#include <algorithm>
#include <vector>

#include "base/error.h"

namespace oryx::training {

namespace {

using std::chrono::milliseconds;
using Clock = std::chrono::steady_clock;

double seconds(milliseconds time) { return 1e-3 * static_cast<double>(time.count()); }

std::string key_of(const char* what, int64_t rank) { return fmt::format("{}/{}", what, rank); }

// "rank 2" or "ranks 2, 5, 7", cut after some.
std::string names(const std::vector<int64_t>& ranks) {
  constexpr size_t kMost = 8;
  const std::vector<int64_t> shown(ranks.begin(), ranks.begin() + std::min(kMost, ranks.size()));
  return fmt::format("{} {}{}", ranks.size() == 1 ? "rank" : "ranks", fmt::join(shown, ", "),
                     ranks.size() > kMost ? fmt::format(" and {} more", ranks.size() - kMost) : "");
}

}  // namespace

RankBoard::RankBoard(std::shared_ptr<TextStore> store, Launch launch, RankBoardTimes times)
    : store_(std::move(store)), launch_(std::move(launch)), times_(times) {
  expect(store_->add(key_of("arrivals", rank()), 1) == 1,
         "two processes say that they are rank {} of {}: expected a rank for each", rank(), launch_.size);
  try {
    heart_ = std::thread([this] { beat(); });
  } catch (const std::exception& error) {
    const std::string message = fmt::format("cannot start a thread: {}", error.what());
    report(message);
    fail("{}", message);
  }
}

RankBoard::~RankBoard() {
  {
    const std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  changed_.notify_all();
  heart_.join();
}

void RankBoard::beat() {
  std::unique_lock lock(mutex_);
  try {
    while (!stopping_) {
      store_->add(key_of("heartbeat", rank()), 1);
      changed_.wait_for(lock, times_.heartbeat, [this] { return stopping_; });
    }
  } catch (const std::exception&) {
    // The store is gone: the thread that exchanges tensors meets the same and says so.
  }
}

std::string RankBoard::await(const std::string& key, milliseconds timeout,
                             const std::function<std::string()>& missing) {
  const Clock::time_point deadline = Clock::now() + timeout;
  for (milliseconds pause{5};; pause = std::min(2 * pause, milliseconds(500))) {
    if (const auto text = store_->get(key)) return *text;
    throw_if_failed();
    if (Clock::now() >= deadline) fail("{}", missing());
    std::this_thread::sleep_for(pause);
  }
}

void RankBoard::meet(const std::string& terms, milliseconds timeout) {
  store_->set(key_of("terms", rank()), terms);
  const auto too_few = [&] {
    std::vector<int64_t> absent;
    for (int64_t r = 0; r < launch_.size; ++r) {
      if (!store_->get(key_of("terms", r))) absent.push_back(r);
    }
    return fmt::format(
        "{} of {} ranks came within {} s, {} did not: expected as many processes as {} announced",
        launch_.size - static_cast<int64_t>(absent.size()), launch_.size, seconds(timeout), names(absent),
        launch_.launcher);
  };
  const std::string first = await(key_of("terms", 0), timeout, too_few);
  expect(terms == first, "this rank was started as one of {}, rank 0 as one of {}: expected the same", terms,
         first);
  if (rank() != 0) {
    // Rank 0 gives up first, and says so.
    await("complete", timeout + times_.inquest, [&] { return "rank 0 did not say that all ranks came"; });
    return;
  }
  const Clock::time_point deadline = Clock::now() + timeout;
  for (int64_t r = 1; r < launch_.size; ++r) {
    const auto left = std::chrono::duration_cast<milliseconds>(deadline - Clock::now());
    const std::string other = await(key_of("terms", r), std::max(left, milliseconds(0)), too_few);
    expect(other == terms, "rank {} was started as one of {}, rank 0 as one of {}: expected the same", r,
           other, terms);
  }
  store_->set("complete", "");
}

std::string RankBoard::share(const std::string& key, const std::string& text, milliseconds timeout) {
  if (rank() == 0) {
    store_->set("shared/" + key, text);
    return text;
  }
  return await("shared/" + key, timeout, [&] {
    return fmt::format("rank 0 did not answer for {} s (it was to say: {})", seconds(timeout), key);
  });
}

void RankBoard::throw_if_failed() {
  const std::optional<std::string> failure = store_->get("failure");
  if (!failure) return;
  if (!seen_) store_->add("seen", 1);
  seen_ = true;
  fail("stopped: {}", *failure);
}

void RankBoard::check(milliseconds waited) {
  throw_if_failed();
  if (store_->get("stalled")) blame_silence(waited);
}

void RankBoard::hold_inquest(const std::function<std::string()>& verdict) {
  const std::string mine = std::to_string(rank());
  if (store_->set_if_absent("inquest", mine) == mine) store_->set_if_absent("failure", verdict());
  // Twice the time that the one who holds it takes.
  await("failure", 3 * times_.inquest,
        [] { return "lost another rank, and did not find out which: the one that was to ask is gone too"; });
  throw_if_failed();
  fail("stopped");
}

void RankBoard::blame_lost_connection(const std::string& symptom) {
  // A rank that fails tells so before its connections close.
  throw_if_failed();
  hold_inquest([&] { return who_is_gone(symptom); });
}

void RankBoard::blame_silence(milliseconds waited) {
  store_->set(key_of("waiting", rank()), "");
  store_->set("stalled", "");
  hold_inquest([&] { return who_is_silent(waited); });
}

std::string RankBoard::who_is_gone(const std::string& symptom) {
  std::vector<std::optional<std::string>> before;
  for (int64_t r = 0; r < launch_.size; ++r) before.push_back(store_->get(key_of("heartbeat", r)));
  const Clock::time_point deadline = Clock::now() + times_.inquest;
  while (Clock::now() < deadline) {
    if (const auto failure = store_->get("failure")) return *failure;
    std::this_thread::sleep_for(times_.inquest / 20);
  }
  std::vector<int64_t> gone;
  for (int64_t r = 0; r < launch_.size; ++r) {
    if (r != rank() && store_->get(key_of("heartbeat", r)) == before[r]) gone.push_back(r);
  }
  if (gone.empty()) return fmt::format("rank {} lost its connection to another rank ({})", rank(), symptom);
  return fmt::format("{} {} gone: killed, out of memory, or without its machine", names(gone),
                     gone.size() == 1 ? "is" : "are");
}

std::string RankBoard::who_is_silent(milliseconds waited) {
  std::vector<std::optional<std::string>> before;
  for (int64_t r = 0; r < launch_.size; ++r) before.push_back(store_->get(key_of("heartbeat", r)));
  std::this_thread::sleep_for(times_.inquest);
  std::vector<int64_t> hanging, gone;
  for (int64_t r = 0; r < launch_.size; ++r) {
    if (r == rank() || store_->get(key_of("waiting", r))) continue;
    const bool beats = store_->get(key_of("heartbeat", r)) != before[r];
    (beats ? hanging : gone).push_back(r);
  }
  const double time = seconds(waited);
  if (!gone.empty()) {
    return fmt::format(
        "{} did not answer for {:.0f} s and gave no sign of life: stopped, or without its machine",
        names(gone), time);
  }
  if (!hanging.empty()) {
    return fmt::format(
        "{} did not answer for {:.0f} s (training.timeout_seconds), but lives: it hangs, or has "
        "more to do than the others",
        names(hanging), time);
  }
  return fmt::format("the ranks waited for each other for {:.0f} s (training.timeout_seconds)", time);
}

void RankBoard::report(const std::string& message) noexcept {
  try {
    store_->set_if_absent("failure", fmt::format("rank {} failed: {}", rank(), message));
    if (!launch_.hosts_store) return;
    const Clock::time_point deadline = Clock::now() + times_.linger;
    const int64_t others = launch_.size - 1 + (seen_ ? 1 : 0);
    while (Clock::now() < deadline && store_->add("seen", 0) < others) {
      std::this_thread::sleep_for(milliseconds(20));
    }
  } catch (const std::exception&) {
    // Nobody is left to tell.
  }
}

void RankBoard::leave() noexcept {
  try {
    int64_t left = store_->add("left", 1);
    const Clock::time_point deadline = Clock::now() + times_.linger;
    while (launch_.hosts_store && left < launch_.size && Clock::now() < deadline) {
      std::this_thread::sleep_for(milliseconds(5));
      left = store_->add("left", 0);
    }
  } catch (const std::exception&) {
    // Rank 0 was faster.
  }
}

}  // namespace oryx::training
