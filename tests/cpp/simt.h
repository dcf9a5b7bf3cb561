// Runs the unmodified CUDA kernels of csrc/kernels/*.cuh on the CPU under g++ (compile with
// `-include simt.h`). THIS IS NOT A GPU TEST. It checks indexing, barriers and shuffles; it says
// nothing about speed, occupancy, memory coalescing, memory ordering or the rounding of fast maths.
//
// Every thread of a block is a fiber, and a fiber runs until it meets a barrier or a warp
// primitive. `launch` runs the grid several times, each time in another order of blocks and
// threads, with shared memory full of garbage at the start of each block, and compares every
// `Buffer` bit for bit: a result that depends on the order of threads is a missing barrier (or an
// atomic whose order matters). Barriers and warp primitives are strict: every named thread must
// arrive, at the same place, or `launch` throws `simt::Error` with the ids of the threads that wait
// and of those that never came. Out-of-bounds and misaligned accesses to Buffers are left to ASan
// and UBSan, which see every fiber's stack; simt_race.cpp adds a search for data races.
// `__shared__` arrays have no red zones around them.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <functional>
#include <limits>
#include <map>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include <link.h>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

// ---- The language ----

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))
// Thread-local, because the fibers share one OS thread and because the program's thread-local block
// is one contiguous range, which `shared_memory` can find.
#define __shared__ static thread_local

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// Set on every switch to the fiber that runs; a kernel only reads them.
inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;
inline constexpr int warpSize = 32;

// CUDA's vector types, with CUDA's alignment, so that UBSan reports a misaligned vector access.
#define SIMT_VECTOR_TYPES(type, name, align2, align4)              \
  struct alignas(align2) name##2 { type x, y; };                   \
  struct alignas(align4) name##4 { type x, y, z, w; };             \
  inline name##2 make_##name##2(type x, type y) { return {x, y}; } \
  inline name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }
SIMT_VECTOR_TYPES(unsigned char, uchar, 2, 4)
SIMT_VECTOR_TYPES(unsigned short, ushort, 4, 8)
SIMT_VECTOR_TYPES(int, int, 8, 16)
SIMT_VECTOR_TYPES(unsigned, uint, 8, 16)
SIMT_VECTOR_TYPES(float, float, 8, 16)
SIMT_VECTOR_TYPES(long long, longlong, 16, 16)
SIMT_VECTOR_TYPES(unsigned long long, ulonglong, 16, 16)
SIMT_VECTOR_TYPES(double, double, 16, 16)
#undef SIMT_VECTOR_TYPES

namespace simt {

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// ---- Data races ----

// What simt_race.cpp needs to know. Nothing where the program is not compiled for it.
namespace race {
constexpr int kWarpSize = warpSize;
#if defined(SIMT_RACECHECK)
void begin_launch();
void watch(const void* begin, size_t bytes, const std::string& name);
void begin_block(uint32_t number, size_t threads, const void* shared_memory);
void run_thread(int rank);  // -1: the host
void barrier();
void warp_barrier(int warp, unsigned mask);
void fence();
void atomic(const void* address, size_t bytes);
std::string finding();  // the first race since begin_launch; empty: none
#else
inline void begin_launch() {}
inline void watch(const void*, size_t, const std::string&) {}
inline void begin_block(uint32_t, size_t, const void*) {}
inline void run_thread(int) {}
inline void barrier() {}
inline void warp_barrier(int, unsigned) {}
inline void fence() {}
inline void atomic(const void*, size_t) {}
inline std::string finding() { return ""; }
#endif
}  // namespace race

// ---- Device memory ----

class Memory {
 public:
  explicit Memory(size_t bytes) : bytes_(bytes), storage_(new (kAlign) char[bytes]) {
    // Unwritten results must not look right: 0xff is NaN as a float and -1 as an integer.
    std::memset(storage_, 0xff, bytes);
    all().push_back(this);
  }
  ~Memory() {
    all().erase(std::find(all().begin(), all().end(), this));
    operator delete[](storage_, kAlign);
  }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;

