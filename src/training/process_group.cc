// The one file that knows LibTorch's c10d.
#include "training/process_group.h"

#include <ATen/ATen.h>
#include <c10/util/Logging.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <future>
#include <system_error>
#include <thread>
#include <vector>

#include <torch/csrc/distributed/c10d/PrefixStore.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroupGloo.hpp>
#include <torch/csrc/distributed/c10d/TCPStore.hpp>
#ifdef USE_C10D_NCCL
#include <torch/csrc/distributed/c10d/ProcessGroupNCCL.hpp>
#endif

#include "base/error.h"

namespace oryx::training {

namespace {

using std::chrono::milliseconds;
using Clock = std::chrono::steady_clock;

// Between two looks at whether the other ranks still do their part.
constexpr milliseconds kLook{1000};
// Beyond our own limit, which gives the better message.
constexpr std::chrono::seconds kBackendSlack{120};
// For one question to the store.
constexpr milliseconds kStoreLimit{30000};

std::string first_line(const std::exception& error) {
  const std::string text = error.what();
  return text.substr(0, text.find('\n'));
}

std::vector<uint8_t> bytes(const std::string& text) { return {text.begin(), text.end()}; }

c10::intrusive_ptr<c10d::Store> open_store(const Launch& launch, std::chrono::seconds timeout) {
  // c10d's own messages would repeat at length what the one line of an error says.
  setenv("TORCH_CPP_LOG_LEVEL", "FATAL", /*overwrite=*/0);
  c10::initLogging();
  c10d::TCPStoreOptions options;
  options.port = static_cast<uint16_t>(launch.port);
  options.isServer = launch.hosts_store;
  options.waitWorkers = false;
  options.timeout = timeout;
  try {
    auto store = c10::make_intrusive<c10d::TCPStore>(launch.address, options);
    // The keys of an attempt that failed may still be there.
    return c10::make_intrusive<c10d::PrefixStore>(fmt::format("oryx/{}", launch.attempt), std::move(store));
  } catch (const std::exception& error) {
    fail("cannot {} {}:{}, where the ranks meet, within {} s: {}", launch.hosts_store ? "listen at" : "reach",
         launch.address, launch.port, timeout.count(), first_line(error));
  }
}

c10::intrusive_ptr<c10d::Backend> connect_gloo(const c10::intrusive_ptr<c10d::Store>& store,
                                               const Launch& launch, milliseconds timeout) {
  auto options = c10d::ProcessGroupGloo::Options::create(timeout);
  const char* interface = std::getenv("GLOO_SOCKET_IFNAME");
  const bool one_machine = launch.address == "127.0.0.1" || launch.address == "localhost";
  options->devices.push_back(interface != nullptr
                                 ? c10d::ProcessGroupGloo::createDeviceForInterface(interface)
                             : one_machine ? c10d::ProcessGroupGloo::createDeviceForHostname("127.0.0.1")
                                           : c10d::ProcessGroupGloo::createDefaultDevice());
  return c10::make_intrusive<c10d::ProcessGroupGloo>(store, static_cast<int>(launch.rank),
                                                     static_cast<int>(launch.size), std::move(options));
}

c10::intrusive_ptr<c10d::Backend> connect_nccl([[maybe_unused]] const c10::intrusive_ptr<c10d::Store>& store,
                                               [[maybe_unused]] const Launch& launch,
                                               [[maybe_unused]] milliseconds timeout) {
#ifdef USE_C10D_NCCL
  // c10d's watchdog would abort the process over a rank that is gone; here whoever waits finds out and says
  // so.
  setenv("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0", /*overwrite=*/0);
  auto options = c10d::ProcessGroupNCCL::Options::create();
  options->timeout = timeout;
  return c10::make_intrusive<c10d::ProcessGroupNCCL>(store, static_cast<int>(launch.rank),
                                                     static_cast<int>(launch.size), std::move(options));
#else
  fail("this program was built without CUDA: it trains with several ranks on CPUs only");
#endif
}

}  // namespace

// The store's texts for the board.
class ProcessGroup::Store : public TextStore {
 public:
  Store(c10::intrusive_ptr<c10d::Store> store, const Launch& launch)
      : store_(std::move(store)),
        where_(fmt::format("{}:{}, which {} kept", launch.address, launch.port,
                           launch.launcher_hosts_store ? launch.launcher : "rank 0")) {}

