// The devices, their memory and copies.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>

#include "runtime.h"

namespace cudaemu {
namespace {

constexpr int kMultiprocessors = 132;
constexpr size_t kTotalMemory = size_t{80} << 30;
constexpr int kL2Bytes = 50 << 20;

thread_local int device_of_thread = 0;
thread_local cudaError_t last_error = cudaSuccess;
std::map<const void*, size_t> pinned;
std::recursive_mutex mutex;

uint64_t address_of(const void* pointer) { return reinterpret_cast<uint64_t>(pointer); }

cudaError_t copy(void* to, const void* from, size_t size) {
  Lock lock;
  memmove(to, from, size);
  machine().memory.mark_written(address_of(to), size);
  return cudaSuccess;
}

// Reports a copy that leaves the allocation in which it begins.
void check_range(const void* pointer, size_t size, const char* what) {
  Lock lock;
  Memory& memory = machine().memory;
  const uint64_t address = address_of(pointer);
  if (size && memory.find(address, 1) && !memory.find(address, size)) {
    machine().reports.push_back(std::string("OUT OF BOUNDS: ") + what + " of " +
                                std::to_string(size) + " bytes at " + memory.describe(address));
  }
}

int attribute(int name) {
  switch (name) {
    case cudaDevAttrMaxThreadsPerBlock:
    case cudaDevAttrMaxBlockDimX:
    case cudaDevAttrMaxBlockDimY: return 1024;
    case cudaDevAttrMaxBlockDimZ: return 64;
    case cudaDevAttrMaxGridDimX:
    case cudaDevAttrMaxPitch: return 0x7fffffff;
    case cudaDevAttrMaxGridDimY:
    case cudaDevAttrMaxGridDimZ: return 65535;
    case cudaDevAttrMaxSharedMemoryPerBlock: return kSharedPerBlock;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: return kSharedPerMultiprocessor;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: return kSharedOptIn;
    case cudaDevAttrReservedSharedMemoryPerBlock: return kSharedReserved;
    case cudaDevAttrTotalConstantMemory:
    case cudaDevAttrMaxRegistersPerBlock:
    case cudaDevAttrMaxRegistersPerMultiprocessor: return 65536;
    case cudaDevAttrWarpSize: return kLanes;
    case cudaDevAttrMultiProcessorCount: return kMultiprocessors;
    case cudaDevAttrL2CacheSize: return kL2Bytes;
    case cudaDevAttrMaxThreadsPerMultiProcessor: return 2048;
    case cudaDevAttrMaxBlocksPerMultiprocessor: return 32;
    case cudaDevAttrComputeCapabilityMajor: return 9;
    case cudaDevAttrUnifiedAddressing:
    case cudaDevAttrConcurrentKernels:
    case cudaDevAttrStreamPrioritiesSupported:
    case cudaDevAttrCanMapHostMemory:
    case cudaDevAttrMemoryPoolsSupported: return 1;
    default: return 0;
  }
}

}  // namespace

Machine& machine() {
  static Machine* instance = new Machine;
  return *instance;
}

Lock::Lock() { mutex.lock(); }
Lock::~Lock() { mutex.unlock(); }

int current_device() { return device_of_thread; }

cudaError_t fail(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}

}  // namespace cudaemu

using namespace cudaemu;

extern "C" {

// ---- Errors

cudaError_t cudaGetLastError() {
  const cudaError_t error = last_error;
  last_error = cudaSuccess;
  return error;
}
cudaError_t cudaPeekAtLastError() { return last_error; }
const char* cudaGetErrorString(cudaError_t error) {
  static thread_local char text[64];
  snprintf(text, sizeof(text), "CUDA error %d (cudaemu)", static_cast<int>(error));
  return text;
}
const char* cudaGetErrorName(cudaError_t error) { return cudaGetErrorString(error); }

// ---- Devices

cudaError_t cudaGetDeviceCount(int* count) { return *count = kDevices, cudaSuccess; }
cudaError_t cudaGetDevice(int* device) { return *device = device_of_thread, cudaSuccess; }
cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= kDevices) return fail(cudaErrorInvalidDevice);
  device_of_thread = device;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr name, int) {
  return *value = attribute(name), cudaSuccess;
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* p, int) {
  memset(p, 0, sizeof(*p));
  strcpy(p->name, "cudaemu sm_90");
  p->totalGlobalMem = kTotalMemory;
  p->sharedMemPerBlock = kSharedPerBlock, p->sharedMemPerBlockOptin = kSharedOptIn;
  p->sharedMemPerMultiprocessor = kSharedPerMultiprocessor;
  p->reservedSharedMemPerBlock = kSharedReserved;
  p->regsPerBlock = p->regsPerMultiprocessor = 65536;
  p->warpSize = kLanes, p->maxThreadsPerBlock = 1024, p->maxThreadsPerMultiProcessor = 2048;
  p->maxBlocksPerMultiProcessor = 32;
  p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024, p->maxThreadsDim[2] = 64;
  p->maxGridSize[0] = 0x7fffffff, p->maxGridSize[1] = p->maxGridSize[2] = 65535;
  p->totalConstMem = 65536, p->major = 9, p->multiProcessorCount = kMultiprocessors;
  p->l2CacheSize = kL2Bytes, p->memoryBusWidth = 5120;
  p->unifiedAddressing = p->canMapHostMemory = p->concurrentKernels = 1;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetPCIBusId(char* id, int size, int device) {
  return snprintf(id, size, "0000:%02d:00.0", device), cudaSuccess;
}
cudaError_t cudaDeviceCanAccessPeer(int* can, int, int) { return *can = 0, cudaSuccess; }
cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  return *least = 0, *greatest = -5, cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int* version) { return *version = 13000, cudaSuccess; }
cudaError_t cudaRuntimeGetVersion(int* version) { return *version = 13000, cudaSuccess; }
// PyTorch looks driver functions up when it starts: they are there and do nothing.
cudaError_t cudaGetDriverEntryPointByVersion(const char*, void** function, unsigned,
                                             unsigned long long,
                                             cudaDriverEntryPointQueryResult* status) {
  *function = reinterpret_cast<void*>(+[] { return 0; });
  if (status) *status = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}

