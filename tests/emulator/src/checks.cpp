// What is checked of every access to memory: bounds, alignment, device, initialisation and races.
//
// Races are found by happens-before, whatever the order in which threads really ran. A segment is a
// warp's stretch between two synchronisations; a stamp is a segment and a lane. Blocks run one
// after another and segments are numbered upwards, so that a stamp tells launches, blocks and
// barriers apart: what was done in an earlier launch, before this block's last barrier, or in an
// earlier segment of this warp happens before what a thread does now; all else races with it.
#include <cstring>
#include <sstream>

#include "machine.h"

namespace cudaemu {
namespace {

constexpr uint64_t kLargestChecked = 4 << 20;  // bytes of an allocation whose races are looked for
constexpr uint64_t kMostReports = 20;          // of a launch

std::string name_of(Dim d) {
  return "(" + std::to_string(d.x) + "," + std::to_string(d.y) + "," + std::to_string(d.z) + ")";
}

template <uint32_t size>
bool all_written(const uint8_t* is_written) {
  uint8_t all = 1;
  for (uint32_t k = 0; k < size; ++k) all &= is_written[k];
  return all;
}

template <uint32_t size>
bool is_contiguous(uint32_t lanes, const uint64_t* address) {
  uint64_t different = lanes ^ kAllLanes;
  for (uint32_t lane = 0; lane < kLanes; ++lane) {
    different |= address[lane] ^ (address[0] + lane * size);
  }
  return different == 0;
}

}  // namespace

// ---- Reports

std::string Machine::where(const Warp& warp, uint32_t lane, const Instruction& i) const {
  const auto file = [&](uint32_t number) {
    const auto found = launch->module->files.find(number);
    if (found == launch->module->files.end()) return std::string("?");
    return found->second.substr(found->second.rfind('/') + 1);
  };
  std::ostringstream out;
  out << launch->function->name << " block " << name_of(block_id) << " of " << name_of(launch->grid)
      << " thread " << name_of(warp.id[lane]) << " of " << name_of(launch->block) << ", PTX line "
      << i.line << " " << (i.line ? launch->module->opcodes[i.opcode] : "exit");
  if (i.file) out << ", " << file(i.file) << ":" << i.source_line;
  if (i.outer_file) out << " in " << file(i.outer_file) << ":" << i.outer_line;
  return out.str();
}

void Machine::report(const Warp& warp, uint32_t lane, const Instruction& i,
                     const std::string& what) {
  const std::string kind = what.substr(0, what.find(':'));
  if (++seen_[{i.line, kind}] > 1 || ++reports_of_launch_ > kMostReports) return;
  reports.push_back(what + " | " + where(warp, lane, i));
}

// Reports an access that ends the launch.
bool Machine::refuse(const Warp& warp, uint32_t lane, const Instruction& i,
                     const std::string& what) {
  report(warp, lane, i, what);
  failed_ = true;
  return false;
}

// ---- Races

template <bool is_shared>
bool Machine::is_ordered(const Warp& warp, uint32_t lane, uint32_t stamp) const {
  const uint32_t segment = stamp / kLanes;
  if (segment < launch_segment_) return true;
  if (segment < block_segment_) return is_shared;  // another block of this launch
  if (segment < epoch_segment_) return true;
  if (segment_warps_[segment - block_segment_] != warp.index) return false;
  return stamp % kLanes == lane || segment < warp.segment;
}

// The conflict of an access with an earlier one of the same bytes, or null.
template <bool is_shared, uint32_t size>
const char* Machine::find_race(const Warp& warp, uint32_t lane, const Accesses& accesses,
                               uint64_t at, int kind) const {
  for (uint64_t k = at; k < at + size; ++k) {
    const auto ordered = [&](const std::vector<uint32_t>& stamps) {
      return is_ordered<is_shared>(warp, lane, stamps[k]);
    };
    const bool reads = ordered(accesses.reader) && ordered(accesses.other_reader);
    if (kind & kAtomic) {
      if (!ordered(accesses.writer)) return "an atomic after a write";
      if (!reads) return "an atomic after a read";
    } else if (kind & kWrite) {
      if (!ordered(accesses.writer)) return "a write after a write";
      if (!reads) return "a write after a read";
      if (!ordered(accesses.atomic)) return "a write after an atomic";
    } else {
      if (!ordered(accesses.writer)) return "a read after a write";
      if (!ordered(accesses.atomic)) return "a read after an atomic";
    }
  }
  return nullptr;
}

// Whether every stamp of the bytes is of an earlier launch or epoch, as almost all are. find_race()
// decides about the others.
template <bool is_shared, uint32_t bytes>
bool Machine::surely_ordered(const Accesses& accesses, uint64_t at, int kind) const {
  const uint32_t launch_stamp = (is_shared ? epoch_segment_ : launch_segment_) * kLanes;
  const uint32_t block_stamp = block_segment_ * kLanes;
  const uint32_t epoch = (epoch_segment_ - block_segment_) * kLanes;
  const auto any_unsure = [&](const std::vector<uint32_t>& stamps) {
    const uint32_t* stamp = &stamps[at];
    uint32_t any = 0;
    for (uint32_t k = 0; k < bytes; ++k) {
      any |= uint32_t{stamp[k] >= launch_stamp} & uint32_t{stamp[k] - block_stamp >= epoch};
    }
    return any != 0;
  };
  if (any_unsure(accesses.writer)) return false;
  if (!(kind & kAtomic) && any_unsure(accesses.atomic)) return false;
  const bool writes = kind & (kWrite | kAtomic);
  return !writes || !(any_unsure(accesses.reader) || any_unsure(accesses.other_reader));
}

// Records an access by one lane, or by consecutive lanes of `size` bytes each from the lane of
// `stamp` on.
template <uint32_t size, uint32_t bytes>
void record(Accesses* accesses, uint64_t at, uint32_t stamp, int kind) {
  if (kind & (kWrite | kAtomic)) {
    uint32_t* field = &(kind & kAtomic ? accesses->atomic : accesses->writer)[at];
    for (uint32_t k = 0; k < bytes; ++k) field[k] = stamp + k / size;
    return;
  }
  uint32_t* reader = &accesses->reader[at];
  uint32_t* other_reader = &accesses->other_reader[at];
  for (uint32_t k = 0; k < bytes; ++k) {
    const uint32_t mine = stamp + k / size;
    other_reader[k] = reader[k] == mine ? other_reader[k] : reader[k];
    reader[k] = mine;
  }
}

// Looks for a race and records the access.
template <bool is_shared, uint32_t size>
void Machine::check_race(const Warp& warp, uint32_t lane, const Instruction& i, Accesses* accesses,
                         uint64_t at, int kind) {
  if (kind & kVolatile) return;  // a flag that blocks wait for: a protocol, not a race
  if (!surely_ordered<is_shared, size>(*accesses, at, kind)) {
    if (const char* race = find_race<is_shared, size>(warp, lane, *accesses, at, kind)) {
      return report(warp, lane, i,
                    std::string("RACE: ") + race + " in " + (is_shared ? "shared" : "global") +
                        " memory without synchronisation");
    }
  }
  record<size, size>(accesses, at, warp.segment * kLanes + lane, kind);
}

// The same for a warp whose lanes access consecutive elements. Returns false, without effect, where
// that has to be decided lane by lane.
template <bool is_shared, uint32_t size>
bool Machine::check_races_together(const Warp& warp, Accesses* accesses, uint64_t at, int kind) {
  if (kind & kVolatile) return true;
  if (!surely_ordered<is_shared, size * kLanes>(*accesses, at, kind)) return false;
  record<size, size * kLanes>(accesses, at, warp.segment * kLanes, kind);
  return true;
}

// ---- Global memory

// Checks a full warp that accesses consecutive elements. Returns false, without effect, where
// something has to be decided lane by lane.
template <uint32_t size>
bool Machine::global_together(const Warp& warp, uint64_t address, int kind) {
  constexpr uint32_t kBytes = size * kLanes;
  Allocation* allocation = memory.find(address, kBytes);
  if (!allocation || allocation->device != launch->device || address % size != 0) return false;
  const uint64_t offset = address - allocation->base;
  uint8_t* is_written = &allocation->is_written[offset];
  if (kind & (kRead | kAtomic) && !all_written<kBytes>(is_written)) return false;
  if (check_races && allocation->size <= kLargestChecked) {
    if (allocation->accesses.writer.empty()) return false;
    if (!check_races_together<false, size>(warp, &allocation->accesses, offset, kind)) return false;
  }
  if (kind & (kWrite | kAtomic)) memset(is_written, 1, kBytes);
  return true;
}

template <uint32_t size>
bool Machine::global_of_size(const Warp& warp, const Instruction& i, uint32_t lanes,
                             const uint64_t* address, int kind) {
  if (is_contiguous<size>(lanes, address) && global_together<size>(warp, address[0], kind)) {
    return true;
  }
  Allocation* allocation = nullptr;
  for (uint32_t left = lanes; left; left &= left - 1) {
    const uint32_t lane = first_lane(left);
    const uint64_t at = address[lane];
    const auto bytes = [&] { return std::to_string(size) + " bytes at " + memory.describe(at); };
    if (at % size != 0) return refuse(warp, lane, i, "MISALIGNED: " + bytes());
    if (!allocation || at < allocation->base || at + size > allocation->base + allocation->size) {
      allocation = memory.find(at, size);
      if (!allocation) return refuse(warp, lane, i, "OUT OF BOUNDS: global memory, " + bytes());
      if (allocation->device != launch->device && allocation->device != kEveryDevice) {
        return refuse(warp, lane, i,
                      "WRONG DEVICE: a kernel on device " + std::to_string(launch->device) +
                          " accesses memory of device " + std::to_string(allocation->device) +
                          ", " + bytes());
      }
    }
    const uint64_t offset = at - allocation->base;
    uint8_t* is_written = &allocation->is_written[offset];
    if (kind & (kRead | kAtomic) && !all_written<size>(is_written)) {
      report(warp, lane, i, "UNINITIALISED: global memory, " + bytes());
    }
    if (kind & (kWrite | kAtomic)) memset(is_written, 1, size);
    if (check_races && allocation->size <= kLargestChecked) {
      if (allocation->accesses.writer.empty()) allocation->accesses.resize(allocation->size);
      check_race<false, size>(warp, lane, i, &allocation->accesses, offset, kind);
    }
  }
  return true;
}

bool Machine::global(const Warp& warp, const Instruction& i, uint32_t lanes,
                     const uint64_t* address, uint32_t size, int kind) {
  switch (size) {
    case 1: return global_of_size<1>(warp, i, lanes, address, kind);
    case 2: return global_of_size<2>(warp, i, lanes, address, kind);
    case 4: return global_of_size<4>(warp, i, lanes, address, kind);
    case 8: return global_of_size<8>(warp, i, lanes, address, kind);
    default: return global_of_size<16>(warp, i, lanes, address, kind);
  }
}

// ---- Shared memory and parameters

template <uint32_t bytes>
bool Machine::is_shared_written(uint64_t at) const {
  const uint32_t block_stamp = block_segment_ * kLanes;
  const uint32_t* writer = &shared_accesses_.writer[at];
  const uint32_t* atomic = &shared_accesses_.atomic[at];
  uint32_t unwritten = 0;
  for (uint32_t k = 0; k < bytes; ++k) {
    unwritten |= uint32_t{writer[k] < block_stamp} & uint32_t{atomic[k] < block_stamp};
  }
  return !unwritten;
}

template <uint32_t size>
bool Machine::shared_together(const Warp& warp, uint64_t address, int kind) {
  constexpr uint32_t kBytes = size * kLanes;
  if (address % size != 0 || address + kBytes > shared_.size()) return false;
  if (kind & (kRead | kAtomic) && !is_shared_written<kBytes>(address)) return false;
  return check_races_together<true, size>(warp, &shared_accesses_, address, kind);
}

template <uint32_t size>
bool Machine::shared_of_size(const Warp& warp, const Instruction& i, uint32_t lanes,
                             const uint64_t* address, int kind) {
  if (is_contiguous<size>(lanes, address) && shared_together<size>(warp, address[0], kind)) {
    return true;
  }
  for (uint32_t left = lanes; left; left &= left - 1) {
    const uint32_t lane = first_lane(left);
    const uint64_t at = address[lane];
    if (at % size != 0 || at + size > shared_.size()) {
      return refuse(warp, lane, i,
                    (at % size != 0 ? "MISALIGNED: " : "OUT OF BOUNDS: ") + std::to_string(size) +
                        " bytes of shared memory at " + std::to_string(at) + " of " +
                        std::to_string(shared_.size()));
    }
    if (kind & (kRead | kAtomic) && !is_shared_written<size>(at)) {
      report(warp, lane, i, "UNINITIALISED: shared memory at " + std::to_string(at));
    }
    check_race<true, size>(warp, lane, i, &shared_accesses_, at, kind);
  }
  return true;
}

bool Machine::shared(const Warp& warp, const Instruction& i, uint32_t lanes,
                     const uint64_t* address, uint32_t size, int kind) {
  switch (size) {
    case 1: return shared_of_size<1>(warp, i, lanes, address, kind);
    case 2: return shared_of_size<2>(warp, i, lanes, address, kind);
    case 4: return shared_of_size<4>(warp, i, lanes, address, kind);
    case 8: return shared_of_size<8>(warp, i, lanes, address, kind);
    default: return shared_of_size<16>(warp, i, lanes, address, kind);
  }
}

bool Machine::parameter(const Warp& warp, const Instruction& i, uint32_t lanes,
                        const uint64_t* address, uint32_t size) {
  for (; lanes; lanes &= lanes - 1) {
    const uint32_t lane = first_lane(lanes);
    if (address[lane] + size > launch->parameters.size()) {
      return refuse(warp, lane, i, "OUT OF BOUNDS: parameter at " + std::to_string(address[lane]));
    }
  }
  return true;
}

// A relative error below approximation_error. It is a function of the value, as on a GPU.
double Machine::approximate(double value) {
  if (approximation_error == 0) return value;
  uint64_t bits;
  memcpy(&bits, &value, sizeof(bits));
  bits = (bits ^ bits >> 31 ^ seed) * 0x9e3779b97f4a7c15ull;
  return value * (1 + approximation_error * (static_cast<double>(bits >> 11) * 0x1p-52 - 1));
}

}  // namespace cudaemu