  bool contains(const void* pointer) const {
    auto* address = static_cast<const char*>(pointer);
    // One past the end belongs to the buffer, too, because an empty tensor's pointer is there.
    return address >= storage_ && address <= storage_ + bytes_;
  }
  std::vector<char> contents() const { return {storage_, storage_ + bytes_}; }
  void restore(const std::vector<char>& contents) {
    std::copy(contents.begin(), contents.end(), storage_);
  }

  void watch(const std::string& name) const { race::watch(storage_, bytes_, name); }

  static std::vector<Memory*>& all() {
    static std::vector<Memory*> memories;
    return memories;
  }

 protected:
  static constexpr std::align_val_t kAlign{256};  // what cudaMalloc guarantees
  size_t bytes_;
  char* storage_;
};

// An array in "device memory". After each order, `launch` compares every Buffer that exists.
template <class T>
class Buffer : public Memory {
 public:
  explicit Buffer(size_t size) : Memory(size * sizeof(T)) {}
  explicit Buffer(const std::vector<T>& values) : Buffer(values.size()) {
    std::copy(values.begin(), values.end(), data());
  }
  T* data() { return reinterpret_cast<T*>(storage_); }
  size_t size() const { return bytes_ / sizeof(T); }
  T& operator[](size_t i) { return data()[i]; }
  T* begin() { return data(); }
  T* end() { return data() + size(); }
};

// ---- Fibers ----

// A line of a kernel's source.
struct Place {
  const char* file;
  int line;

  static constexpr Place caller(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return {file, line};
  }
};

// Where a thread waits. Threads meet if all members are equal.
struct Site {
  const char* op;
  Place place;
  unsigned mask;  // lanes of the warp; 0: all threads of the block

  bool operator==(const Site& other) const {
    // Literals are mostly at one address, and libasan checks every byte that strcmp reads.
    const auto same = [](const char* a, const char* b) { return a == b || std::strcmp(a, b) == 0; };
    return place.line == other.place.line && mask == other.mask && same(op, other.op) &&
           same(place.file, other.place.file);
  }
};

enum class Order { kForward, kReverse, kShuffled };

inline std::string to_string(const uint3& id) {
  return "(" + std::to_string(id.x) + "," + std::to_string(id.y) + "," + std::to_string(id.z) + ")";
}

// A block of threads, one fiber each, from its first instruction to the end of its last thread.
class Block {
 public:
  Block(uint3 index, dim3 shape, Order order, std::mt19937* random,
        const std::function<void()>* body)
      : index_(index), order_(order), random_(random), body_(body) {
    fibers_.resize(size_t{shape.x} * shape.y * shape.z);
    waiting_in_warp_.resize(fibers_.size() / warpSize + 1);
    ready_.resize(fibers_.size() / 64 + 1);
    for (size_t i = 0; i < fibers_.size(); ++i) {
      const auto rank = static_cast<unsigned>(i);
      fibers_[i].id = {rank % shape.x, rank / shape.x % shape.y, rank / shape.x / shape.y};
      add_ready(static_cast<int>(i));
    }
    while (stacks().size() < fibers_.size()) stacks().emplace_back();
  }

  // Runs until every thread has returned. Throws what a thread threw, or Error on a deadlock.
  void run() {
    current() = this;
    while (ready_count_ > 0 && !failure_) {
      running_ = take_ready();
      threadIdx = fibers_[running_].id;
      blockIdx = index_;
      race::run_thread(running_);
      switch_to_fiber();
      race::run_thread(-1);
    }
    current() = nullptr;
    // A fiber that an error left inside a kernel cannot run another one.
    for (size_t i = 0; i < fibers_.size(); ++i) stacks()[i].has_fiber &= fibers_[i].done;
    if (failure_) std::rethrow_exception(failure_);
    if (done_ != fibers_.size()) throw Error(deadlock());
  }

  static Block*& current() {
    static Block* block = nullptr;
    return block;
  }

  int lane() const { return running_ % warpSize; }
  int warp() const { return running_ / warpSize; }

