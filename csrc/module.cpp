// The Python module `_C`: importing it registers the ops; build_info() says how it was built.
// pybind11 does not stand on the Stable ABI: this file alone is compiled without a target version.
#include <cuda_runtime_api.h>
#include <torch/headeronly/version.h>

#include <cstdint>

constexpr uint64_t kTorchTargetVersion = TORCH_TARGET_VERSION;
#undef TORCH_TARGET_VERSION

#include <pybind11/pybind11.h>

#include <string>

namespace py = pybind11;

namespace {

// {"cuda": "13.0", "torch": "2.11.0", "torch_target": "2.11", "archs": ["sm_80", ...], "compiler": "..."}
py::dict build_info() {
  py::dict info;
  info["cuda"] = std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION % 1000 / 10);
  info["torch"] = TORCH_VERSION;
  info["torch_target"] =
      std::to_string(kTorchTargetVersion >> 56) + "." + std::to_string(kTorchTargetVersion >> 48 & 0xff);
  info["archs"] = py::str(RESNET_FUSED_ARCHS).attr("split")(",");
  info["compiler"] = "GCC-compatible " __VERSION__;
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) { m.def("build_info", &build_info, "How this module was built, as a dict."); }
