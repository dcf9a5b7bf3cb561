// Allocations with guards, looked up by address.
#include "memory.h"

#include <cstdlib>
#include <cstring>
#include <sstream>

namespace cudaemu {
namespace {

constexpr uint64_t kAlignment = 512;  // of every pointer that PyTorch's allocator returns
constexpr int kUnwritten = 0xa5;      // fills guards and new allocations

}  // namespace

void* Memory::allocate(size_t size, int device) {
  const size_t total = (size + 2 * kAlignment - 1) / kAlignment * kAlignment + kAlignment;
  char* block = static_cast<char*>(aligned_alloc(kAlignment, total));
  if (!block) return nullptr;
  memset(block, kUnwritten, total);
  auto allocation = std::make_unique<Allocation>();
  allocation->base = reinterpret_cast<uint64_t>(block + kAlignment);
  allocation->size = size;
  allocation->device = device;
  allocation->is_written.resize(size);
  live_[allocation->base] = std::move(allocation);
  return block + kAlignment;
}

bool Memory::release(void* pointer) {
  const auto found = live_.find(reinterpret_cast<uint64_t>(pointer));
  if (found == live_.end()) return false;
  for (Allocation*& recent : recent_) recent = nullptr;
  live_.erase(found);
  free(static_cast<char*>(pointer) - kAlignment);
  return true;
}

Allocation* Memory::find(uint64_t address, uint64_t size) {
  for (Allocation* recent : recent_) {
    if (recent && address >= recent->base && address + size <= recent->base + recent->size) {
      return recent;
    }
  }
  const auto after = live_.upper_bound(address);
  if (after == live_.begin()) return nullptr;
  Allocation* found = std::prev(after)->second.get();
  if (address + size > found->base + found->size) return nullptr;
  recent_[turn_++ % 4] = found;
  return found;
}

std::string Memory::describe(uint64_t address) const {
  std::ostringstream out;
  out << std::hex << "0x" << address << std::dec;
  const auto after = live_.upper_bound(address);
  if (after != live_.begin()) {
    const Allocation& below = *std::prev(after)->second;
    out << ", byte " << address - below.base << " of an allocation of " << below.size;
  }
  if (after != live_.end()) {
    out << ", " << after->first - address << " bytes before one of " << after->second->size;
  }
  return out.str();
}

void Memory::mark_written(uint64_t address, uint64_t size) {
  if (size == 0) return;
  if (Allocation* found = find(address, size)) {
    memset(&found->is_written[address - found->base], 1, size);
  }
}

void Memory::clear_accesses() {
  for (auto& [base, allocation] : live_) allocation->accesses.clear();
}

uint64_t Memory::live_bytes(int device) const {
  uint64_t sum = 0;
  for (const auto& [base, allocation] : live_) {
    if (allocation->device == device) sum += allocation->size;
  }
  return sum;
}

}  // namespace cudaemu
