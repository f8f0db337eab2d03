// Process groups for tests: ranks as threads of one process.
#pragma once

#include <c10/core/DeviceGuard.h>
#include <gtest/gtest.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cstdlib>
#include <functional>
#include <thread>
#include <vector>

#include "training/process_group.h"

namespace oryx::training {

inline int64_t testing_free_port() {
  const int probe = socket(AF_INET, SOCK_STREAM, 0);
  sockaddr_in address = {};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  socklen_t size = sizeof(address);
  EXPECT_EQ(bind(probe, reinterpret_cast<sockaddr*>(&address), size), 0);
  EXPECT_EQ(getsockname(probe, reinterpret_cast<sockaddr*>(&address), &size), 0);
  close(probe);
  return ntohs(address.sin_port);
}

// Runs `body` on every rank of a group.
inline void testing_with_ranks(int64_t size, c10::Device device,
                               const std::function<void(ProcessGroup&)>& body) {
  // c10d's record of collectives is one for the process and takes one thread's at a time.
  setenv("TORCH_FR_BUFFER_SIZE", "0", /*overwrite=*/1);
  const int64_t port = testing_free_port();
  std::vector<std::thread> threads;
  for (int64_t rank = 0; rank < size; ++rank) {
    threads.emplace_back([&, rank] {
      try {
        const c10::DeviceGuard guard(device);
        Launch launch;
        launch.launcher = "torchrun";
        launch.rank = rank;
        launch.size = size;
        launch.address = "127.0.0.1";
        launch.port = port;
        launch.hosts_store = rank == 0;
        ProcessGroup group(launch, std::chrono::seconds(60));
        group.start(device, std::chrono::seconds(60));
        body(group);
        group.leave();
      } catch (const std::exception& error) {
        ADD_FAILURE() << "rank " << rank << ": " << error.what();
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
}

}  // namespace oryx::training
