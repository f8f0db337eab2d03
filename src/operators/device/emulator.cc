#include "operators/device/emulator.h"

#include <sys/mman.h>

#include <algorithm>
#include <deque>
#include <stdexcept>
#include <vector>

// Saves the callee-saved registers and the stack pointer of the running fiber and continues another.
extern "C" void oryx_emulator_switch(void** save, void* load);
asm(R"(
.text
.globl oryx_emulator_switch
.type oryx_emulator_switch, @function
oryx_emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size oryx_emulator_switch, .-oryx_emulator_switch
)");

namespace oryx::device::emulator {

bool descending = false;
uint64_t collectives = 0;

namespace {

constexpr size_t kStackBytes = 256 * 1024;
constexpr int kBarriers = 16;

struct Copy {
  void* to;
  const void* from;
  size_t bytes, valid_bytes;
};

// Copies that let a gate's next arrival in.
struct Delivery {
  std::vector<Copy> copies;
  uint64_t* gate;
};

// What lies in a gate's word.
struct GateState {
  uint32_t phase;  // the number of finished ones
  uint16_t count, missing;
};
static_assert(sizeof(GateState) == sizeof(uint64_t));

struct Warp {
  void* deposits[32];
  const void* operation = nullptr;
  int arrived = 0;
  uint32_t generation = 0;
};

struct Barrier {
  int arrived = 0, expected = 0;
  uint32_t generation = 0;
};

struct Thread {
  void* stack = nullptr;  // where it goes on
  Position position;
  Warp* warp = nullptr;
  const uint32_t* waits_on = nullptr;  // runnable once this word differs from `waits_at`
  uint32_t waits_at = 0;
  bool finished = false;
  std::vector<Copy> uncommitted;
  std::vector<std::vector<Copy>> groups;

  bool is_runnable() const { return !finished && (waits_on == nullptr || *waits_on != waits_at); }
};

struct Block {
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  Barrier barriers[kBarriers];
  std::deque<Delivery> deliveries;
  std::vector<char> shared;
  const std::function<void()>* kernel = nullptr;
  void* scheduler = nullptr;  // the stack of run()
  Thread* current = nullptr;
  int last_warp = 0;
};

Block block;
char* stacks = nullptr;
size_t stacks_count = 0;

void back_to_scheduler() { oryx_emulator_switch(&block.current->stack, block.scheduler); }

void wait(const uint32_t* word, uint32_t value) {
  Thread& self = *block.current;
  self.waits_on = word;
  self.waits_at = value;
  // The next lane of the warp is the likeliest to be able to go on.
  const size_t index = static_cast<size_t>(&self - block.threads.data());
  if (index % 32 != 31 && block.threads[index + 1].is_runnable()) {
    block.current = &block.threads[index + 1];
    oryx_emulator_switch(&self.stack, block.current->stack);
  } else {
    back_to_scheduler();
  }
  self.waits_on = nullptr;
}

void enter() {
  (*block.kernel)();
  block.current->finished = true;
  back_to_scheduler();
  std::abort();  // a finished thread never goes on
}

void make_stacks(size_t count) {
  if (count <= stacks_count) return;
  if (stacks != nullptr) munmap(stacks, stacks_count * kStackBytes);
  void* memory =
      mmap(nullptr, count * kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  stacks = static_cast<char*>(memory);
  stacks_count = count;
}

void land(const std::vector<Copy>& copies) {
  for (const Copy& copy : copies) {
    if (copy.valid_bytes > 0) std::memcpy(copy.to, copy.from, copy.valid_bytes);  // else `from` may be null
    std::memset(static_cast<char*>(copy.to) + copy.valid_bytes, 0, copy.bytes - copy.valid_bytes);
  }
}

// A runnable thread, warp after warp; null when there is none.
Thread* next_runnable() {
  const int warps = static_cast<int>(block.warps.size());
  for (int i = 0; i < warps; ++i) {
    const int step = descending ? warps - i : i;
    const int warp = (block.last_warp + step) % warps;
    for (int lane = 0; lane < 32; ++lane) {
      Thread& thread = block.threads[static_cast<size_t>(warp) * 32 + lane];
      if (!thread.is_runnable()) continue;
      block.last_warp = warp;
      return &thread;
    }
  }
  return nullptr;
}

void run_block() {
  while (true) {
    Thread* next = next_runnable();
    if (next == nullptr) {
      if (block.deliveries.empty()) break;
      const Delivery delivery = std::move(block.deliveries.front());
      block.deliveries.pop_front();
      land(delivery.copies);
      arrive_at_gate(delivery.gate);
      continue;
    }
    block.current = next;
    oryx_emulator_switch(&block.scheduler, next->stack);
  }
  for (const Thread& thread : block.threads) {
    if (!thread.finished) {
      throw std::runtime_error("emulator: thread " + std::to_string(thread.position.thread.x) +
                               " waits for a barrier or collective that the others never reach");
    }
    if (!thread.uncommitted.empty() || !thread.groups.empty()) {
      throw std::runtime_error("emulator: a kernel ended with asynchronous copies that nobody waited for");
    }
  }
}

// Whether it was the last to come.
bool come(Barrier& barrier, int count) {
  ++collectives;
  if (barrier.arrived > 0 && barrier.expected != count) {
    throw std::runtime_error("emulator: threads expect different numbers at one barrier");
  }
  barrier.expected = count;
  if (++barrier.arrived < count) return false;
  barrier.arrived = 0;
  ++barrier.generation;
  return true;
}

}  // namespace

const Position& here() { return block.current->position; }
int lane() { return static_cast<int>(block.current->position.thread.x % 32); }
char* shared_memory() {
  return reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(block.shared.data()) + 1023) / 1024 * 1024);
}