// ---- Memory

cudaError_t cudaMalloc(void** pointer, size_t size) {
  Lock lock;
  if (const cudaError_t error = check_not_capturing()) return error;
  *pointer = size ? machine().memory.allocate(size, current_device()) : nullptr;
  return size == 0 || *pointer ? cudaSuccess : fail(cudaErrorMemoryAllocation);
}
cudaError_t cudaFree(void* pointer) {
  Lock lock;
  if (!pointer || machine().memory.release(pointer)) return cudaSuccess;
  return fail(cudaErrorInvalidValue);
}
cudaError_t cudaMallocAsync(void** pointer, size_t size, cudaStream_t) {
  return cudaMalloc(pointer, size);
}
cudaError_t cudaFreeAsync(void* pointer, cudaStream_t) { return cudaFree(pointer); }
cudaError_t cudaMemGetInfo(size_t* available, size_t* total) {
  Lock lock;
  *total = kTotalMemory;
  *available = kTotalMemory - machine().memory.live_bytes(current_device());
  return cudaSuccess;
}
cudaError_t cudaHostAlloc(void** pointer, size_t size, unsigned) {
  Lock lock;
  *pointer = malloc(size);
  pinned[*pointer] = size;
  return cudaSuccess;
}
cudaError_t cudaFreeHost(void* pointer) {
  Lock lock;
  return pinned.erase(pointer), free(pointer), cudaSuccess;
}
cudaError_t cudaHostRegister(void*, size_t, unsigned) { return cudaSuccess; }
cudaError_t cudaHostUnregister(void*) { return cudaSuccess; }
cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* out, const void* pointer) {
  Lock lock;
  memset(out, 0, sizeof(*out));
  if (const Allocation* allocation = machine().memory.find(address_of(pointer), 1)) {
    out->type = cudaMemoryTypeDevice;
    out->device = allocation->device;
    out->devicePointer = const_cast<void*>(pointer);
    return cudaSuccess;
  }
  const auto after = pinned.upper_bound(pointer);
  const bool is_pinned =
      after != pinned.begin() &&
      address_of(pointer) < address_of(std::prev(after)->first) + std::prev(after)->second;
  out->type = is_pinned ? cudaMemoryTypeHost : cudaMemoryTypeUnregistered;
  return cudaSuccess;
}

// ---- Copies

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t size, cudaMemcpyKind,
                            cudaStream_t stream) {
  check_range(to, size, "a copy"), check_range(from, size, "a copy");
  return enqueue(stream, [=] { return copy(to, from, size); });
}
cudaError_t cudaMemcpy(void* to, const void* from, size_t size, cudaMemcpyKind) {
  check_range(to, size, "a copy"), check_range(from, size, "a copy");
  return fail(copy(to, from, size));
}
cudaError_t cudaMemcpy2DAsync(void* to, size_t to_pitch, const void* from, size_t from_pitch,
                              size_t width, size_t height, cudaMemcpyKind, cudaStream_t stream) {
  return enqueue(stream, [=] {
    for (size_t row = 0; row < height; ++row) {
      copy(static_cast<char*>(to) + row * to_pitch,
           static_cast<const char*>(from) + row * from_pitch, width);
    }
    return cudaSuccess;
  });
}
cudaError_t cudaMemsetAsync(void* to, int value, size_t size, cudaStream_t stream) {
  check_range(to, size, "a memset");
  return enqueue(stream, [=] {
    Lock lock;
    memset(to, value, size);
    machine().memory.mark_written(address_of(to), size);
    return cudaSuccess;
  });
}
cudaError_t cudaMemset(void* to, int value, size_t size) {
  return cudaMemsetAsync(to, value, size, nullptr);
}

}  // extern "C"
