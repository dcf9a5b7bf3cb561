// Build information only. pybind11 cannot target CPython's limited API, so an abi3 wheel has no
// such module, and nothing that every installation needs is in it.
#include <pybind11/pybind11.h>

#include "build_info.h"

PYBIND11_MODULE(_bindings, m) {
  m.doc() = "Build information of entropy_rl_ext.";
  m.def("build_info_json", &entropy_rl::build_info_json,
        "What the library was built from, as JSON.");
}