void barrier(int id, int count) {
  Barrier& barrier = block.barriers[id];
  if (!come(barrier, count)) wait(&barrier.generation, barrier.generation);
}

void arrive(int id, int count) { come(block.barriers[id], count); }

void open_gate(uint64_t* gate, int count) {
  *reinterpret_cast<GateState*>(gate) = {0, static_cast<uint16_t>(count), static_cast<uint16_t>(count)};
}

void arrive_at_gate(uint64_t* gate) {
  ++collectives;
  auto& state = *reinterpret_cast<GateState*>(gate);
  if (--state.missing > 0) return;
  state.missing = state.count;
  ++state.phase;
}

void arrive_at_gate_after_copies(uint64_t* gate) {
  std::vector<Copy> copies = std::move(block.current->uncommitted);
  block.current->uncommitted.clear();
  if (descending) {
    land(copies);
    arrive_at_gate(gate);
  } else {
    block.deliveries.push_back({std::move(copies), gate});
  }
}

void wait_for_gate(uint64_t* gate, uint32_t parity) {
  const auto& state = *reinterpret_cast<GateState*>(gate);
  while (state.phase % 2 == parity) wait(&state.phase, state.phase);
}

void collective(const void* operation, void* deposit, void (*work)(void** deposits)) {
  ++collectives;
  Warp& warp = *block.current->warp;
  if (warp.arrived > 0 && warp.operation != operation) {
    std::fprintf(stderr, "emulator: lanes of one warp are at different collectives\n");
    std::abort();
  }
  warp.operation = operation;
  warp.deposits[lane()] = deposit;
  if (++warp.arrived == 32) {
    work(warp.deposits);
    warp.arrived = 0;
    ++warp.generation;
  } else {
    wait(&warp.generation, warp.generation);
  }
}

void copy_async(void* to, const void* from, size_t bytes, size_t valid_bytes) {
  block.current->uncommitted.push_back({to, from, bytes, valid_bytes});
}

void commit_group() {
  Thread& self = *block.current;
  self.groups.push_back(std::move(self.uncommitted));
  self.uncommitted.clear();
}

void wait_groups(int allowed_pending) {
  auto& groups = block.current->groups;
  while (static_cast<int>(groups.size()) > allowed_pending) {
    land(groups.front());
    groups.erase(groups.begin());
  }
}

void run(dim3 grid, int threads, size_t shared_bytes, const std::function<void()>& kernel) {
  if (threads % 32 != 0 || threads > 1024 || shared_bytes > largest_shared_memory) {
    throw std::runtime_error(
        "emulator: expected whole warps, at most 1024 threads and the shared memory of a block");
  }
  make_stacks(static_cast<size_t>(threads));
  block.kernel = &kernel;
  block.shared.resize(shared_bytes + 1024);
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) {
        std::fill(block.shared.begin(), block.shared.end(), static_cast<char>(0xff));  // NaN
        block.threads.assign(static_cast<size_t>(threads), {});
        block.warps.assign(static_cast<size_t>(threads) / 32, {});
        std::fill(std::begin(block.barriers), std::end(block.barriers), Barrier{});
        block.deliveries.clear();
        block.last_warp = descending ? static_cast<int>(block.warps.size()) - 1 : 0;
        for (int t = 0; t < threads; ++t) {
          Thread& thread = block.threads[static_cast<size_t>(t)];
          thread.position = {
              {static_cast<unsigned>(t), 0, 0}, {x, y, z}, dim3(static_cast<unsigned>(threads)), grid};
          thread.warp = &block.warps[static_cast<size_t>(t) / 32];
          // The frame oryx_emulator_switch pops: six registers, then enter(); the stack is 16-byte aligned
          // before the return address.
          auto** top = reinterpret_cast<void**>(stacks + (static_cast<size_t>(t) + 1) * kStackBytes);
          *--top = nullptr;
          *--top = reinterpret_cast<void*>(&enter);
          for (int i = 0; i < 6; ++i) *--top = nullptr;
          thread.stack = top;
        }
        run_block();
      }
    }
  }
}

}  // namespace oryx::device::emulator
