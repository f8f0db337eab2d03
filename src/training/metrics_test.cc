#include "training/metrics.h"

#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <sstream>

#include "training/event_file.h"

namespace oryx::training {
namespace {

namespace fs = std::filesystem;

class MetricsTest : public testing::Test {
 protected:
  MetricsTest() : directory_(fs::path(testing::TempDir()) / "metrics_test") {
    fs::remove_all(directory_);
    fs::create_directories(directory_);
  }
  ~MetricsTest() override { fs::remove_all(directory_); }

  void record(Metrics& metrics, int64_t step) {
    TrainMetrics line;
    line.step = step;
    line.tokens = 10 * step;
    line.loss = 1.0 / static_cast<double>(step);
    metrics.record(line);
  }
  std::string text() const {
    std::ostringstream out;
    out << std::ifstream(directory_ / "metrics.jsonl").rdbuf();
    return out.str();
  }
  std::vector<nlohmann::json> lines() const {
    std::vector<nlohmann::json> lines;
    std::istringstream in(text());
    for (std::string line; std::getline(in, line);) lines.push_back(nlohmann::json::parse(line));
    return lines;
  }
  const fs::path directory_;
};

TEST_F(MetricsTest, OneObjectALine) {
  Metrics metrics(directory_, -1);
  metrics.record(ValidationMetrics{0, 0, {{"attention", 2.5}, {"linear", 2.25}}});
  record(metrics, 1);
  ASSERT_EQ(lines().size(), 2u);
  EXPECT_EQ(lines()[0]["loss"]["linear"], 2.25);
  EXPECT_EQ(lines()[1]["kind"], "train");
  EXPECT_EQ(lines()[1]["tokens"], 10);
}

TEST_F(MetricsTest, ContinuingCutsOffLaterStepsAndBrokenLines) {
  {
    Metrics metrics(directory_, -1);
    for (int64_t step = 1; step <= 5; ++step) record(metrics, step);
    metrics.record(ValidationMetrics{3, 30, {{"attention", 2.0}}});
  }
  std::ofstream(directory_ / "metrics.jsonl", std::ios::app) << "{\"kind\":\"train\",\"st";
  const std::string before = text();
  {
    Metrics metrics(directory_, 5);
    EXPECT_EQ(text(), before.substr(0, before.rfind('\n') + 1));
    EXPECT_EQ(metrics.last_train()->step, 5);
    EXPECT_EQ(metrics.last_validation()->loss.at("attention"), 2.0);
  }
  Metrics metrics(directory_, 3);
  EXPECT_EQ(lines().size(), 3u);
  EXPECT_EQ(metrics.last_train()->step, 3);
  record(metrics, 4);
  EXPECT_EQ(lines().back()["step"], 4);
}

TEST_F(MetricsTest, AFreshRunStartsEmpty) {
  {
    Metrics metrics(directory_, -1);
    metrics.record(ValidationMetrics{0, 0, {{"attention", 2.5}}});
  }
  Metrics metrics(directory_, -1);
  EXPECT_EQ(text(), "");
  EXPECT_FALSE(metrics.last_validation());
}

// RFC 3720, B.4.
TEST(EventFile, Crc32c) {
  EXPECT_EQ(crc32c("123456789"), 0xE3069283u);
  EXPECT_EQ(crc32c(std::string(32, '\0')), 0x8A9136AAu);
}

TEST_F(MetricsTest, EventFileStartsWithAWellFramedVersion) {
  { EventFile events(directory_, 0); }
  std::ifstream in(fs::directory_iterator(directory_)->path(), std::ios::binary);
  std::string bytes((std::istreambuf_iterator<char>(in)), {});
  ASSERT_GT(bytes.size(), 16u);
  const auto length = static_cast<unsigned char>(bytes[0]);
  EXPECT_EQ(bytes.substr(1, 7), std::string(7, '\0'));
  EXPECT_NE(bytes.substr(12, length).find("brain.Event:2"), std::string::npos);
}

}  // namespace
}  // namespace oryx::training
