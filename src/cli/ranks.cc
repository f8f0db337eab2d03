#include "cli/ranks.h"

#include <ATen/Context.h>

#include <cstdio>
#include <cstdlib>
#include <exception>
#include <memory>
#include <new>
#include <optional>
#include <string>

#include "base/error.h"
#include "cli/options.h"

namespace oryx::cli {

namespace {

[[noreturn]] void end_rank(const training::Launch& launch, training::ProcessGroup* group,
                           const std::string& message, int code) {
  const std::string line = message.substr(0, message.find('\n'));
  std::fprintf(stderr, "oryx: rank %d of %d: %s\n", static_cast<int>(launch.rank),
               static_cast<int>(launch.size), line.c_str());
  std::fflush(stderr);
  if (group) group->report(line);
  std::_Exit(code);
}

}  // namespace

void as_launched(const std::function<void(const training::Launch&, training::ProcessGroup*)>& body) {
  const std::optional<training::Launch> launch = training::launch_of_this_process();
  if (!launch || launch->size == 1) return body({}, nullptr);
  std::unique_ptr<training::ProcessGroup> group;
  try {
    group = std::make_unique<training::ProcessGroup>(*launch);
    body(*launch, group.get());
  } catch (const UsageError& error) {
    end_rank(*launch, group.get(), error.what(), 2);
  } catch (const std::bad_alloc&) {
    end_rank(*launch, group.get(), "out of memory", 1);
  } catch (const std::exception& error) {
    end_rank(*launch, group.get(), error.what(), 1);
  }
}

c10::Device device_of(const training::Launch& launch, c10::Device device) {
  if (!device.is_cuda() || launch.size == 1) return device;
  const int64_t visible = at::detail::getCUDAHooks().deviceCount();
  if (visible == 1) return device;
  expect(launch.local_rank < visible, "process {} of this machine has no GPU: {} of them are visible",
         launch.local_rank, visible);
  return c10::Device(c10::kCUDA, static_cast<c10::DeviceIndex>(launch.local_rank));
}

}  // namespace oryx::cli