  // Blocks the calling thread until every thread of `site.mask` has reached the same site.
  // Afterwards `received(l)` is the value of lane l.
  void meet(const Site& site, uint64_t value) {
    Fiber& self = fibers_[running_];
    self.site = site;
    self.value = value;
    self.waiting = true;
    if (site.mask == 0) ++at_barrier_;
    ++waiting_in_warp_[warp()];
    if (complete(site)) release(site);
    switch_to_scheduler();
  }

  template <class T>
  T received(int lane) const {
    const Fiber& self = fibers_[running_];
    if (!(self.site.mask >> lane & 1)) {
      throw Error(describe(self.site) + ": thread " + to_string(self.id) + " reads lane " +
                  std::to_string(lane) + ", which is not in the mask");
    }
    T value;
    std::memcpy(&value, &self.received.of[lane], sizeof(T));
    return value;
  }

  static std::string describe(const Site& site) {
    char text[256];
    std::snprintf(text, sizeof text, "%s at %s:%d", site.op, site.place.file, site.place.line);
    std::string description = text;
    if (site.mask != 0) {
      std::snprintf(text, sizeof text, " (mask 0x%08x)", site.mask);
      description += text;
    }
    return description;
  }

 private:
  // The values of a warp. A struct is copied in place, an array by a call of libasan's slow
  // memmove.
  struct Lanes {
    uint64_t of[warpSize];
  };

  struct Fiber {
    uint3 id;
    bool waiting = false, done = false;
    Site site;
    uint64_t value = 0;
    Lanes received;
  };

  // Where __builtin_setjmp was called.
  using Jump = void* [5];

  // Several times what a kernel needs, because frames are larger under ASan.
  static constexpr size_t kStackBytes = 128 * 1024;

  // The stack of a fiber, which runs one thread of each block after another.
  struct Stack {
    std::unique_ptr<char[]> memory{new char[kStackBytes]};
    bool has_fiber = false;
    Jump place;                  // where the fiber waits
    void* fake_stack = nullptr;  // ASan's
  };

  static std::vector<Stack>& stacks() {
    static std::vector<Stack> all;
    return all;
  }
  Stack& stack() const { return stacks()[running_]; }

  // The code of a fiber.
  static void enter() {
    arrive();
    while (true) {
      current()->run_thread();
      switch_to_scheduler();
    }
  }

  void run_thread() {
    // An exception must not unwind past the first frame of a fiber: the scheduler throws it again.
    try {
      (*body_)();
    } catch (...) {
      failure_ = std::current_exception();
    }
    fibers_[running_].done = true;
    ++done_;
  }

  // Continues the running thread's fiber, or makes it.
  void switch_to_fiber() {
    Stack& to = stack();
#if defined(__SANITIZE_ADDRESS__)
    if (!to.has_fiber) {
      // A fiber abandoned by an error leaves its red zones behind.
      ASAN_UNPOISON_MEMORY_REGION(to.memory.get(), kStackBytes);
      to.fake_stack = nullptr;
    }
    void* fake_stack;
    __sanitizer_start_switch_fiber(&fake_stack, to.memory.get(), kStackBytes);
#endif
    if (to.has_fiber) {
      jump(scheduler_, to.place);
    } else {
      to.has_fiber = true;
      start_fiber(scheduler_, to.memory.get());
    }
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#endif
  }

  // When it returns, the fiber may belong to another block than before.
  static void switch_to_scheduler() {
    Block& block = *current();
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(&block.stack().fake_stack, block.scheduler_stack_,
                                   block.scheduler_stack_bytes_);
#endif
    jump(block.stack().place, block.scheduler_);
    arrive();
  }

  // What a fiber does first whenever it runs.
  static void arrive() {
#if defined(__SANITIZE_ADDRESS__)
    Block& block = *current();
    __sanitizer_finish_switch_fiber(block.stack().fake_stack, &block.scheduler_stack_,
                                    &block.scheduler_stack_bytes_);
#endif
  }

