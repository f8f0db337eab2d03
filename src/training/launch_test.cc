#include "training/launch.h"

#include <gtest/gtest.h>

#include <map>

#include "base/error.h"

namespace oryx::training {
namespace {

using Variables = std::map<std::string, std::string>;

Variables with(Variables variables, const Variables& more) {
  for (const auto& [name, value] : more) variables.insert_or_assign(name, value);
  return variables;
}

std::optional<Launch> launch_of(const Variables& variables) {
  return read_launch([&](const std::string& name) -> std::optional<std::string> {
    const auto found = variables.find(name);
    return found == variables.end() ? std::nullopt : std::optional(found->second);
  });
}

TEST(Launch, NoLauncherNoLaunch) { EXPECT_FALSE(launch_of({{"HOME", "/root"}, {"RANK", ""}})); }

TEST(Launch, Torchrun) {
  Variables variables = {{"RANK", "5"},
                         {"WORLD_SIZE", "8"},
                         {"LOCAL_RANK", "1"},
                         {"MASTER_ADDR", "gpu003"},
                         {"MASTER_PORT", "41000"},
                         {"TORCHELASTIC_USE_AGENT_STORE", "True"},
                         {"TORCHELASTIC_RESTART_COUNT", "2"}};
  const Launch launch = *launch_of(variables);
  EXPECT_EQ(launch.launcher, "torchrun");
  EXPECT_EQ(launch.rank, 5);
  EXPECT_EQ(launch.size, 8);
  EXPECT_EQ(launch.local_rank, 1);
  EXPECT_EQ(launch.address, "gpu003");
  EXPECT_EQ(launch.port, 41000);
  EXPECT_EQ(launch.attempt, 2);
  variables = with(variables, {{"RANK", "0"}});
  EXPECT_FALSE(launch_of(variables)->hosts_store);  // the agent does
  variables = with(variables, {{"TORCHELASTIC_USE_AGENT_STORE", "False"}});
  EXPECT_TRUE(launch_of(variables)->hosts_store);
  // A SLURM step that runs torchrun has both sets of variables.
  variables = with(variables, {{"SLURM_PROCID", "3"}});
  EXPECT_EQ(launch_of(variables)->rank, 0);
}

TEST(Launch, Slurm) {
  Variables variables = {{"SLURM_PROCID", "0"},
                         {"SLURM_NTASKS", "16"},
                         {"SLURM_LOCALID", "0"},
                         {"SLURM_JOB_ID", "7012"},
                         {"SLURM_STEP_NODELIST", "gpu[007-010,12],b1"}};
  const Launch launch = *launch_of(variables);
  EXPECT_EQ(launch.launcher, "SLURM");
  EXPECT_EQ(launch.address, "gpu007");
  EXPECT_EQ(launch.port, 29512);
  EXPECT_TRUE(launch.hosts_store);
  variables = with(variables, {{"MASTER_ADDR", "other"}});
  variables = with(variables, {{"MASTER_PORT", "30000"}});
  EXPECT_EQ(launch_of(variables)->address, "other");
  EXPECT_EQ(launch_of(variables)->port, 30000);
}

TEST(Launch, FirstHost) {
  EXPECT_EQ(first_host("one"), "one");
  EXPECT_EQ(first_host("one,two"), "one");
  EXPECT_EQ(first_host("a,b[1-3]"), "a");
  EXPECT_EQ(first_host("b[10,12-13]"), "b10");
  EXPECT_EQ(first_host("rack[1-2]-node,x"), "rack1-node");
  EXPECT_EQ(first_host(""), "");
}

TEST(Launch, OpenMpi) {
  Variables variables = {{"OMPI_COMM_WORLD_RANK", "1"},
                         {"OMPI_COMM_WORLD_SIZE", "2"},
                         {"OMPI_COMM_WORLD_LOCAL_RANK", "1"},
                         {"OMPI_COMM_WORLD_LOCAL_SIZE", "2"}};
  const Launch launch = *launch_of(variables);
  EXPECT_EQ(launch.launcher, "Open MPI");
  EXPECT_EQ(launch.local_rank, 1);
  EXPECT_EQ(launch.address, "127.0.0.1");
  EXPECT_FALSE(launch.hosts_store);
  variables = with(variables, {{"OMPI_COMM_WORLD_LOCAL_SIZE", "1"}});
  EXPECT_THROW(launch_of(variables), Error);  // two machines, and nobody says where to meet
}

TEST(Launch, ContradictionsNameTheVariable) {
  const auto message = [](const Variables& variables) -> std::string {
    try {
      launch_of(variables);
    } catch (const Error& error) {
      return error.what();
    }
    return "";
  };
  EXPECT_NE(message({{"RANK", "1"}}).find("WORLD_SIZE"), std::string::npos);
  EXPECT_NE(message({{"RANK", "2"}, {"WORLD_SIZE", "2"}, {"MASTER_ADDR", "x"}}).find("rank 2 of 2"),
            std::string::npos);
  EXPECT_NE(message({{"RANK", "x"}, {"WORLD_SIZE", "2"}}).find("RANK = x"), std::string::npos);
  EXPECT_NE(message({{"RANK", "0"}, {"WORLD_SIZE", "2"}}).find("MASTER_ADDR"), std::string::npos);
}

}  // namespace
}  // namespace oryx::training
