// A command as one of the processes that torchrun, srun or mpirun started, or on its own.
#pragma once

#include <c10/core/Device.h>

#include <functional>

#include "training/launch.h"
#include "training/process_group.h"

namespace oryx::cli {

// Calls `body` with the group of ranks that this process belongs to, which `body` starts and leaves; null for
// a process on its own. As a rank, an error is one line that names the rank, and the end of the process: the
// others are told, and nothing waits for exchanges that will never finish.
void as_launched(const std::function<void(const training::Launch&, training::ProcessGroup*)>& body);

// Of several processes on one machine each takes its own GPU, unless the launcher shows it only one. Throws
// Error where there are too few.
c10::Device device_of(const training::Launch& launch, c10::Device device);

}  // namespace oryx::cli
