// What the parts of the emulated CUDA runtime share.
//
// The library is loaded before libcudart.so.13 and presents two sm_90 devices. Everything is done
// at once, in the caller's thread, and again at every replay of a graph that it was captured into.
#pragma once

#define __CUDA_API_VERSION_INTERNAL  // declares the functions under their own names
#include <cuda_runtime_api.h>

#include <functional>
#include <map>
#include <string>

#include "machine.h"

namespace cudaemu {

constexpr int kDevices = 2;
constexpr size_t kSharedPerBlock = 48 << 10, kSharedOptIn = 227 << 10;
constexpr size_t kSharedPerMultiprocessor = 228 << 10, kSharedReserved = 1 << 10;

Machine& machine();

// Held while a thread uses the machine or the tables of handles: several threads may launch at
// once. Not held while Python is called, which waits for its own lock.
struct Lock {
  Lock();
  ~Lock();
};

// Of the calling thread.
int current_device();
// Remembers an error for cudaGetLastError and returns it.
cudaError_t fail(cudaError_t error);

using Work = std::function<cudaError_t()>;
cudaError_t enqueue(cudaStream_t stream, Work work);
// The current device for a default stream.
int device_of(cudaStream_t stream);
bool is_capturing(cudaStream_t stream);
// cudaErrorStreamCaptureUnsupported while a capture forbids calls that wait for the device.
cudaError_t check_not_capturing();

// Makes the kernels of one more PTX file known.
void load_ptx(const std::string& file);
// Kernels that ran and how often, since the process began.
const std::map<std::string, uint64_t>& launches();
// Calls f for every function that has been parsed.
void each_function(const std::function<void(const Module&, Function&)>& f);

}  // namespace cudaemu
