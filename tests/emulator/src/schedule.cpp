// Runs the blocks of a launch one after another, and the warps of a block in turn until each waits.
//
// The lanes of a warp that stand at the same instruction run it together. Where they have parted,
// those at the lowest address run first, and so lanes meet again behind a branch, as on a GPU. With
// a seed, every lane runs alone, in a random order and interrupted at random.
#include <algorithm>

#include "machine.h"

namespace cudaemu {
namespace {

constexpr uint64_t kBudget = 1 << 20;  // instructions of a group of lanes before others have a turn
constexpr uint32_t kPatience = 4096;   // turns before lanes at a higher address have one
constexpr uint64_t kMostShuffled = 1 << 20;  // blocks of a launch that run in a random order

uint32_t lanes_at(const Warp& warp, uint32_t lanes, uint32_t pc) {
  uint32_t found = 0;
  for (uint32_t lane = 0; lane < kLanes; ++lane) found |= uint32_t{warp.pc[lane] == pc} << lane;
  return found & lanes;
}

// The lanes of `lanes` whose guard lets them run the instruction.
uint32_t guarded_lanes(const Warp& warp, const Instruction& i, uint32_t lanes) {
  const uint64_t* guard = warp.base[0] + size_t{i.guard} * kLanes;
  uint32_t holds = 0;
  for (uint32_t lane = 0; lane < kLanes; ++lane) {
    holds |= static_cast<uint32_t>(guard[lane] & 1) << lane;
  }
  return lanes & (i.guarded == 1 ? holds : ~holds);
}

}  // namespace

void Machine::new_segment(Warp& warp) {
  warp.segment = next_segment_++;
  segment_warps_.push_back(warp.index);
}

// Runs lanes that stand at one instruction until they part, wait or meet one of the others.
void Machine::run_lanes(Warp& warp, uint32_t lanes, uint32_t others, uint64_t budget) {
  const Instruction* code = launch->function->code.data();
  uint64_t* counts = launch->function->executed.data();
  uint32_t pc = warp.pc[first_lane(lanes)];
  uint32_t meeting = UINT32_MAX;  // the next instruction at which other lanes stand
  for (uint32_t left = others; left; left &= left - 1) {
    const uint32_t other = warp.pc[first_lane(left)];
    if (other > pc) meeting = std::min(meeting, other);
  }
  const auto place = [&](uint32_t some, uint32_t at) {
    each_lane(some, [&](uint32_t lane) { warp.pc[lane] = at; });
  };
  for (; budget > 0; --budget) {
    const Instruction& i = code[pc];
    const uint32_t active = i.guarded ? guarded_lanes(warp, i, lanes) : lanes;
    if (active) {
      const uint32_t count = __builtin_popcount(active);
      counts[pc] += count;
      executed += count;
      if (!i.run) {  // a branch
        if (active != lanes) {
          place(lanes & ~active, pc + 1);
          return place(active, i.target);
        }
        pc = i.target;
        if (others) break;
        continue;
      }
      const Step step = i.run(*this, warp, i, active);
      if (step != kNext) {
        place(lanes & ~active, pc + 1);
        return place(active, pc);
      }
      if (failed_) break;
    }
    if (++pc == meeting) break;
  }
  place(lanes, pc);
}

// Runs a warp until every lane waits at a barrier or has exited.
void Machine::run_warp(Warp& warp, uint64_t limit) {
  uint32_t turn = 0;
  while (const uint32_t runnable = warp.runnable()) {
    uint32_t lowest = UINT32_MAX, highest = 0;
    for (uint32_t left = runnable; left; left &= left - 1) {
      const uint32_t pc = warp.pc[first_lane(left)];
      lowest = std::min(lowest, pc), highest = std::max(highest, pc);
    }
    // A lane that spins until one at a higher address has done something would spin forever.
    const uint32_t chosen = lanes_at(warp, runnable, ++turn % kPatience ? lowest : highest);
    run_lanes(warp, chosen, runnable & ~chosen, kBudget);
    if (failed_ || executed > limit) return;
    if (warp.at_collective) try_collectives(warp);
  }
}

// Both give every warp or lane that can run one turn, and return whether there was any.
bool Machine::run_in_order(uint64_t limit) {
  bool ran = false;
  for (Warp& warp : warps_) {
    if (!warp.runnable()) continue;
    ran = true;
    run_warp(warp, limit);
    if (failed_) break;
  }
  return ran;
}

bool Machine::run_shuffled() {
  std::vector<uint32_t> order(warps_.size() * kLanes);
  for (uint32_t k = 0; k < order.size(); ++k) order[k] = k;
  std::shuffle(order.begin(), order.end(), random_);
  bool ran = false;
  for (const uint32_t k : order) {
    Warp& warp = warps_[k / kLanes];
    const uint32_t lane = 1u << k % kLanes;
    if (!(warp.runnable() & lane)) continue;
    ran = true;
    run_lanes(warp, lane, 0, 1 + random_() % 500);
    if (failed_) break;
    if (warp.at_collective) try_collectives(warp);
  }
  return ran;
}

void Machine::start_block(uint64_t linear) {
  const Function& function = *launch->function;
  const Dim grid = launch->grid, block = launch->block;
  block_id = {static_cast<uint32_t>(linear % grid.x),
              static_cast<uint32_t>(linear / grid.x % grid.y),
              static_cast<uint32_t>(linear / grid.x / grid.y)};
  const uint32_t threads = block.x * block.y * block.z;
  warps_.assign((threads + kLanes - 1) / kLanes, {});
  register_file_.resize(warps_.size() * function.slots * kLanes);
  segment_warps_.clear();
  block_segment_ = epoch_segment_ = next_segment_;
  for (uint32_t w = 0; w < warps_.size(); ++w) {
    Warp& warp = warps_[w];
    warp.index = w;
    warp.base[0] = &register_file_[size_t{w} * function.slots * kLanes];
    warp.base[1] = const_cast<uint64_t*>(function.constants.data());
    for (uint32_t lane = 0; lane < kLanes; ++lane) {
      const uint32_t k = w * kLanes + lane;
      if (k < threads) warp.lanes |= 1u << lane;
      warp.pc[lane] = 0;
      warp.id[lane] = {k % block.x, k / block.x % block.y, k / block.x / block.y};
    }
    new_segment(warp);
  }
  const uint32_t shared_bytes = (function.shared_bytes + 15) / 16 * 16 + launch->dynamic_shared;
  shared_.assign(shared_bytes, 0xa5);
  if (shared_accesses_.writer.size() < shared_bytes) shared_accesses_.resize(shared_bytes);
}

bool Machine::run_block(uint64_t linear) {
  start_block(linear);
  const uint64_t limit = executed + most_instructions;
  while (true) {
    const bool ran = seed ? run_shuffled() : run_in_order(limit);
    if (failed_) return false;
    const auto unfinished = std::find_if(warps_.begin(), warps_.end(),
                                         [](const Warp& w) { return w.exited != w.lanes; });
    if (unfinished == warps_.end()) return true;
    if (ran ? executed < limit : try_barrier()) continue;
    const uint32_t lane = first_lane(unfinished->lanes & ~unfinished->exited);
    report(*unfinished, lane, launch->function->code[unfinished->pc[lane]],
           "HANGS: a block comes to no end");
    return false;
  }
}

bool Machine::run(const Launch& what) {
  launch = &what;
  failed_ = false;
  reports_of_launch_ = 0;
  seen_.clear();
  random_.seed(seed);
  if (next_segment_ > UINT32_MAX / kLanes / 2) {  // stamps are about to overflow
    next_segment_ = 1;
    memory.clear_accesses();
    shared_accesses_.clear();
  }
  launch_segment_ = next_segment_;
  const uint64_t blocks = uint64_t{what.grid.x} * what.grid.y * what.grid.z;
  std::vector<uint64_t> order;
  if (seed && blocks < kMostShuffled) {
    order.resize(blocks);
    for (uint64_t b = 0; b < blocks; ++b) order[b] = b;
    std::shuffle(order.begin(), order.end(), random_);
  }
  bool done = true;
  for (uint64_t b = 0; b < blocks && done; ++b) done = run_block(order.empty() ? b : order[b]);
  launch = nullptr;
  return done;
}

}  // namespace cudaemu