  // swapcontext would make a system call at every switch, and libasan would clear the shadow of the
  // whole stack. __builtin_setjmp and __builtin_longjmp must be in separate functions.
#define SIMT_SWITCH \
  __attribute__((noinline, no_sanitize("address"), no_sanitize("thread"), no_sanitize("undefined")))
  SIMT_SWITCH static void jump(Jump& from, Jump& to) {
    if (__builtin_setjmp(from) == 0) continue_at(to);
    asm volatile("" ::: "memory");
  }
  [[noreturn]] SIMT_SWITCH static void continue_at(Jump& place) { __builtin_longjmp(place, 1); }
  SIMT_SWITCH static void start_fiber(Jump& from, char* stack) {
    if (__builtin_setjmp(from) == 0) enter_on(stack);
    asm volatile("" ::: "memory");
  }
  [[noreturn]] SIMT_SWITCH static void enter_on(char* stack) {
    ucontext_t context;
    getcontext(&context);
    context.uc_stack.ss_sp = stack;
    context.uc_stack.ss_size = kStackBytes;
    context.uc_link = nullptr;
    makecontext(&context, &Block::enter, 0);
    setcontext(&context);
    std::abort();
  }
#undef SIMT_SWITCH

  void add_ready(int rank) {
    ready_[rank / 64] |= uint64_t{1} << rank % 64;
    ++ready_count_;
  }

  // Forward and reverse let the first or the last warp run as far ahead as the barriers allow. An
  // order in which threads take turns would not do so.
  int take_ready() {
    size_t word = 0;
    int bit;
    if (order_ == Order::kReverse) {
      word = ready_.size() - 1;
      while (ready_[word] == 0) --word;
      bit = 63 - __builtin_clzll(ready_[word]);
    } else {
      size_t skip = order_ == Order::kShuffled ? (*random_)() % ready_count_ : 0;
      while (skip >= size_t(__builtin_popcountll(ready_[word]))) {
        skip -= size_t(__builtin_popcountll(ready_[word++]));
      }
      uint64_t bits = ready_[word];
      for (; skip > 0; --skip) bits &= bits - 1;
      bit = __builtin_ctzll(bits);
    }
    ready_[word] &= ~(uint64_t{1} << bit);
    --ready_count_;
    return static_cast<int>(word) * 64 + bit;
  }

  template <class Visit>
  bool every_member(const Site& site, Visit visit) {
    const size_t first = site.mask == 0 ? 0 : size_t(warp()) * warpSize;
    const size_t last = site.mask == 0 ? fibers_.size() : first + warpSize;
    for (size_t i = first; i < last; ++i) {
      if (site.mask != 0 && !(site.mask >> (i - first) & 1)) continue;
      if (i >= fibers_.size() || !visit(static_cast<int>(i))) return false;
    }
    return true;
  }

  bool complete(const Site& site) {
    const int missing = __builtin_popcount(site.mask) - waiting_in_warp_[warp()];
    if (site.mask == 0 ? at_barrier_ != fibers_.size() : missing > 0) return false;
    return every_member(site, [&](int i) { return fibers_[i].waiting && fibers_[i].site == site; });
  }

  void release(const Site& site) {
    Lanes values{};
    every_member(site, [&](int i) {
      values.of[i % warpSize] = fibers_[i].value;
      return true;
    });
    every_member(site, [&](int i) {
      fibers_[i].received = values;
      fibers_[i].waiting = false;
      --waiting_in_warp_[i / warpSize];
      add_ready(i);
      return true;
    });
    if (site.mask == 0) {
      at_barrier_ = 0;
      race::barrier();
    } else if (std::strcmp(site.op, "__syncwarp") == 0) {
      race::warp_barrier(warp(), site.mask);
    }
  }

  // "threads 0-31 wait for __syncthreads at file:line; threads 32-63 have returned".
  std::string deadlock() const {
    std::map<std::string, std::vector<int>> groups;
    for (size_t i = 0; i < fibers_.size(); ++i) {
      const Fiber& fiber = fibers_[i];
      groups[fiber.done ? "have returned" : "wait for " + describe(fiber.site)].push_back(int(i));
    }
    std::string text = "deadlock in block " + to_string(index_);
    for (const auto& [what, ranks] : groups) {
      text += "; threads ";
      for (size_t i = 0; i < ranks.size();) {
        size_t last = i;
        while (last + 1 < ranks.size() && ranks[last + 1] == ranks[last] + 1) ++last;
        if (i > 0) text += ",";
        text += std::to_string(ranks[i]);
        if (last > i) text += "-" + std::to_string(ranks[last]);
        i = last + 1;
      }
      text += " " + what;
    }
    return text;
  }

