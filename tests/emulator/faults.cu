// Kernels with one fault each, and some without, which test_faults.py runs to see what the emulator
// reports. launch_NAME(data, elements) launches NAME in the default stream of the current device.
#include <cuda_runtime.h>

#define KERNEL(name, threads, blocks, shared_bytes)          \
  __global__ void name(int* data, int elements);             \
  extern "C" int launch_##name(int* data, int elements) {    \
    name<<<blocks, threads, shared_bytes>>>(data, elements); \
    return cudaGetLastError();                               \
  }                                                          \
  __global__ void name(int* data, int elements)

// ---- Memory

KERNEL(writes_each, 64, 1, 0) {
  if (threadIdx.x < elements) data[threadIdx.x] = threadIdx.x;
}

KERNEL(writes_past_the_end, 1, 1, 0) { data[elements] = 1; }

KERNEL(reads_before_the_start, 1, 1, 0) { data[0] = data[-1]; }

KERNEL(reads_misaligned, 1, 1, 0) {
  data[0] = *reinterpret_cast<int*>(reinterpret_cast<char*>(data) + 2);
}

KERNEL(reads_what_nobody_wrote, 1, 1, 0) { data[0] = data[1] + 1; }

KERNEL(reads_shared_that_nobody_wrote, 32, 1, 0) {
  __shared__ int values[32];
  if (threadIdx.x != 5) values[threadIdx.x] = threadIdx.x;
  __syncthreads();
  data[threadIdx.x] = values[31 - threadIdx.x];
}

KERNEL(writes_past_shared, 1, 1, 0) {
  __shared__ int values[4];
  values[elements] = 1;
  data[0] = values[0];
}

// ---- Races

KERNEL(races_in_global, 32, 1, 0) { data[0] = threadIdx.x; }

KERNEL(races_between_blocks, 1, 2, 0) { data[0] = blockIdx.x; }

KERNEL(misses_a_barrier, 64, 1, 0) {
  __shared__ int values[64];
  values[threadIdx.x] = threadIdx.x;
  data[threadIdx.x] = values[63 - threadIdx.x];
}

KERNEL(has_its_barrier, 64, 1, 0) {
  __shared__ int values[64];
  values[threadIdx.x] = threadIdx.x;
  __syncthreads();
  data[threadIdx.x] = values[63 - threadIdx.x];
}

KERNEL(misses_a_warp_barrier, 32, 1, 0) {
  __shared__ int values[32];
  values[threadIdx.x] = threadIdx.x;
  data[threadIdx.x] = values[31 - threadIdx.x];
}

KERNEL(has_its_warp_barrier, 32, 1, 0) {
  __shared__ int values[32];
  values[threadIdx.x] = threadIdx.x;
  __syncwarp();
  data[threadIdx.x] = values[31 - threadIdx.x];
}

KERNEL(adds_atomically, 64, 2, 0) { atomicAdd(data, 1); }

KERNEL(reads_what_atomics_write, 32, 1, 0) {
  atomicAdd(data, 1);
  data[1 + threadIdx.x] = *data;
}

// ---- Synchronisation

KERNEL(shuffles_an_absent_lane, 32, 1, 0) {
  if (threadIdx.x < 16) data[threadIdx.x] = __shfl_sync(0xffff, threadIdx.x, 20);
}

KERNEL(shuffles_without_a_lane, 32, 1, 0) {
  if (threadIdx.x == 3) return;
  data[threadIdx.x] = __shfl_sync(0xffffffff, threadIdx.x, 0);
}

KERNEL(shuffles_parted_lanes, 32, 1, 0) {
  // The halves arrive one after the other, at the same shuffle.
  int sum = 0;
  for (int k = 0; k < (threadIdx.x < 16 ? 3 : 30); ++k) sum += data[k & 1];
  data[threadIdx.x] = __shfl_xor_sync(0xffffffff, threadIdx.x, 16) + 0 * sum;
}

KERNEL(leaves_before_a_barrier, 64, 1, 0) {
  if (threadIdx.x == 40) return;
  __syncthreads();
  data[threadIdx.x] = 0;
}

KERNEL(waits_in_turn, 32, 8, 0) {
  // Blocks take their turns as they start, so those before this one are running or done.
  if (threadIdx.x > 0) return;
  const int turn = atomicAdd(data, 1);
  atomicAdd(data + 1 + turn, 1);
  for (int before = 0; before < turn; ++before) {
    while (atomicAdd(data + 1 + before, 0) == 0) {
    }
  }
}

KERNEL(waits_for_the_block_before, 1, 8, 0) {
  if (blockIdx.x > 0) {
    while (atomicAdd(data + blockIdx.x - 1, 0) == 0) {
    }
  }
  atomicAdd(data + blockIdx.x, 1);
}

KERNEL(waits_forever, 1, 1, 0) {
  volatile int* flag = data;
  while (*flag != elements) {
  }
}

// ---- Launches

KERNEL(has_too_many_threads, 2048, 1, 0) { data[threadIdx.x] = 0; }

KERNEL(has_too_much_shared, 32, 1, 64 << 10) { data[threadIdx.x] = 0; }
