// The Python module `_C`: importing it registers the ops; build_info() says how it was built.
// pybind11 does not stand on the Stable ABI: this file alone is compiled without a target version.
#include <cuda_runtime_api.h>
#include <torch/headeronly/version.h>

#include <cstdint>

constexpr uint64_t kTorchTargetVersion = TORCH_TARGET_VERSION;
#undef TORCH_TARGET_VERSION

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "conv_bn_act/launch.h"

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

// (why the convolution kernels can't serve, or None; [(tile_m, tile_n, splits), ...], the cheapest by estimate first)
py::tuple conv_plans(const std::vector<int64_t>& x, const std::vector<int64_t>& weight,
                     const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                     const std::vector<int64_t>& dilation, int64_t groups, int64_t itemsize, int major, int minor,
                     int multiprocessors) {
  const auto family = resnet_fused::conv_family(major, minor);
  if (!family) return py::make_tuple("_C was built without convolutions for this device", py::list());
  const resnet_fused::ConvProblem problem{x.at(0),       x.at(2),        x.at(3),        x.at(1),      weight.at(0),
                                          weight.at(2),  weight.at(3),   stride.at(0),   stride.at(1), padding.at(0),
                                          padding.at(1), dilation.at(0), dilation.at(1), groups,       itemsize};
  const char* reason = resnet_fused::why_not_conv(problem, *family);
  if (reason != nullptr) return py::make_tuple(reason, py::list());
  py::list plans;
  for (const auto& plan : resnet_fused::conv_plans(problem, *family, {major, minor, multiprocessors})) {
    plans.append(py::make_tuple(plan.tile_m, plan.tile_n, plan.splits));
  }
  return py::make_tuple(py::none(), plans);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.def("build_info", &build_info, "How this module was built, as a dict.");
  m.def("conv_plans", &conv_plans, "Why the convolution kernels can't serve, or None, and their plans, best first.");
}
