// Finds data races in kernels that run under simt.h: two accesses to one byte of a Buffer or of
// shared memory, at least one of them a plain write or both not atomic, with no barrier between
// them.
//
// The tests are compiled with -fsanitize=thread, so the compiler calls __tsan_read4 and its like at
// every memory access; they are linked without libtsan, and this file, compiled without that
// option, answers those calls. libtsan itself would need a helper thread's state for every fiber
// and an address-space layout that many kernels and containers refuse.
//
// What orders two accesses is what CUDA documents: __syncthreads within a block, __syncwarp within
// its lanes. Shuffles and votes exchange registers and order no memory. Nothing orders two blocks,
// except the hand-over "write, __threadfence, atomic" to a block that reads after an atomic on that
// address. Calls to memcpy that the compiler does not expand are not seen.
#include "simt.h"

#include <dlfcn.h>

#include <map>
#include <set>

namespace {

struct Access {
  uint32_t block = 0;   // number + 1; 0: none yet
  uint32_t phase = 0;   // barriers the block had passed
  uint32_t thread = 0;  // rank in the block
  uint32_t clock = 0;   // the thread's own count of __syncwarp
  bool atomic = false;
  void* place = nullptr;
};

struct Cell {
  Access write;
  // Two readers suffice: a third matters only to a writer that is ordered after both of these.
  Access reads[2];
};

struct Range {
  const char* begin;
  const char* end;
  std::string name;
  std::vector<Cell> cells;
};

struct Thread {
  uint32_t seen[simt::race::kWarpSize] =
      {};  // the lanes' clocks as of the last __syncwarp with each
  bool fenced = false;
};

std::vector<Range> ranges;
std::vector<Thread> threads;
uint32_t block = 0, phase = 0;
int running = -1;
std::string first_finding;
std::map<const void*, std::set<uint32_t>> handed_over;  // atomic's address -> blocks that released
std::set<uint32_t> received;                            // blocks that the running one acquired

constexpr int kWarpSize = simt::race::kWarpSize;

uint32_t& own_clock() { return threads[running].seen[running % kWarpSize]; }

// Whether what `access` did is visible to the running thread.
bool ordered(const Access& access) {
  if (access.block == 0) return true;
  if (access.block != block) return received.count(access.block) != 0;
  if (access.phase != phase || int(access.thread) == running) return true;
  return int(access.thread) / kWarpSize == running / kWarpSize &&
         access.clock < threads[running].seen[access.thread % kWarpSize];
}

std::string describe(const Access& access) {
  Dl_info info;
  char text[256];
  dladdr(access.place, &info);
  const auto offset =
      static_cast<const char*>(access.place) - static_cast<char*>(info.dli_fbase) - 1;
  std::snprintf(text, sizeof text, "thread %u of block %u (%s+0x%zx)", access.thread,
                access.block - 1, info.dli_fname, size_t(offset));
  return text;
}

void report(const Range& range, size_t byte, const Access& before, const Access& now, bool write) {
  if (!first_finding.empty()) return;
  first_finding = "race on byte " + std::to_string(byte) + " of " + range.name + ": " +
                  describe(now) + (write ? " writes" : " reads") +
                  ", and no barrier orders it after " + describe(before) +
                  "; addr2line -Cfie turns the offsets into lines";
}

void record(const void* address, size_t bytes, bool write, bool atomic, void* place) {
  if (running < 0) return;
  const auto* first = static_cast<const char*>(address);
  for (Range& range : ranges) {
    if (first < range.begin || first >= range.end) continue;
    const Access now{block, phase, uint32_t(running), own_clock(), atomic, place};
    const size_t begin = first - range.begin;
    const size_t end = std::min(begin + bytes, range.cells.size());
    for (size_t byte = begin; byte < end; ++byte) {
      Cell& cell = range.cells[byte];
      auto conflicts = [&](const Access& before) {
        return !ordered(before) && !(before.atomic && atomic);
      };
      if (conflicts(cell.write)) report(range, byte, cell.write, now, write);
      if (write) {
        for (const Access& read : cell.reads) {
          if (conflicts(read)) report(range, byte, read, now, write);
        }
        cell.write = now;
        cell.reads[0] = cell.reads[1] = Access{};
      } else if (ordered(cell.reads[0])) {
        cell.reads[0] = now;
      } else if (ordered(cell.reads[1])) {
        cell.reads[1] = now;
      }
    }
    return;
  }
}

}  // namespace