  uint3 index_;
  Order order_;
  std::mt19937* random_;
  const std::function<void()>* body_;
  std::vector<Fiber> fibers_;
  std::vector<uint64_t> ready_;  // a bit a thread
  std::vector<int> waiting_in_warp_;
  size_t ready_count_ = 0, at_barrier_ = 0, done_ = 0;
  int running_ = 0;
  std::exception_ptr failure_;
  Jump scheduler_;  // where the scheduler waits
  const void* scheduler_stack_ = nullptr;
  size_t scheduler_stack_bytes_ = 0;
};

// ---- Launching ----

// The range that holds every `__shared__` array of the program: its thread-local variables.
inline std::pair<char*, size_t> shared_memory() {
  auto find = [](dl_phdr_info* info, size_t, void* found) {
    for (int i = 0; i < info->dlpi_phnum; ++i) {
      if (info->dlpi_phdr[i].p_type == PT_TLS && info->dlpi_tls_data != nullptr) {
        *static_cast<std::pair<char*, size_t>*>(found) = {static_cast<char*>(info->dlpi_tls_data),
                                                          info->dlpi_phdr[i].p_memsz};
      }
    }
    return 1;  // the first object is the program itself; the libraries keep their thread-locals
  };
  std::pair<char*, size_t> found{nullptr, 0};
  dl_iterate_phdr(find, &found);
  return found;
}

inline void check_shape(dim3 grid, dim3 block) {
  const bool grid_fits = grid.x >= 1 && grid.x <= 0x7fffffffu && grid.y >= 1 && grid.y <= 65535 &&
                         grid.z >= 1 && grid.z <= 65535;
  const bool block_fits = block.x >= 1 && block.y >= 1 && block.z >= 1 && block.z <= 64 &&
                          uint64_t{block.x} * block.y * block.z <= 1024;
  if (!grid_fits || !block_fits) throw Error("CUDA refuses this grid or block shape");
}

inline void run_grid(dim3 grid, dim3 block, Order order, unsigned seed,
                     const std::function<void()>& body) {
  gridDim = grid;
  blockDim = block;
  std::mt19937 random(seed);
  std::vector<uint64_t> blocks(uint64_t{grid.x} * grid.y * grid.z);
  for (uint64_t i = 0; i < blocks.size(); ++i) blocks[i] = i;
  if (order == Order::kReverse) std::reverse(blocks.begin(), blocks.end());
  if (order == Order::kShuffled) std::shuffle(blocks.begin(), blocks.end(), random);
  const auto [shared, shared_bytes] = shared_memory();
  for (uint64_t i : blocks) {
    const uint3 index = {unsigned(i % grid.x), unsigned(i / grid.x % grid.y),
                         unsigned(i / grid.x / grid.y)};
    // NaN, then large finite numbers, because a reduction that reads garbage may hide one of them.
    std::fill_n(shared, shared_bytes, order == Order::kForward ? '\xff' : '\x4b');
    race::begin_block(uint32_t(i), size_t{block.x} * block.y * block.z, shared);
    Block(index, block, order, &random, &body).run();
  }
}

// Runs `kernel<<<grid, block>>>(args...)` in every order. Every pointer argument must point into a
// Buffer, so that each order can start from the same memory. Throws Error if the kernel is wrong.
template <class... Params, class... Args>
void launch(dim3 grid, dim3 block, void (*kernel)(Params...), Args... args) {
  check_shape(grid, block);
  const std::vector<Memory*> memories = Memory::all();
  [[maybe_unused]] auto check_pointer = [&](auto arg) {
    if constexpr (std::is_pointer_v<decltype(arg)>) {
      auto holds = [&](const Memory* memory) { return memory->contains(arg); };
      if (arg != nullptr && std::none_of(memories.begin(), memories.end(), holds)) {
        throw Error("a pointer argument does not point into a simt::Buffer");
      }
    }
  };
  (check_pointer(static_cast<Params>(args)), ...);
  const std::function<void()> body = [&] { kernel(static_cast<Params>(args)...); };

  const std::pair<Order, unsigned> orders[] = {
      {Order::kForward, 0}, {Order::kReverse, 0}, {Order::kShuffled, 1}, {Order::kShuffled, 2}};
  std::vector<std::vector<char>> before, expected;
  for (const Memory* memory : memories) before.push_back(memory->contents());
  for (const auto& [order, seed] : orders) {
    for (size_t i = 0; i < memories.size(); ++i) memories[i]->restore(before[i]);
    race::begin_launch();
    for (size_t i = 0; i < memories.size(); ++i) memories[i]->watch("buffer " + std::to_string(i));
    race::watch(shared_memory().first, shared_memory().second, "shared memory");
    run_grid(grid, block, order, seed, body);
    if (!race::finding().empty()) throw Error(race::finding());
    for (size_t i = 0; i < memories.size(); ++i) {
      std::vector<char> after = memories[i]->contents();
      if (order == Order::kForward) {
        expected.push_back(std::move(after));
      } else if (after != expected[i]) {
        const auto difference =
            std::mismatch(after.begin(), after.end(), expected[i].begin()).first - after.begin();
        throw Error("byte " + std::to_string(difference) + " of buffer " + std::to_string(i) +
                    " depends on the order of threads: a barrier or an atomic is missing");
      }
    }
  }
}

// ---- Warp primitives ----

inline Site warp_site(const char* op, Place place, unsigned mask) {
  const Site site{op, place, mask};
  const Block& block = *Block::current();
  if (!(mask >> block.lane() & 1)) {
    throw Error(Block::describe(site) + ": thread " + to_string(threadIdx) +
                " is not in its own mask");
  }
  return site;
}

// The value of lane `source(lane)`; the caller's own value if that lane is outside the segment of
// `width` lanes, as CUDA defines it.
template <class T, class Source>
T shuffle(const Site& site, T value, int width, Source source) {
  static_assert(std::is_arithmetic_v<T> && sizeof(T) <= sizeof(uint64_t));
  if (width < 1 || width > warpSize || (width & (width - 1)) != 0) {
    throw Error(Block::describe(site) + ": width must be a power of two up to 32");
  }
  Block& block = *Block::current();
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  block.meet(site, bits);
  const int first = block.lane() / width * width;
  const int from = source(block.lane() - first);
  return from < 0 || from >= width ? value : block.received<T>(first + from);
}

inline unsigned vote(const Site& site, bool predicate) {
  Block& block = *Block::current();
  block.meet(site, predicate);
  unsigned ballot = 0;
  for (int lane = 0; lane < warpSize; ++lane) {
    if (site.mask >> lane & 1) ballot |= unsigned(block.received<uint64_t>(lane) != 0) << lane;
  }
  return ballot;
}

template <class T>
__attribute__((noinline, no_sanitize("thread"))) T read_modify_write(T* address, T (*update)(T, T),
                                                                     T value) {
  // Atomic, because fibers switch only at barriers and warp primitives.
  race::atomic(address, sizeof(T));
  const T old = *address;
  *address = update(old, value);
  return old;
}

template <class T, class... Allowed>
using OneOf = std::enable_if_t<(std::is_same_v<T, Allowed> || ...), T>;

}  // namespace simt

