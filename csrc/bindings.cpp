// Build information only, no tensors: pybind11 cannot target the limited API, so what every
// installation needs stays out of this module.
#include <pybind11/pybind11.h>

#include "build_info.h"

PYBIND11_MODULE(_bindings, m) {
  m.doc() = "Build information of entropy_rl_ext.";
  m.def("build_info_json", &entropy_rl::build_info_json,
        "What the library was built from, as JSON.");
}
