// What this library was built from, as JSON. The macros come from setup.py.
#pragma once

namespace entropy_rl {

inline const char* build_info_json() {
  return "{\"version\": \"" ENTROPY_RL_VERSION "\", \"torch\": \"" ENTROPY_RL_TORCH_VERSION
         "\", \"cuda\": \"" ENTROPY_RL_CUDA_VERSION "\", \"cuda_archs\": \"" ENTROPY_RL_CUDA_ARCHS
         "\", \"compiler\": \"" __VERSION__ "\"}";
}

}  // namespace entropy_rl