inline void __syncthreads(simt::Place place = simt::Place::caller()) {
  simt::Block::current()->meet({"__syncthreads", place, 0}, 0);
}

inline void __syncwarp(unsigned mask = 0xffffffffu, simt::Place place = simt::Place::caller()) {
  simt::Block::current()->meet(simt::warp_site("__syncwarp", place, mask), 0);
}

// `+value` has the type of CUDA's overload: bool and short are passed as int.
#define SIMT_SHUFFLE(name, argument, from)                                      \
  template <class T>                                                            \
  auto name(unsigned mask, T value, argument, int width = warpSize,             \
            simt::Place place = simt::Place::caller()) {                        \
    return simt::shuffle(simt::warp_site(#name, place, mask), +value, width,    \
                         [&]([[maybe_unused]] int lane) { return int(from); }); \
  }
SIMT_SHUFFLE(__shfl_sync, int source, (source & (width - 1)))
SIMT_SHUFFLE(__shfl_up_sync, unsigned delta, (lane - delta))
SIMT_SHUFFLE(__shfl_down_sync, unsigned delta, (lane + delta))
SIMT_SHUFFLE(__shfl_xor_sync, int lane_mask, (lane ^ lane_mask))
#undef SIMT_SHUFFLE

inline unsigned __ballot_sync(unsigned mask, int predicate,
                              simt::Place place = simt::Place::caller()) {
  return simt::vote(simt::warp_site("__ballot_sync", place, mask), predicate != 0);
}
inline int __any_sync(unsigned mask, int predicate, simt::Place place = simt::Place::caller()) {
  return simt::vote(simt::warp_site("__any_sync", place, mask), predicate != 0) != 0;
}
inline int __all_sync(unsigned mask, int predicate, simt::Place place = simt::Place::caller()) {
  return simt::vote(simt::warp_site("__all_sync", place, mask), predicate != 0) == mask;
}

inline void __threadfence() { simt::race::fence(); }

// ---- Atomics, for the types CUDA has them for ----

#define SIMT_ATOMIC(name, result, ...)                                                \
  template <class T>                                                                  \
  simt::OneOf<T, __VA_ARGS__> name(T* address, std::common_type_t<T> value) {         \
    return simt::read_modify_write<T>(                                                \
        address, [](T old, [[maybe_unused]] T value) -> T { return result; }, value); \
  }
SIMT_ATOMIC(atomicAdd, old + value, int, unsigned, unsigned long long, float, double)
SIMT_ATOMIC(atomicExch, value, int, unsigned, unsigned long long, float)
SIMT_ATOMIC(atomicMax, old < value ? value : old, int, unsigned, long long, unsigned long long)
SIMT_ATOMIC(atomicMin, value < old ? value : old, int, unsigned, long long, unsigned long long)
SIMT_ATOMIC(atomicOr, old | value, int, unsigned, unsigned long long)
SIMT_ATOMIC(atomicAnd, old& value, int, unsigned, unsigned long long)
#undef SIMT_ATOMIC

// ---- Intrinsics ----

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(unsigned(x)); }
inline int __clzll(long long x) {
  return x == 0 ? 64 : __builtin_clzll(static_cast<unsigned long long>(x));
}
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline unsigned __brev(unsigned x) {
  unsigned reversed = 0;
  for (int bit = 0; bit < 32; ++bit) reversed |= (x >> bit & 1) << (31 - bit);
  return reversed;
}

