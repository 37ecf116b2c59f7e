// C ABI for csrc/conv_bn_act/planner.h.
#include "../../csrc/conv_bn_act/planner.h"

using namespace resnet_fused;

// problem: ConvProblem's members in their order; plans [capacity, 3]: tile_m, tile_n, splits, best first.
// Returns why the family can't serve, or null.
extern "C" const char* host_conv_plans(const int64_t* problem, bool sm90a, int multiprocessors, int* plans,
                                       int* count) {
  const int64_t* v = problem;
  const ConvProblem p{v[0], v[1], v[2], v[3], v[4], v[5], v[6], v[7], v[8], v[9], v[10], v[11], v[12], v[13], v[14]};
  const ConvFamily family = sm90a ? ConvFamily::kSm90a : ConvFamily::kSm80;
  *count = 0;
  if (const char* reason = why_not_conv(p, family)) return reason;
  for (const ConvPlan& plan : conv_plans(p, family, multiprocessors)) {
    for (const int value : {plan.tile_m, plan.tile_n, plan.splits}) *plans++ = value;
    ++*count;
  }
  return nullptr;
}

// 80, 90 or 0.
extern "C" int host_conv_family(int major, int minor, bool has_sm80, bool has_sm90a) {
  const auto family = conv_family(major, minor, has_sm80, has_sm90a);
  return !family ? 0 : *family == ConvFamily::kSm90a ? 90 : 80;
}
