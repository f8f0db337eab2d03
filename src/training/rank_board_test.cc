#include "training/rank_board.h"

#include <gtest/gtest.h>

#include <map>

#include "base/error.h"

namespace oryx::training {
namespace {

using std::chrono::milliseconds;

class LocalStore : public TextStore {
 public:
  void set(const std::string& key, const std::string& text) override {
    const std::lock_guard lock(mutex_);
    texts_[key] = text;
  }
  std::optional<std::string> get(const std::string& key) override {
    const std::lock_guard lock(mutex_);
    const auto found = texts_.find(key);
    return found == texts_.end() ? std::nullopt : std::optional(found->second);
  }
  std::string set_if_absent(const std::string& key, const std::string& text) override {
    const std::lock_guard lock(mutex_);
    return texts_.emplace(key, text).first->second;
  }
  int64_t add(const std::string& key, int64_t amount) override {
    const std::lock_guard lock(mutex_);
    std::string& text = texts_[key];
    text = std::to_string((text.empty() ? 0 : std::stoll(text)) + amount);
    return std::stoll(text);
  }

 private:
  std::mutex mutex_;
  std::map<std::string, std::string> texts_;
};

class RankBoardTest : public testing::Test {
 protected:
  std::unique_ptr<RankBoard> board(int64_t rank, int64_t size) {
    Launch launch;
    launch.launcher = "torchrun";
    launch.rank = rank;
    launch.size = size;
    return std::make_unique<RankBoard>(
        store_, launch, RankBoardTimes{milliseconds(20), milliseconds(400), milliseconds(500)});
  }
  template <class Function>
  static std::string error_of(Function&& function) {
    try {
      function();
    } catch (const Error& error) {
      return error.what();
    }
    return "no error";
  }

  std::shared_ptr<LocalStore> store_ = std::make_shared<LocalStore>();
};

TEST_F(RankBoardTest, RanksMeetAndShare) {
  auto zero = board(0, 2), one = board(1, 2);
  std::string seen;
  std::thread other([&] {
    one->meet("2 ranks on cpu", milliseconds(5000));
    seen = one->share("step", "", milliseconds(5000));
  });
  zero->meet("2 ranks on cpu", milliseconds(5000));
  EXPECT_EQ(zero->share("step", "17", milliseconds(5000)), "17");
  other.join();
  EXPECT_EQ(seen, "17");
}

TEST_F(RankBoardTest, ARankThatDoesNotComeIsNamed) {
  auto zero = board(0, 3), one = board(1, 3);
  std::string other;
  std::thread thread([&] { other = error_of([&] { one->meet("3 ranks", milliseconds(200)); }); });
  const std::string mine = error_of([&] { zero->meet("3 ranks", milliseconds(200)); });
  zero->report(mine);
  thread.join();
  EXPECT_NE(mine.find("2 of 3 ranks came"), std::string::npos) << mine;
  EXPECT_NE(mine.find("rank 2 did not"), std::string::npos) << mine;
  EXPECT_NE(other.find("rank 0 failed: 2 of 3 ranks came"), std::string::npos) << other;
}

TEST_F(RankBoardTest, OtherTermsAndTakenRanksAreErrors) {
  auto zero = board(0, 2), one = board(1, 2);
  std::string mine;
  std::thread thread([&] { mine = error_of([&] { zero->meet("2 ranks", milliseconds(5000)); }); });
  const std::string other = error_of([&] { one->meet("4 ranks", milliseconds(5000)); });
  one->report(other);
  thread.join();
  EXPECT_NE(other.find("one of 4 ranks, rank 0 as one of 2 ranks"), std::string::npos) << other;
  EXPECT_NE(mine.find("rank 1"), std::string::npos) << mine;
  EXPECT_NE(error_of([&] { board(1, 2); }).find("two processes"), std::string::npos);
}

TEST_F(RankBoardTest, TheFirstFailureIsWhatAllSay) {
  auto zero = board(0, 3), one = board(1, 3), two = board(2, 3);
  one->report("disk full");
  two->report("something later");
  EXPECT_EQ(error_of([&] { zero->check(milliseconds(1000)); }), "stopped: rank 1 failed: disk full");
  EXPECT_EQ(error_of([&] { zero->blame_lost_connection("closed"); }), "stopped: rank 1 failed: disk full");
}

TEST_F(RankBoardTest, AKilledRankIsNamed) {
  auto zero = board(0, 3), one = board(1, 3);
  { auto two = board(2, 3); }  // its heart stops
  std::string other;
  std::thread thread([&] { other = error_of([&] { one->blame_lost_connection("closed"); }); });
  const std::string mine = error_of([&] { zero->blame_lost_connection("closed"); });
  thread.join();
  EXPECT_EQ(mine, "stopped: rank 2 is gone: killed, out of memory, or without its machine");
  EXPECT_EQ(other, mine);
}

TEST_F(RankBoardTest, AHangingRankIsNamed) {
  auto zero = board(0, 3), one = board(1, 3), two = board(2, 3);
  std::string other;
  std::thread thread([&] {
    while (other.empty() || other == "no error") {
      std::this_thread::sleep_for(milliseconds(20));
      other = error_of([&] { one->check(milliseconds(20)); });
    }
  });
  const std::string mine = error_of([&] { zero->blame_silence(milliseconds(2000)); });
  thread.join();
  EXPECT_NE(mine.find("rank 2 did not answer for 2 s"), std::string::npos) << mine;
  EXPECT_EQ(other, mine);
}

}  // namespace
}  // namespace oryx::training
