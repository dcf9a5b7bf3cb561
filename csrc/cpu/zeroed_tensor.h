// Output tensors that mostly stay zero.
#pragma once

#include <cstring>
#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

#include "../checks.h"

namespace entropy_rl::cpu {

// A contiguous tensor whose parts are either set to zero or written, once.
//
// A large one is mapped from the system here: such memory is zero, and takes space and time only
// where it is written, so that setting a part to zero is nothing to do. torch's allocator does not
// promise zeros, and would have to be written over. What remains is the system's work at the first
// write of each page, in small pages more than the writing itself: where most of the tensor will be
// written, huge pages are asked for; elsewhere they would take memory for the zeros between, and
// the small pages of a part are had in one call.
class ZeroedTensor {
 public:
  ZeroedTensor(const Tensor& like, const std::vector<int64_t>& shape, bool mostly_written)
      : mostly_written_(mostly_written) {
    size_t bytes = static_cast<size_t>(like.element_size());
    for (const int64_t size : shape) bytes *= static_cast<size_t>(size);
    void* memory = bytes >= kLeastMapped ? map(bytes, mostly_written) : nullptr;
    is_mapped_ = memory != nullptr;
    if (!is_mapped_) {
      tensor_ = torch::stable::new_empty(like, shape);
      return;
    }
    std::vector<int64_t> strides(shape.size(), 1);
    for (size_t i = shape.size() - 1; i > 0; --i) strides[i - 1] = strides[i] * shape[i];
    tensor_ = torch::stable::from_blob(memory, shape, strides, like.device(), like.scalar_type(),
                                       [bytes](void* data) { unmap(data, bytes); });
  }

  const Tensor& tensor() const { return tensor_; }

  void set_zero(void* part, size_t bytes) const {
    if (!is_mapped_) memset(part, 0, bytes);
  }

  // To be called before a part is written.
  void prepare_write([[maybe_unused]] void* part, [[maybe_unused]] size_t bytes) const {
#if defined(MADV_POPULATE_WRITE)
    if (!is_mapped_ || mostly_written_) return;
    const uintptr_t page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
    const uintptr_t address = reinterpret_cast<uintptr_t>(part);
    const uintptr_t begin = address & ~(page - 1);
    madvise(reinterpret_cast<void*>(begin), address + bytes - begin, MADV_POPULATE_WRITE);
#endif
  }

 private:
  // From this size on glibc's malloc, too, takes memory fresh from the system for each tensor, and
  // recycles none.
  static constexpr size_t kLeastMapped = size_t{32} << 20;

  // Null where the system has no such call or no memory: torch's allocator then tells the user.
  // Both hints, this one and the other above, may be refused without harm.
  static void* map([[maybe_unused]] size_t bytes, [[maybe_unused]] bool huge_pages) {
#if defined(__linux__)
    void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) return nullptr;
    if (huge_pages) madvise(memory, bytes, MADV_HUGEPAGE);
    return memory;
#else
    return nullptr;
#endif
  }
  static void unmap([[maybe_unused]] void* memory, [[maybe_unused]] size_t bytes) {
#if defined(__linux__)
    munmap(memory, bytes);
#endif
  }

  bool mostly_written_;
  bool is_mapped_;
  Tensor tensor_;
};

}  // namespace entropy_rl::cpu
