#include "training/launch.h"

#include <charconv>
#include <cstdlib>

#include "base/error.h"

namespace oryx::training {

namespace {

constexpr int64_t kDefaultPort = 29500;

class Variables {
 public:
  explicit Variables(const Environment& environment) : environment_(environment) {}

  bool has(const std::string& name) const { return text(name).has_value(); }

  // Set but empty counts as not set.
  std::optional<std::string> text(const std::string& name) const {
    std::optional<std::string> value = environment_(name);
    return value && !value->empty() ? value : std::nullopt;
  }

  std::optional<int64_t> integer(const std::string& name) const {
    const std::optional<std::string> value = text(name);
    if (!value) return std::nullopt;
    int64_t number = 0;
    const auto [end, failure] = std::from_chars(value->data(), value->data() + value->size(), number);
    expect(failure == std::errc() && end == value->data() + value->size() && number >= 0,
           "{} = {}: expected a number", name, *value);
    return number;
  }

  int64_t required(const std::string& name, const std::string& given) const {
    const std::optional<int64_t> number = integer(name);
    if (!number) fail("{} is set, but {} is not: expected both, as a launcher sets them", given, name);
    return *number;
  }

 private:
  const Environment& environment_;
};

Launch of_torchrun(const Variables& variables) {
  Launch launch;
  launch.launcher = "torchrun";
  launch.rank = variables.required("RANK", "WORLD_SIZE");
  launch.size = variables.required("WORLD_SIZE", "RANK");
  launch.local_rank = variables.integer("LOCAL_RANK").value_or(launch.rank);
  launch.address = variables.text("MASTER_ADDR").value_or("");
  launch.port = variables.integer("MASTER_PORT").value_or(kDefaultPort);
  // Its agent serves a store that outlives the processes, unless told otherwise.
  launch.launcher_hosts_store = variables.text("TORCHELASTIC_USE_AGENT_STORE") == "True";
  launch.hosts_store = launch.rank == 0 && !launch.launcher_hosts_store;
  launch.attempt = variables.integer("TORCHELASTIC_RESTART_COUNT").value_or(0);
  return launch;
}

Launch of_slurm(const Variables& variables) {
  Launch launch;
  launch.launcher = "SLURM";
  launch.rank = variables.required("SLURM_PROCID", "SLURM_NTASKS");
  launch.size = variables.required("SLURM_NTASKS", "SLURM_PROCID");
  launch.local_rank = variables.integer("SLURM_LOCALID").value_or(0);
  for (const char* name : {"SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST"}) {
    if (launch.address.empty()) launch.address = first_host(variables.text(name).value_or(""));
  }
  // Jobs that share a machine meet at ports of their own.
  launch.port = kDefaultPort + variables.integer("SLURM_JOB_ID").value_or(0) % 1000;
  launch.hosts_store = launch.rank == 0;
  launch.attempt = variables.integer("SLURM_RESTART_COUNT").value_or(0);
  return launch;
}

Launch of_open_mpi(const Variables& variables) {
  Launch launch;
  launch.launcher = "Open MPI";
  launch.rank = variables.required("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE");
  launch.size = variables.required("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK");
  launch.local_rank = variables.integer("OMPI_COMM_WORLD_LOCAL_RANK").value_or(0);
  const bool one_machine = variables.integer("OMPI_COMM_WORLD_LOCAL_SIZE") == launch.size;
  if (one_machine) launch.address = "127.0.0.1";
  launch.hosts_store = launch.rank == 0;
  return launch;
}

}  // namespace

std::string first_host(const std::string& nodes) {
  const size_t bracket = nodes.find('['), comma = nodes.find(',');
  if (bracket == std::string::npos || comma < bracket) return nodes.substr(0, comma);
  const size_t end = nodes.find_first_of(",-]", bracket);
  const size_t close = nodes.find(']', bracket);
  if (end == std::string::npos || close == std::string::npos) return "";
  const size_t rest_end = nodes.find(',', close);  // a suffix behind the brackets belongs to the name
  const std::string rest =
      nodes.substr(close + 1, rest_end == std::string::npos ? rest_end : rest_end - close - 1);
  return nodes.substr(0, bracket) + nodes.substr(bracket + 1, end - bracket - 1) + rest;
}

std::optional<Launch> read_launch(const Environment& environment) {
  const Variables variables(environment);
  Launch launch;
  if (variables.has("RANK") || variables.has("WORLD_SIZE")) {
    launch = of_torchrun(variables);
  } else if (variables.has("OMPI_COMM_WORLD_RANK")) {
    launch = of_open_mpi(variables);
  } else if (variables.has("SLURM_PROCID")) {
    launch = of_slurm(variables);
  } else {
    return std::nullopt;
  }
  if (const auto address = variables.text("MASTER_ADDR")) launch.address = *address;
  if (const auto port = variables.integer("MASTER_PORT")) launch.port = *port;
  expect(launch.size >= 1 && launch.rank < launch.size,
         "{} says that this is rank {} of {}: expected a rank below the number of ranks", launch.launcher,
         launch.rank, launch.size);
  expect(launch.size == 1 || !launch.address.empty(),
         "MASTER_ADDR is not set: expected the host of rank 0, where the {} ranks meet", launch.size);
  expect(launch.port >= 1 && launch.port < 65536, "MASTER_PORT = {}: expected a port", launch.port);
  return launch;
}

std::optional<Launch> launch_of_this_process() {
  return read_launch([](const std::string& name) -> std::optional<std::string> {
    const char* value = std::getenv(name.c_str());
    return value == nullptr ? std::nullopt : std::optional<std::string>(value);
  });
}

}  // namespace oryx::training
