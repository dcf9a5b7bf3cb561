// Modules, their kernels and launches. The PTX of a library that is loaded is read from the files
// that the environment variable CUDAEMU_PTX names (`cuobjdump --extract-ptx`), because that in the
// library is compressed. Kernels without PTX there, such as PyTorch's own, end with
// cudaErrorNoKernelImageForDevice.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <set>
#include <sstream>
#include <unordered_map>

#include "runtime.h"

namespace cudaemu {
namespace {

struct Kernel {
  std::string name;
  size_t dynamic_shared_limit[kDevices];
};

std::unordered_map<const void*, Kernel*> kernels_by_host;
std::set<const void*> kernels;
std::map<std::string, uint64_t> launch_counts;
thread_local std::vector<std::tuple<dim3, dim3, size_t, cudaStream_t>> configurations;

// ---- Modules

struct Modules {
  std::vector<std::unique_ptr<Module>> all;
  std::unordered_map<std::string, Module*> by_kernel;

  Modules() {
    const char* folder = getenv("CUDAEMU_PTX");
    if (!folder) return;
    for (const auto& file : std::filesystem::directory_iterator(folder)) {
      if (file.path().extension() == ".ptx") load(file.path());
    }
  }
  void load(const std::string& file) {
    std::ostringstream text;
    text << std::ifstream(file).rdbuf();
    all.push_back(parse_ptx(text.str(), &machine().memory));
    for (const auto& [name, entry] : all.back()->entries) by_kernel[name] = all.back().get();
  }
};

Modules& modules() {
  static Modules* instance = new Modules;
  return *instance;
}

Module* module_of(const Kernel& kernel) {
  const auto found = modules().by_kernel.find(kernel.name);
  return found == modules().by_kernel.end() ? nullptr : found->second;
}

Function* function_of(const Kernel& kernel) {
  Lock lock;
  try {
    Module* module = module_of(kernel);
    return module ? module->find(kernel.name) : nullptr;
  } catch (const std::exception& error) {
    fprintf(stderr, "cudaemu: %s: %s\n", kernel.name.c_str(), error.what());
    abort();
  }
}

// A handle is the address of the host's stub, or the kernel itself.
Kernel* kernel_of(const void* handle) {
  Lock lock;
  const auto found = kernels_by_host.find(handle);
  if (found != kernels_by_host.end()) return found->second;
  return kernels.count(handle) ? static_cast<Kernel*>(const_cast<void*>(handle)) : nullptr;
}

// ---- Launches

// Appends the kernels that ran to the file that CUDAEMU_LAUNCHES names, in one write: processes
// share it.
void write_launches() {
  std::string text;
  for (const auto& [name, count] : launch_counts) text += name + " " + std::to_string(count) + "\n";
  std::ofstream(getenv("CUDAEMU_LAUNCHES"), std::ios::app) << text;
}

void count_launch(const std::string& name) {
  if (launch_counts.empty() && getenv("CUDAEMU_LAUNCHES")) atexit(write_launches);
  ++launch_counts[name];
}

// Why a GPU refuses a launch; cudaSuccess where it does not.
std::pair<cudaError_t, const char*> refusal(const Kernel& kernel, const Function& function,
                                            dim3 grid, dim3 block, size_t shared,
                                            cudaStream_t stream) {
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  const bool has_blocks = grid.x > 0 && grid.x <= 0x7fffffff && grid.y > 0 && grid.y <= 65535 &&
                          grid.z > 0 && grid.z <= 65535;
  if (!has_blocks || threads == 0 || threads > 1024 || block.z > 64) {
    return {cudaErrorInvalidConfiguration, "invalid configuration"};
  }
  if (function.max_threads && threads > function.max_threads) {
    return {cudaErrorInvalidValue, "more threads than the launch bounds"};
  }
  const size_t limit = std::max(kernel.dynamic_shared_limit[current_device()], kSharedPerBlock);
  if (function.shared_bytes + shared > limit) {
    return {cudaErrorInvalidValue, "more shared memory than was asked for on this device"};
  }
  if (device_of(stream) != current_device()) {
    return {cudaErrorInvalidResourceHandle, "a stream of another device"};
  }
  return {cudaSuccess, nullptr};
}

cudaError_t launch(Kernel* kernel, dim3 grid, dim3 block, void** arguments, size_t shared,
                   cudaStream_t stream) {
  Lock lock;
  if (!kernel) return fail(cudaErrorInvalidDeviceFunction);
  Function* function = function_of(*kernel);
  if (!function) {
    static std::set<std::string> reported;
    if (reported.insert(kernel->name).second) {
      fprintf(stderr, "cudaemu: no PTX of %s\n", kernel->name.c_str());
    }
    return fail(cudaErrorNoKernelImageForDevice);
  }
  const auto [error, why] = refusal(*kernel, *function, grid, block, shared, stream);
  if (error != cudaSuccess) {
    std::ostringstream text;
    text << "LAUNCH: " << why << ": " << kernel->name << "<<<(" << grid.x << "," << grid.y << ","
         << grid.z << "), (" << block.x << "," << block.y << "," << block.z << "), " << shared
         << ">>>";
    machine().reports.push_back(text.str());
    return fail(error);
  }
  Launch what;
  what.function = function;
  what.module = module_of(*kernel);
  what.grid = {grid.x, grid.y, grid.z};
  what.block = {block.x, block.y, block.z};
  what.device = current_device();
  what.dynamic_shared = shared;
  what.parameters.resize(function->parameter_bytes);
  for (size_t k = 0; k < function->parameters.size(); ++k) {
    const Parameter parameter = function->parameters[k];
    memcpy(&what.parameters[parameter.offset], arguments[k], parameter.size);
  }
  return enqueue(stream, [what, kernel] {
    Lock lock;
    count_launch(kernel->name);
    return machine().run(what) ? cudaSuccess : cudaErrorIllegalAddress;
  });
}

}  // namespace

const std::map<std::string, uint64_t>& launches() { return launch_counts; }

void load_ptx(const std::string& file) { modules().load(file); }

void each_function(const std::function<void(const Module&, Function&)>& f) {
  for (const auto& module : modules().all) {
    for (const auto& [name, function] : module->functions) f(*module, *function);
  }
}

}  // namespace cudaemu