  void set(const std::string& key, const std::string& text) override {
    ask<bool>([=](c10d::Store& store) {
      store.set(key, bytes(text));
      return true;
    });
  }
  std::optional<std::string> get(const std::string& key) override {
    return ask<std::optional<std::string>>([=](c10d::Store& store) -> std::optional<std::string> {
      if (!store.check({key})) return std::nullopt;
      const std::vector<uint8_t> value = store.get(key);
      return std::string(value.begin(), value.end());
    });
  }
  std::string set_if_absent(const std::string& key, const std::string& text) override {
    return ask<std::string>([=](c10d::Store& store) {
      const std::vector<uint8_t> value = store.compareSet(key, {}, bytes(text));
      return std::string(value.begin(), value.end());
    });
  }
  int64_t add(const std::string& key, int64_t amount) override {
    return ask<int64_t>([=](c10d::Store& store) { return store.add(key, amount); });
  }

  void set_limit(milliseconds limit) { limit_ = limit; }

 private:
  // c10d waits without end for a store whose process was stopped or whose machine is gone; a thread of its
  // own does, and is left behind then.
  template <class Answer, class Question>
  Answer ask(Question question) {
    const auto promise = std::make_shared<std::promise<Answer>>();
    std::future<Answer> answer = promise->get_future();
    const auto run = [promise, question, store = store_] {
      try {
        promise->set_value(question(*store));
      } catch (...) {
        promise->set_exception(std::current_exception());
      }
    };
    try {
      std::thread(run).detach();
    } catch (const std::system_error&) {  // no memory for one: what it is to tell matters more
      run();
    }
    const milliseconds limit = limit_;
    const bool answered = answer.wait_for(limit) == std::future_status::ready;
    try {
      if (answered) return answer.get();
    } catch (const std::exception&) {
      fail("lost the store at {}: it is gone, or its machine", where_);
    }
    fail("the store at {}, did not answer for {} s: it hangs, or its machine is gone", where_,
         limit.count() / 1000);
  }

  const c10::intrusive_ptr<c10d::Store> store_;
  const std::string where_;
  std::atomic<milliseconds> limit_{kStoreLimit};
};

struct ProcessGroup::State {
  State(const Launch& its_launch, std::chrono::seconds its_timeout)
      : launch(its_launch),
        timeout(its_timeout),
        store(open_store(launch, its_timeout)),
        texts(std::make_shared<Store>(store, launch)),
        board(texts, launch) {}

  const Launch launch;
  milliseconds timeout;
  const c10::intrusive_ptr<c10d::Store> store;
  const std::shared_ptr<Store> texts;
  RankBoard board;
  c10::Device device = c10::kCPU;
  c10::intrusive_ptr<c10d::Backend> backend;

