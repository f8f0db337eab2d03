// Which of several processes this one is, as the launcher that started them says: torchrun, SLURM (srun) or
// Open MPI (mpirun). Oryx has no launcher of its own.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string>

namespace oryx::training {

struct Launch {
  std::string launcher;  // "torchrun", "SLURM" or "Open MPI"
  int64_t rank = 0;      // of size processes
  int64_t size = 1;
  int64_t local_rank = 0;  // of those on this machine: picks the GPU
  std::string address;     // of the store where the ranks meet
  int64_t port = 29500;
  bool launcher_hosts_store = false;  // else rank 0 does
  bool hosts_store = false;           // this process does
  int64_t attempt = 0;                // how often the launcher has started the job again
};

// The value of a variable; none where it is not set.
using Environment = std::function<std::optional<std::string>(const std::string&)>;

// RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT as torchrun sets them; else SLURM's or Open MPI's
// variables, over which MASTER_ADDR and MASTER_PORT count. None where no launcher speaks. Throws Error naming
// a variable that is missing or makes no sense.
std::optional<Launch> read_launch(const Environment& environment);

// The first host of a SLURM node list: "gpu[007-010,12],b1" → "gpu007".
std::string first_host(const std::string& nodes);

// read_launch() of this process's own environment.
std::optional<Launch> launch_of_this_process();

}  // namespace oryx::training