using namespace cudaemu;

extern "C" {

// ---- Registration: what nvcc's host code calls when a library is loaded

void** __cudaRegisterFatBinary(void* wrapper) { return static_cast<void**>(wrapper); }
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
char __cudaInitModule(void**) { return 1; }
void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, uint3*, uint3*,
                            dim3*, dim3*, int*) {
  auto* kernel = new Kernel{name, {}};
  std::fill_n(kernel->dynamic_shared_limit, kDevices, kSharedPerBlock);
  kernels_by_host[host] = kernel;
  kernels.insert(kernel);
}
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
void __cudaRegisterManagedVar(void**, void**, char*, const char*, int, size_t, int, int) {}

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void* stream) {
  configurations.emplace_back(grid, block, shared, static_cast<cudaStream_t>(stream));
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  if (configurations.empty()) return fail(cudaErrorMissingConfiguration);
  std::tie(*grid, *block, *shared, *static_cast<cudaStream_t*>(stream)) = configurations.back();
  configurations.pop_back();
  return cudaSuccess;
}

// ---- Launches

cudaError_t __cudaGetKernel(cudaKernel_t* handle, const void* host) {
  *handle = reinterpret_cast<cudaKernel_t>(kernel_of(host));
  return *handle ? cudaSuccess : fail(cudaErrorInvalidDeviceFunction);
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments,
                               size_t shared, cudaStream_t stream) {
  return launch(kernel_of(kernel), grid, block, arguments, shared, stream);
}
cudaError_t cudaLaunchKernel(const void* host, dim3 grid, dim3 block, void** arguments,
                             size_t shared, cudaStream_t stream) {
  return launch(kernel_of(host), grid, block, arguments, shared, stream);
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* c, const void* host, void** arguments) {
  return launch(kernel_of(host), c->gridDim, c->blockDim, arguments, c->dynamicSmemBytes,
                c->stream);
}

// ---- Attributes of kernels

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* out, const void* host) {
  const Kernel* kernel = kernel_of(host);
  const Function* function = kernel ? function_of(*kernel) : nullptr;
  if (!function) return fail(cudaErrorInvalidDeviceFunction);
  memset(out, 0, sizeof(*out));
  out->sharedSizeBytes = function->shared_bytes;
  out->maxThreadsPerBlock = function->max_threads ? function->max_threads : 1024;
  out->numRegs = 32;
  out->ptxVersion = out->binaryVersion = 90;
  out->maxDynamicSharedSizeBytes = kernel->dynamic_shared_limit[current_device()];
  return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void* host, cudaFuncAttribute name, int value) {
  Kernel* kernel = kernel_of(host);
  if (!kernel) return fail(cudaErrorInvalidDeviceFunction);
  if (name == cudaFuncAttributeMaxDynamicSharedMemorySize) {
    if (value < 0 || static_cast<size_t>(value) > kSharedOptIn) return fail(cudaErrorInvalidValue);
    kernel->dynamic_shared_limit[current_device()] = value;
  }
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void* host,
                                                                   int threads, size_t shared,
                                                                   unsigned) {
  const Kernel* kernel = kernel_of(host);
  const Function* function = kernel ? function_of(*kernel) : nullptr;
  if (!function) return fail(cudaErrorInvalidDeviceFunction);
  const size_t bytes = function->shared_bytes + shared + kSharedReserved;
  *blocks = static_cast<int>(std::min<size_t>(
      {32, 2048 / static_cast<size_t>(threads), kSharedPerMultiprocessor / bytes}));
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void* host,
                                                          int threads, size_t shared) {
  return cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(blocks, host, threads, shared, 0);
}

}  // extern "C"
