// The global memory of the emulated devices: host memory in which every allocation is known to the
// byte, with what the checks need to know of each byte.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

namespace cudaemu {

// Who accessed a byte last, as stamps (segment * 32 + lane; see races.cpp). One array a field, so
// that the compiler can check the bytes of an access together.
struct Accesses {
  std::vector<uint32_t> writer, reader, other_reader, atomic;  // by byte

  void resize(size_t bytes) {
    for (auto* field : {&writer, &reader, &other_reader, &atomic}) field->resize(bytes);
  }
  void clear() {
    for (auto* field : {&writer, &reader, &other_reader, &atomic}) field->clear();
  }
};

constexpr int kEveryDevice = -1;  // variables of a module

struct Allocation {
  uint64_t base;
  uint64_t size;
  int device;
  std::vector<uint8_t> is_written;  // by byte: 0 or 1
  Accesses accesses;                // empty before the first kernel that accesses it
};

class Memory {
 public:
  // Null where the host has no memory left.
  void* allocate(size_t size, int device);
  bool release(void* pointer);
  // The allocation that holds [address, address + size), or null.
  Allocation* find(uint64_t address, uint64_t size);
  // Where an address lies relative to its neighbours, for messages.
  std::string describe(uint64_t address) const;
  void mark_written(uint64_t address, uint64_t size);
  // Forgets every stamp of every allocation.
  void clear_accesses();
  uint64_t live_bytes(int device) const;

 private:
  std::map<uint64_t, std::unique_ptr<Allocation>> live_;
  Allocation* recent_[4] = {};  // a cache of find()
  unsigned turn_ = 0;
};

}  // namespace cudaemu