namespace simt::race {

void begin_launch() {
  ranges.clear();
  handed_over.clear();
  first_finding.clear();
}

void watch(const void* begin, size_t bytes, const std::string& name) {
  const auto* first = static_cast<const char*>(begin);
  ranges.push_back({first, first + bytes, name, std::vector<Cell>(bytes)});
}

void begin_block(uint32_t number, size_t size, const void* shared_memory) {
  block = number + 1;
  phase = 0;
  threads.assign(size, Thread{});
  received.clear();
  for (Range& range : ranges) {
    if (range.begin == shared_memory) range.cells.assign(range.cells.size(), Cell{});
  }
}

void run_thread(int rank) { running = rank; }

void barrier() { ++phase; }

void warp_barrier(int warp, unsigned mask) {
  // Every lane moves to its next clock value, and all of them have seen what each did before.
  for (int writer = 0; writer < kWarpSize; ++writer) {
    if (!(mask >> writer & 1)) continue;
    const uint32_t next = threads[warp * kWarpSize + writer].seen[writer] + 1;
    for (int reader = 0; reader < kWarpSize; ++reader) {
      if (mask >> reader & 1) threads[warp * kWarpSize + reader].seen[writer] = next;
    }
  }
}

void fence() { threads[running].fenced = true; }

void atomic(const void* address, size_t bytes) {
  record(address, bytes, true, true, __builtin_return_address(0));
  if (running < 0) return;
  auto& released = handed_over[address];
  if (threads[running].fenced) released.insert(block);
  threads[running].fenced = false;
  received.insert(released.begin(), released.end());
}

std::string finding() { return first_finding; }

}  // namespace simt::race

// The part of the ThreadSanitizer interface that GCC calls.
extern "C" {
#define SIMT_HOOKS(bytes)                                              \
  void __tsan_read##bytes(void* address) {                             \
    record(address, bytes, false, false, __builtin_return_address(0)); \
  }                                                                    \
  void __tsan_write##bytes(void* address) {                            \
    record(address, bytes, true, false, __builtin_return_address(0));  \
  }                                                                    \
  void __tsan_unaligned_read##bytes(void* address) {                   \
    record(address, bytes, false, false, __builtin_return_address(0)); \
  }                                                                    \
  void __tsan_unaligned_write##bytes(void* address) {                  \
    record(address, bytes, true, false, __builtin_return_address(0));  \
  }
SIMT_HOOKS(1)
SIMT_HOOKS(2)
SIMT_HOOKS(4)
SIMT_HOOKS(8)
SIMT_HOOKS(16)
void __tsan_read_range(void* address, long bytes) {
  record(address, bytes, false, false, __builtin_return_address(0));
}
void __tsan_write_range(void* address, long bytes) {
  record(address, bytes, true, false, __builtin_return_address(0));
}
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_read(void**) {}
void __tsan_vptr_update(void**, void*) {}
// Reference counts and initialisation guards of the test program.
char __tsan_atomic8_load(const char* address, int order) { return __atomic_load_n(address, order); }
int __tsan_atomic32_fetch_add(int* address, int value, int) {
  return __atomic_fetch_add(address, value, __ATOMIC_SEQ_CST);
}
int __tsan_atomic32_fetch_sub(int* address, int value, int) {
  return __atomic_fetch_sub(address, value, __ATOMIC_SEQ_CST);
}
}
