// Output tensors of the size of the logits, of which some rows may be zero.
//
// What it buys beside a general allocator: glibc and jemalloc give large tensors back to the
// system, and so fault and clear every page again in each backward. tcmalloc preloaded, or jemalloc
// told to keep its memory, are as fast as this file, but hold more. None leaves the pages of zero
// rows out.
#pragma once

#include <cstring>
#include <mutex>
#include <utility>
#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

#include "../ops/checks.h"

namespace entropy_rl::cpu {

// Memory from the system, which begins at a page. Null if the system has no such call or no memory.
struct Mapping {
  void* memory = nullptr;
  size_t bytes = 0;

  static Mapping fresh([[maybe_unused]] size_t bytes) {
#if defined(__linux__)
    void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory != MAP_FAILED) return {memory, bytes};
#endif
    return {};
  }
  void unmap() const {
#if defined(__linux__)
    if (memory) munmap(memory, bytes);
#endif
  }
  // Lets the system take the pages when it needs memory; their content may be lost. A write before
  // that finds them in place. False if the system does not offer this.
  bool release_pages() const {
#if defined(MADV_FREE)
    return madvise(memory, bytes, MADV_FREE) == 0;
#else
    return false;
#endif
  }
};

// Keeps the last mapping that was given back for the next tensor of about its size. Training
// allocates and frees a gradient of the logits in every step, and the system's work at the first
// write to a new page takes longer than the write.
class SpareMapping {
 public:
  static Mapping take(size_t bytes) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (spare_.bytes < bytes || spare_.bytes / 2 > bytes) return {};
    return std::exchange(spare_, {});
  }
  static void give(Mapping mapping) {
    if (mapping.release_pages()) {
      const std::lock_guard<std::mutex> lock(mutex_);
      std::swap(spare_, mapping);
    }
    mapping.unmap();
  }

 private:
  static inline std::mutex mutex_;
  static inline Mapping spare_;
};

// A contiguous tensor of which each part is either set to zero or written, once.
//
// A large tensor is mapped from the system. New memory is zero and costs nothing until it is
// written, so setting a part to zero needs no work. If most of the tensor will be written, it takes
// the spare mapping or asks for huge pages. Otherwise huge pages would use memory for the zeros
// between the written parts, so it asks for the small pages of each part in one call.
class ZeroedTensor {
 public:
  ZeroedTensor(const Tensor& like, const std::vector<int64_t>& shape, bool mostly_written)
      : mostly_written_(mostly_written) {
    size_t bytes = static_cast<size_t>(like.element_size());
    for (const int64_t size : shape) bytes *= static_cast<size_t>(size);
    Mapping mapping;
    if (bytes >= kLeastMapped) {
      if (mostly_written) mapping = SpareMapping::take(bytes);
      if (!mapping.memory) {
        mapping = Mapping::fresh(bytes);
        is_zero_ = mapping.memory != nullptr;
        if (mostly_written) ask_for_huge_pages(mapping);
      }
    }
    if (!mapping.memory) {  // small, or out of memory, which torch's allocator reports
      tensor_ = new_tensor(like, shape);
      return;
    }
    std::vector<int64_t> strides(shape.size(), 1);
    for (size_t i = shape.size() - 1; i > 0; --i) strides[i - 1] = strides[i] * shape[i];
    const auto give_back = [mapping, mostly_written](void*) {
      mostly_written ? SpareMapping::give(mapping) : mapping.unmap();
    };
    tensor_ = torch::stable::from_blob(mapping.memory, shape, strides, like.device(),
                                       like.scalar_type(), give_back);
  }

  const Tensor& tensor() const { return tensor_; }

  void set_zero(void* part, size_t bytes) const {
    if (!is_zero_) memset(part, 0, bytes);
  }

  // Call it before a part is written.
  void prepare_write([[maybe_unused]] void* part, [[maybe_unused]] size_t bytes) const {
#if defined(MADV_POPULATE_WRITE)
    if (!is_zero_ || mostly_written_) return;
    const uintptr_t page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
    const uintptr_t address = reinterpret_cast<uintptr_t>(part);
    const uintptr_t begin = address & ~(page - 1);
    madvise(reinterpret_cast<void*>(begin), address + bytes - begin, MADV_POPULATE_WRITE);
#endif
  }

 private:
  // From this size on glibc's malloc also maps new memory for each tensor, and reuses none.
  static constexpr size_t kLeastMapped = size_t{32} << 20;

  // Like the madvise above only a hint, which the system may refuse.
  static void ask_for_huge_pages([[maybe_unused]] const Mapping& mapping) {
#if defined(MADV_HUGEPAGE)
    if (mapping.memory) madvise(mapping.memory, mapping.bytes, MADV_HUGEPAGE);
#endif
  }

  bool mostly_written_;
  bool is_zero_ = false;
  Tensor tensor_;
};

}  // namespace entropy_rl::cpu