template <class T>
T __ldg(const T* pointer) {
  return *pointer;
}
template <class T>
T __ldca(const T* pointer) {
  return *pointer;
}
template <class T>
T __ldcs(const T* pointer) {
  return *pointer;
}
template <class T>
void __stcs(T* pointer, T value) {
  *pointer = value;
}
template <class T>
void __stwb(T* pointer, T value) {
  *pointer = value;
}

template <class To, class From>
To simt_bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}
inline unsigned __float_as_uint(float x) { return simt_bits<unsigned>(x); }
inline float __uint_as_float(unsigned x) { return simt_bits<float>(x); }
inline int __float_as_int(float x) { return simt_bits<int>(x); }
inline float __int_as_float(int x) { return simt_bits<float>(x); }
inline long long __double_as_longlong(double x) { return simt_bits<long long>(x); }
inline double __longlong_as_double(long long x) { return simt_bits<double>(x); }

// Fast maths, at the precision of the host's libm.
inline float __expf(float x) { return expf(x); }
inline float __exp2f(float x) { return exp2f(x); }
inline float __logf(float x) { return logf(x); }
inline float __log2f(float x) { return log2f(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline double rsqrt(double x) { return 1.0 / sqrt(x); }

// CUDA has these in the global namespace.
using std::isfinite;
using std::isinf;
using std::isnan;
using std::max;
using std::min;
