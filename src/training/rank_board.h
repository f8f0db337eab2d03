// What the ranks of a run tell each other outside of their exchanges of tensors: that they came, that they
// live, and why one of them ends. It is kept in a small store of texts that all of them reach; so every rank
// can end with a line that names the one that failed, whatever broke.
#pragma once

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>

#include "training/launch.h"

namespace oryx::training {

// Texts under keys, on one of the machines. Every function may be called from any thread and throws Error
// when the store is gone.
class TextStore {
 public:
  virtual ~TextStore() = default;
  virtual void set(const std::string& key, const std::string& text) = 0;
  virtual std::optional<std::string> get(const std::string& key) = 0;
  // What stands under the key then: `text`, or what another rank had put there before.
  virtual std::string set_if_absent(const std::string& key, const std::string& text) = 0;
  virtual int64_t add(const std::string& key, int64_t amount) = 0;  // the sum
};

struct RankBoardTimes {
  std::chrono::milliseconds heartbeat{1000};
  // Without a new heartbeat a rank counts as gone; also how long those who wait may take to say so.
  std::chrono::milliseconds inquest{4000};
  std::chrono::milliseconds linger{
      10000};  // a rank that keeps the store stays so long for the others to read
};

class RankBoard {
 public:
  // Throws Error when another process has this rank.
  RankBoard(std::shared_ptr<TextStore> store, Launch launch, RankBoardTimes times = {});
  ~RankBoard();
  RankBoard(const RankBoard&) = delete;
  RankBoard& operator=(const RankBoard&) = delete;

  const Launch& launch() const { return launch_; }

  // Returns when all ranks are here with the same `terms` ("4 ranks on cpu"). Throws Error naming the ranks
  // that did not come in time, and the terms of a rank that has others than rank 0.
  void meet(const std::string& terms, std::chrono::milliseconds timeout);

  // Rank 0's text; the others' is not looked at. Every key once.
  std::string share(const std::string& key, const std::string& text, std::chrono::milliseconds timeout);

  // For whoever waits for the others, about once a second: throws Error when one of them has failed, or when
  // one of them has waited too long for yet another.
  void check(std::chrono::milliseconds waited);

  // An exchange failed (`symptom`), or did not end in time. Finds out which rank is to blame; throws Error.
  [[noreturn]] void blame_lost_connection(const std::string& symptom);
  [[noreturn]] void blame_silence(std::chrono::milliseconds waited);

  // Tells the others that this rank ends, and why.
  void report(const std::string& message) noexcept;

  // The orderly end, which all ranks call: whoever keeps the store is the last to go.
  void leave() noexcept;

 private:
  int64_t rank() const { return launch_.rank; }
  std::string await(const std::string& key, std::chrono::milliseconds timeout,
                    const std::function<std::string()>& missing);
  void throw_if_failed();
  // The text under "failure", as all ranks will give it; the first rank to ask finds it out.
  [[noreturn]] void hold_inquest(const std::function<std::string()>& verdict);
  std::string who_is_gone(const std::string& symptom);
  std::string who_is_silent(std::chrono::milliseconds waited);
  void beat();

  const std::shared_ptr<TextStore> store_;
  const Launch launch_;
  const RankBoardTimes times_;
  bool seen_ = false;  // this rank has read why the run ends

  std::mutex mutex_;
  std::condition_variable changed_;
  bool stopping_ = false;
  std::thread heart_;
};

}  // namespace oryx::training
