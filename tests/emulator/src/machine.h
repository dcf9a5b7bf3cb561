// Runs a launch, warp by warp, and looks for what a GPU would punish or, worse, let pass.
#pragma once

#include <cstdint>
#include <random>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "memory.h"
#include "ptx.h"

namespace cudaemu {

struct Dim {
  uint32_t x = 1, y = 1, z = 1;
};

struct Launch {
  Function* function;
  const Module* module;
  Dim grid, block;
  int device = 0;
  uint32_t dynamic_shared = 0;
  std::vector<uint8_t> parameters;
};

// Calls f(lane) for the lanes of a mask. Lanes do not depend on each other, which lets the compiler
// carry a full warp out with vector instructions.
template <class F>
inline void each_lane(uint32_t lanes, F f) {
  if (lanes == kAllLanes) {
#pragma GCC ivdep
    for (uint32_t lane = 0; lane < kLanes; ++lane) f(lane);
  } else {
    for (; lanes; lanes &= lanes - 1) f(__builtin_ctz(lanes));
  }
}

inline uint32_t first_lane(uint32_t lanes) { return __builtin_ctz(lanes); }

// An operand of an instruction as values of type T, by lane.
template <class T>
struct Source {
  const uint64_t* at;
  T operator[](uint32_t lane) const {
    T value;
    __builtin_memcpy(&value, at + lane, sizeof(T));
    return value;
  }
};

// A destination, by lane. Narrow values are extended to the 64 bits of a slot.
template <class T>
struct Result {
  uint64_t* at;
  void set(uint32_t lane, T value) const {
    if constexpr (std::is_integral_v<T>) {
      at[lane] = static_cast<uint64_t>(static_cast<int64_t>(value));
    } else if constexpr (sizeof(T) == 4) {
      uint32_t bits;
      __builtin_memcpy(&bits, &value, sizeof(T));
      at[lane] = bits;
    } else {
      __builtin_memcpy(at + lane, &value, sizeof(T));
    }
  }
};

struct Warp {
  uint64_t* base[2];                           // registers and constants, [slot][lane]
  uint32_t index = 0;                          // in the block
  uint32_t lanes = 0;                          // that the block has
  uint32_t exited = 0;                         // of those
  uint32_t at_collective = 0, at_barrier = 0;  // lanes that wait there
  uint32_t segment = 0;  // number of the present stretch between synchronisations
  uint32_t pc[kLanes];
  uint32_t mask[kLanes];  // of the collective that the lane waits at
  Dim id[kLanes];         // threadIdx

  uint32_t runnable() const { return lanes & ~(exited | at_collective | at_barrier); }

  template <class T>
  Source<T> source(const Operand& o) const {
    return {base[o.is_constant] + size_t{o.index} * kLanes};
  }
  template <class T>
  Result<T> result(const Operand& o) const {
    return {base[0] + size_t{o.index} * kLanes};
  }
  template <class T>
  T get(const Operand& o, uint32_t lane) const {
    return source<T>(o)[lane];
  }
  template <class T>
  void set(const Operand& o, uint32_t lane, T value) {
    result<T>(o).set(lane, value);
  }
};

enum AccessKind { kRead = 1, kWrite = 2, kAtomic = 4, kVolatile = 8 };

struct Machine {
  Memory memory;
  uint64_t seed = 0;               // 0: warps in order, none interrupted; else a random order
  double approximation_error = 0;  // relative, of the .approx instructions: any error up to this
  bool check_races = true;
  uint64_t most_instructions = 4'000'000'000;  // of a block, before it counts as hanging
  std::vector<std::string> reports;
  uint64_t executed = 0;  // instructions, counted once a thread

  // Returns false where a thread could not go on.
  bool run(const Launch& launch);

  // For handlers. `address` is by lane; false where a lane may not access it.
  bool global(const Warp& warp, const Instruction& i, uint32_t lanes, const uint64_t* address,
              uint32_t size, int kind);
  bool shared(const Warp& warp, const Instruction& i, uint32_t lanes, const uint64_t* address,
              uint32_t size, int kind);
  bool parameter(const Warp& warp, const Instruction& i, uint32_t lanes, const uint64_t* address,
                 uint32_t size);
  uint8_t* shared_bytes() { return shared_.data(); }
  Step collective(Warp& warp, const Instruction& i, uint32_t lanes);
  void report(const Warp& warp, uint32_t lane, const Instruction& i, const std::string& what);
  double approximate(double value);
  const Launch* launch = nullptr;
  Dim block_id;

 private:
  void start_block(uint64_t linear);
  bool run_block(uint64_t linear);
  bool run_in_order(uint64_t limit);
  bool run_shuffled();
  void run_warp(Warp& warp, uint64_t limit);
  void run_lanes(Warp& warp, uint32_t lanes, uint32_t others, uint64_t budget);
  void try_collectives(Warp& warp);
  uint32_t checked_mask(const Warp& warp, uint32_t lane, const Instruction& i);
  void collective_operation(Warp& warp, const Instruction& i, uint32_t mask);
  void vote(Warp& warp, const Instruction& i, uint32_t mask);
  void shuffle(Warp& warp, const Instruction& i, uint32_t mask);
  bool try_barrier();
  void new_segment(Warp& warp);
  template <bool is_shared>
  bool is_ordered(const Warp& warp, uint32_t lane, uint32_t stamp) const;
  template <bool is_shared, uint32_t size>
  void check_race(const Warp& warp, uint32_t lane, const Instruction& i, Accesses* accesses,
                  uint64_t at, int kind);
  template <bool is_shared, uint32_t bytes>
  bool surely_ordered(const Accesses& accesses, uint64_t at, int kind) const;
  template <bool is_shared, uint32_t size>
  bool check_races_together(const Warp& warp, Accesses* accesses, uint64_t at, int kind);
  template <uint32_t size>
  bool global_together(const Warp& warp, uint64_t address, int kind);
  template <uint32_t size>
  bool shared_together(const Warp& warp, uint64_t address, int kind);
  template <uint32_t bytes>
  bool is_shared_written(uint64_t at) const;
  template <bool is_shared, uint32_t size>
  const char* find_race(const Warp& warp, uint32_t lane, const Accesses& accesses, uint64_t at,
                        int kind) const;
  template <uint32_t size>
  bool global_of_size(const Warp& warp, const Instruction& i, uint32_t lanes,
                      const uint64_t* address, int kind);
  template <uint32_t size>
  bool shared_of_size(const Warp& warp, const Instruction& i, uint32_t lanes,
                      const uint64_t* address, int kind);
  bool refuse(const Warp& warp, uint32_t lane, const Instruction& i, const std::string& what);
  std::string where(const Warp& warp, uint32_t lane, const Instruction& i) const;

  std::vector<uint64_t> register_file_;  // [warp][slot][lane]
  std::vector<Warp> warps_;
  std::vector<uint8_t> shared_;
  Accesses shared_accesses_;
  std::vector<uint16_t> segment_warps_;  // of the block's segments
  uint32_t next_segment_ = 1;
  // First segments of the launch, of the block and after the block's last barrier.
  uint32_t launch_segment_ = 0, block_segment_ = 0, epoch_segment_ = 0;
  uint64_t reports_of_launch_ = 0;
  std::map<std::pair<uint32_t, std::string>, int> seen_;  // (PTX line, kind of report)
  std::mt19937_64 random_;
  bool failed_ = false;
};

}  // namespace cudaemu
