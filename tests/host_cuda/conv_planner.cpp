// C ABI for csrc/conv_bn_act/planner.h. A problem is ConvProblem's members in their order.
#include "../../csrc/conv_bn_act/planner.h"

using namespace resnet_fused;

namespace {

ConvProblem conv_problem(const int64_t* v) {
  return {v[0], v[1], v[2], v[3], v[4], v[5], v[6], v[7], v[8], v[9], v[10], v[11], v[12], v[13], v[14]};
}

ConvFamily conv_family(bool sm90a) { return sm90a ? ConvFamily::kSm90a : ConvFamily::kSm80; }

}  // namespace

// plans [capacity, 3]: tile_m, tile_n, splits, best first. Returns why the family can't serve, or null.
extern "C" const char* host_conv_plans(const int64_t* problem, bool sm90a, int major, int minor, int multiprocessors,
                                       int* plans, int* count) {
  const ConvProblem p = conv_problem(problem);
  *count = 0;
  if (const char* reason = why_not_conv(p, conv_family(sm90a))) return reason;
  for (const ConvPlan& plan : conv_plans(p, conv_family(sm90a), {major, minor, multiprocessors})) {
    for (const int value : {plan.tile_m, plan.tile_n, plan.splits}) *plans++ = value;
    ++*count;
  }
  return nullptr;
}

extern "C" const char* host_why_not_plan(const int64_t* problem, bool sm90a, int tile_m, int tile_n, int splits) {
  return why_not_plan(conv_problem(problem), {tile_m, tile_n, splits}, conv_family(sm90a));
}

// Blocks a multiprocessor, with so many registers a thread, or the table's where that is 0; -1: there is no such tile.
extern "C" int host_conv_resident(bool sm90a, int itemsize, int m, int n, int registers, int major, int minor) {
  const ConvUsage* found = conv_usage(conv_family(sm90a), itemsize, m, n);
  if (found == nullptr) return -1;
  ConvUsage usage = *found;
  if (registers > 0) usage.registers = registers;
  return conv_resident(usage, major, minor);
}

// 80, 90 or 0.
extern "C" int host_conv_family(int major, int minor, bool has_sm80, bool has_sm90a) {
  const auto family = resnet_fused::conv_family(major, minor, has_sm80, has_sm90a);
  return !family ? 0 : *family == ConvFamily::kSm90a ? 90 : 80;
}
