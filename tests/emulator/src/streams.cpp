// Streams, events and graphs. Work is done when it is enqueued, so that nothing is ever waited for;
// what is captured is done at once as well, because PyTorch's ops look at the values.
#include <unordered_map>

#include "runtime.h"

namespace cudaemu {
namespace {

struct Graph {
  std::vector<Work> work;
};
struct Stream {
  int device;
  Graph* capture = nullptr;
  cudaStreamCaptureMode mode = cudaStreamCaptureModeGlobal;
};
struct Event {
  int device;
};

std::unordered_map<cudaStream_t, Stream> streams;
std::unordered_map<cudaEvent_t, Event> events;
unsigned long long captures = 0;  // begun
int global_captures = 0;          // under way, in the mode that forbids waiting in every thread
thread_local cudaStreamCaptureMode thread_mode = cudaStreamCaptureModeGlobal;

Graph* capture_of(cudaStream_t stream) {
  Lock lock;
  const auto found = streams.find(stream);
  return found == streams.end() ? nullptr : found->second.capture;
}

template <class T>
T new_handle() {
  static uintptr_t next = 4096;  // small numbers name the default streams
  return reinterpret_cast<T>(next++);
}

Graph* graph_of(void* handle) { return static_cast<Graph*>(handle); }

}  // namespace

cudaError_t enqueue(cudaStream_t stream, Work work) {
  const cudaError_t error = work();
  if (Graph* graph = capture_of(stream)) graph->work.push_back(std::move(work));
  return fail(error);
}

int device_of(cudaStream_t stream) {
  Lock lock;
  const auto found = streams.find(stream);
  return found == streams.end() ? current_device() : found->second.device;
}

bool is_capturing(cudaStream_t stream) { return capture_of(stream) != nullptr; }

cudaError_t check_not_capturing() {
  const bool is_forbidden = global_captures > 0 && thread_mode == cudaStreamCaptureModeGlobal;
  return is_forbidden ? fail(cudaErrorStreamCaptureUnsupported) : cudaSuccess;
}

}  // namespace cudaemu

using namespace cudaemu;

extern "C" {

// ---- Streams

cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned, int) {
  Lock lock;
  *stream = new_handle<cudaStream_t>();
  streams[*stream] = {current_device()};
  return cudaSuccess;
}
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags) {
  return cudaStreamCreateWithPriority(stream, flags, 0);
}
cudaError_t cudaStreamCreate(cudaStream_t* stream) {
  return cudaStreamCreateWithPriority(stream, 0, 0);
}
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  Lock lock;
  return streams.erase(stream), cudaSuccess;
}
cudaError_t cudaStreamQuery(cudaStream_t stream) {
  return is_capturing(stream) ? fail(cudaErrorStreamCaptureUnsupported) : cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t stream) { return cudaStreamQuery(stream); }
cudaError_t cudaDeviceSynchronize() { return check_not_capturing(); }
cudaError_t cudaStreamGetPriority(cudaStream_t, int* priority) {
  return *priority = 0, cudaSuccess;
}
cudaError_t cudaStreamWaitEvent(cudaStream_t, cudaEvent_t, unsigned) { return cudaSuccess; }

// ---- Events

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  Lock lock;
  *event = new_handle<cudaEvent_t>();
  events[*event] = {current_device()};
  return cudaSuccess;
}
cudaError_t cudaEventCreate(cudaEvent_t* event) { return cudaEventCreateWithFlags(event, 0); }
cudaError_t cudaEventDestroy(cudaEvent_t event) {
  Lock lock;
  return events.erase(event), cudaSuccess;
}
cudaError_t cudaEventQuery(cudaEvent_t) { return check_not_capturing(); }
cudaError_t cudaEventSynchronize(cudaEvent_t) { return check_not_capturing(); }
cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned) {
  Lock lock;
  if (events[event].device == device_of(stream)) return cudaSuccess;
  machine().reports.push_back("EVENT: recorded in a stream of another device");
  return fail(cudaErrorInvalidResourceHandle);
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  return cudaEventRecordWithFlags(event, stream, 0);
}
cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t, cudaEvent_t) {
  return *ms = 0, cudaSuccess;
}

// ---- Capture

cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  std::swap(thread_mode, *mode);
  return cudaSuccess;
}
cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode mode) {
  const auto found = streams.find(stream);
  if (found == streams.end()) return fail(cudaErrorStreamCaptureUnsupported);  // a default stream
  found->second.capture = new Graph;
  found->second.mode = mode;
  global_captures += mode == cudaStreamCaptureModeGlobal;
  ++captures;
  return cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
  Stream& state = streams.at(stream);
  *graph = reinterpret_cast<cudaGraph_t>(state.capture);
  state.capture = nullptr;
  global_captures -= state.mode == cudaStreamCaptureModeGlobal;
  return cudaSuccess;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
  *status = is_capturing(stream) ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, cudaStreamCaptureStatus* status,
                                     unsigned long long* id, cudaGraph_t* graph,
                                     const cudaGraphNode_t** nodes, const cudaGraphEdgeData** edges,
                                     size_t* count) {
  cudaStreamIsCapturing(stream, status);
  if (id) *id = captures;
  if (graph) *graph = reinterpret_cast<cudaGraph_t>(capture_of(stream));
  if (nodes) *nodes = nullptr;
  if (edges) *edges = nullptr;
  if (count) *count = 0;
  return cudaSuccess;
}

// ---- Graphs

cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t*, size_t* count) {
  return *count = graph_of(graph)->work.size(), cudaSuccess;
}
cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* exec, cudaGraph_t graph,
                                          unsigned long long) {
  *exec = reinterpret_cast<cudaGraphExec_t>(new Graph(*graph_of(graph)));
  return cudaSuccess;
}
cudaError_t cudaGraphInstantiate(cudaGraphExec_t* exec, cudaGraph_t graph,
                                 unsigned long long flags) {
  return cudaGraphInstantiateWithFlags(exec, graph, flags);
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t) {
  for (const Work& work : graph_of(exec)->work) {
    const cudaError_t error = work();
    if (error != cudaSuccess) return fail(error);
  }
  return cudaSuccess;
}
cudaError_t cudaGraphDestroy(cudaGraph_t graph) { return delete graph_of(graph), cudaSuccess; }
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec) {
  return delete graph_of(exec), cudaSuccess;
}

}  // extern "C"