  // `begin` starts an exchange, which can fail at once.
  template <class Begin>
  Exchange start(std::vector<at::Tensor> tensors, Begin&& begin);
  void wait_on_host(c10d::Work& work);
};

struct Exchange::Work {
  ProcessGroup::State& group;
  c10::intrusive_ptr<c10d::Work> work;
  std::vector<at::Tensor> tensors;  // kept alive as long as something writes to them
};

template <class Begin>
Exchange ProcessGroup::State::start(std::vector<at::Tensor> tensors, Begin&& begin) {
  for (const at::Tensor& tensor : tensors) {
    expect(tensor.device() == device && tensor.is_contiguous(),
           "[process group] expected contiguous tensors on {}, got one on {}", device.str(),
           tensor.device().str());
  }
  c10::intrusive_ptr<c10d::Work> work;
  try {
    work = begin(*backend, tensors);
  } catch (const std::exception& error) {
    board.blame_lost_connection(first_line(error));
  }
  return Exchange(
      std::make_shared<Exchange::Work>(Exchange::Work{*this, std::move(work), std::move(tensors)}));
}

void ProcessGroup::State::wait_on_host(c10d::Work& work) {
  const Clock::time_point begin = Clock::now();
  Clock::time_point looked = begin;
  while (true) {
    try {
      if (device.is_cpu()) {
        work.wait(kLook);
        return;
      }
      // NCCL: a finished exchange is one whose kernels ran. Kernels of milliseconds, polled without sleeping
      // at first, then a little.
      if (work.isCompleted()) {
        if (const std::exception_ptr failure = work.exception()) std::rethrow_exception(failure);
        work.wait();  // the stream, too
        return;
      }
      if (Clock::now() - begin > milliseconds(2)) std::this_thread::sleep_for(std::chrono::microseconds(50));
    } catch (const std::exception& error) {
      if (work.isCompleted()) board.blame_lost_connection(first_line(error));
    }
    const Clock::time_point now = Clock::now();
    if (now - looked < kLook && device.is_cuda()) continue;
    looked = now;
    const auto waited = std::chrono::duration_cast<milliseconds>(now - begin);
    board.check(waited);
    if (waited >= timeout) board.blame_silence(waited);
  }
}

void Exchange::wait() {
  if (!work_) return;
  if (work_->group.device.is_cpu()) return finish();
  try {
    work_->work->wait();
  } catch (const std::exception& error) {
    work_->group.board.blame_lost_connection(first_line(error));
  }
  work_.reset();
}

void Exchange::finish() {
  if (!work_) return;
  work_->group.wait_on_host(*work_->work);
  work_.reset();
}

ProcessGroup::ProcessGroup(const Launch& launch, std::chrono::seconds timeout)
    : state_(std::make_unique<State>(launch, timeout)) {}

ProcessGroup::~ProcessGroup() = default;

int64_t ProcessGroup::rank() const { return state_->launch.rank; }
int64_t ProcessGroup::size() const { return state_->launch.size; }
c10::Device ProcessGroup::device() const { return state_->device; }

void ProcessGroup::start(c10::Device device, std::chrono::seconds timeout) {
  State& state = *state_;
  state.device = device;
  state.timeout = timeout;
  state.texts->set_limit(std::min<milliseconds>(timeout, kStoreLimit));
  state.board.meet(fmt::format("{} ranks on {}", size(), device.is_cuda() ? "GPUs" : "CPUs"), timeout);
  const auto limit = std::chrono::duration_cast<milliseconds>(timeout + kBackendSlack);
  const auto store = c10::make_intrusive<c10d::PrefixStore>("tensors", state.store);
  try {
    state.backend = device.is_cuda() ? connect_nccl(store, state.launch, limit)
                                     : connect_gloo(store, state.launch, limit);
  } catch (const std::exception& error) {
    state.board.blame_lost_connection(first_line(error));
  }
}

std::string ProcessGroup::share(const std::string& key, const std::string& text) {
  return state_->board.share(key, text, state_->timeout);
}

Exchange ProcessGroup::all_reduce(const at::Tensor& tensor) {
  return state_->start({tensor}, [](c10d::Backend& backend, std::vector<at::Tensor>& tensors) {
    return backend.allreduce(tensors);
  });
}

Exchange ProcessGroup::reduce_scatter(const at::Tensor& whole, const at::Tensor& part) {
  return state_->start({part, whole}, [](c10d::Backend& backend, std::vector<at::Tensor>& tensors) {
    return backend._reduce_scatter_base(tensors[0], tensors[1]);
  });
}

Exchange ProcessGroup::all_gather(const at::Tensor& part, const at::Tensor& whole) {
  return state_->start({whole, part}, [](c10d::Backend& backend, std::vector<at::Tensor>& tensors) {
    return backend._allgather_base(tensors[0], tensors[1]);
  });
}

Exchange ProcessGroup::broadcast(const at::Tensor& tensor, int64_t from) {
  c10d::BroadcastOptions options;
  options.rootRank = from;
  return state_->start({tensor}, [&](c10d::Backend& backend, std::vector<at::Tensor>& tensors) {
    return backend.broadcast(tensors, options);
  });
}

void ProcessGroup::report(const std::string& message) noexcept { state_->board.report(message); }

void ProcessGroup::leave() {
  const at::Tensor nothing = at::zeros({1}, at::TensorOptions(state_->device));
  all_reduce(nothing).finish();
  state_->board.leave();
}

}  // namespace oryx::training
