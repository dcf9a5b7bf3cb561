// Shuffles, votes and barriers: who has to come, who has come, and what each then gets.
#include <algorithm>

#include "machine.h"

namespace cudaemu {

// The lane that a shuffle reads, and whether there is one.
struct ShuffleSource {
  int lane;
  bool found;
};

static ShuffleSource shuffle_source(int mode, uint32_t lane, uint32_t b, uint32_t c) {
  const uint32_t segment = c >> 8 & 31, clamp = c & 31;
  const int least = lane & segment;
  const int most = least | (clamp & ~segment & 31);
  const int from = mode == kShuffleUp     ? static_cast<int>(lane) - static_cast<int>(b)
                   : mode == kShuffleDown ? static_cast<int>(lane + b)
                   : mode == kShuffleBfly ? static_cast<int>(lane ^ b)
                                          : static_cast<int>(least | (b & ~segment & 31));
  return {from, mode == kShuffleUp ? from >= most : from <= most};
}

void Machine::shuffle(Warp& warp, const Instruction& i, uint32_t mask) {
  uint32_t values[kLanes] = {}, results[kLanes];
  bool found[kLanes];
  each_lane(mask, [&](uint32_t lane) { values[lane] = warp.get<uint32_t>(i.from[0], lane); });
  for (uint32_t left = mask; left; left &= left - 1) {
    const uint32_t lane = first_lane(left);
    const ShuffleSource source =
        shuffle_source(i.mode, lane, warp.get<uint32_t>(i.from[1], lane) & 31,
                       warp.get<uint32_t>(i.from[2], lane));
    found[lane] = source.found;
    const uint32_t from = source.found ? source.lane : lane;
    if (!(mask >> from & 1)) {
      report(warp, lane, i,
             "COLLECTIVE: a shuffle reads lane " + std::to_string(from) + ", which takes no part");
    }
    results[lane] = values[mask >> from & 1 ? from : lane];
  }
  each_lane(mask, [&](uint32_t lane) {
    if (i.to[0].index) warp.set<uint32_t>(i.to[0], lane, results[lane]);
    if (i.to[1].index) warp.set<uint8_t>(i.to[1], lane, found[lane]);
  });
}

void Machine::vote(Warp& warp, const Instruction& i, uint32_t mask) {
  uint32_t ballot = 0;
  for (uint32_t left = mask; left; left &= left - 1) {
    const uint32_t lane = first_lane(left);
    ballot |= static_cast<uint32_t>(warp.get<uint8_t>(i.from[0], lane) & 1) << lane;
  }
  each_lane(mask, [&](uint32_t lane) {
    if (i.mode == kBallot) {
      warp.set<uint32_t>(i.to[0], lane, ballot);
    } else {
      warp.set<uint8_t>(i.to[0], lane, i.mode == kAll ? ballot == mask : ballot != 0);
    }
  });
}

void Machine::collective_operation(Warp& warp, const Instruction& i, uint32_t mask) {
  switch (i.mode) {
    case kWarpSync: return new_segment(warp);
    case kBallot:
    case kAll:
    case kAny: return vote(warp, i, mask);
    default: return shuffle(warp, i, mask);
  }
}

// Lanes arrive at a collective. Where they are just those that each of them names, none has to
// wait.
Step Machine::collective(Warp& warp, const Instruction& i, uint32_t lanes) {
  bool complete = true;
  for (uint32_t left = lanes; left; left &= left - 1) {
    const uint32_t lane = first_lane(left);
    warp.mask[lane] = warp.get<uint32_t>(i.from[i.flags], lane);
    complete &= warp.mask[lane] == lanes;
  }
  if (complete) {
    collective_operation(warp, i, lanes);
    return kNext;
  }
  warp.at_collective |= lanes;
  return kWaits;
}

// The lanes that a waiting lane names, less those that cannot come.
uint32_t Machine::checked_mask(const Warp& warp, uint32_t lane, const Instruction& i) {
  uint32_t mask = warp.mask[lane];
  if (!(mask >> lane & 1)) report(warp, lane, i, "COLLECTIVE: a lane is not in its own mask");
  if (mask & ~warp.lanes) {
    report(warp, lane, i, "COLLECTIVE: the mask names lanes that the block does not have");
  }
  if (mask & warp.exited) {
    report(warp, lane, i, "COLLECTIVE: the mask names lanes that have exited");
  }
  return (mask | 1u << lane) & warp.lanes & ~warp.exited;
}

// Lets lanes pass whose partners have all come.
void Machine::try_collectives(Warp& warp) {
  uint32_t waiting = warp.at_collective;
  for (uint32_t left = waiting; left; left &= left - 1) {
    const uint32_t lane = first_lane(left);
    if (!(waiting >> lane & 1)) continue;
    if (warp.mask[lane] & warp.lanes & ~warp.exited & ~waiting) continue;
    const Instruction& i = launch->function->code[warp.pc[lane]];
    const uint32_t mask = checked_mask(warp, lane, i);
    bool all = true;
    for (uint32_t others = mask; others && all; others &= others - 1) {
      const uint32_t other = first_lane(others);
      all = (waiting >> other & 1) && warp.pc[other] == warp.pc[lane];
      if (all && (warp.mask[other] ^ warp.mask[lane]) & warp.lanes) {
        report(warp, lane, i, "COLLECTIVE: lanes come with different masks");
      }
    }
    if (!all) continue;
    collective_operation(warp, i, mask);
    each_lane(mask, [&](uint32_t other) { ++warp.pc[other]; });
    warp.at_collective &= ~mask;
    waiting &= ~mask;
  }
}

// Lets the block pass its barrier where every thread has come. Returns whether it has.
bool Machine::try_barrier() {
  const Warp* first = nullptr;
  uint32_t exited = 0, came = 0, count = 0;
  for (const Warp& warp : warps_) {
    exited += __builtin_popcount(warp.exited);
    came += __builtin_popcount(warp.at_barrier);
    if ((warp.exited | warp.at_barrier) != warp.lanes) return false;
    if (!first && warp.at_barrier) first = &warp;
  }
  if (!first) return false;
  const uint32_t first_waiting = first_lane(first->at_barrier);
  const uint32_t pc = first->pc[first_waiting];
  const Instruction& i = launch->function->code[pc];
  if (exited) {
    report(*first, first_waiting, i,
           "BARRIER: " + std::to_string(exited) + " threads of the block have exited");
  }
  for (const Warp& warp : warps_) {
    for (uint32_t left = warp.at_barrier; left; left &= left - 1) {
      const uint32_t lane = first_lane(left);
      if (warp.pc[lane] != pc) {
        report(warp, lane, launch->function->code[warp.pc[lane]],
               "BARRIER: threads of the block wait at different barriers");
      }
      if (i.mode != kBarrier) count += warp.get<uint8_t>(i.from[1], lane) & 1;
    }
  }
  epoch_segment_ = next_segment_;
  for (Warp& warp : warps_) {
    each_lane(warp.at_barrier, [&](uint32_t lane) {
      if (i.mode == kBarrierAnd) warp.set<uint8_t>(i.to[0], lane, count == came);
      if (i.mode == kBarrierOr) warp.set<uint8_t>(i.to[0], lane, count != 0);
      if (i.mode == kBarrierPopc) warp.set<uint32_t>(i.to[0], lane, count);
      ++warp.pc[lane];
    });
    warp.at_barrier = 0;
    new_segment(warp);
  }
  return true;
}

}  // namespace cudaemu
