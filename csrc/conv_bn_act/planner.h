// Which kernel serves a convolution, and with what tile: pure functions of sizes, without CUDA or Torch headers.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

namespace resnet_fused {

// Multistage mma.sync kernels of sm_80, warp-specialised TMA and wgmma kernels of sm_90a.
enum class ConvFamily { kSm80, kSm90a };

struct ConvProblem {
  int64_t N, H, W, C, K, R, S;
  int64_t stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
  int64_t groups;
  int64_t itemsize;  // of x, weight, residual and y

  int64_t P() const { return (H + 2 * pad_h - dilation_h * (R - 1) - 1) / stride_h + 1; }
  int64_t Q() const { return (W + 2 * pad_w - dilation_w * (S - 1) - 1) / stride_w + 1; }
  int64_t M() const { return N * P() * Q(); }  // rows of the implicit GEMM
  bool is_gemm() const { return R == 1 && S == 1 && stride_h == 1 && stride_w == 1 && pad_h == 0 && pad_w == 0; }
};

struct ConvPlan {
  int tile_m, tile_n;
  int splits;  // of the reduction over C; more than 1 only where the problem is a plain GEMM
};

struct ConvDevice {
  int major, minor;  // compute capability
  int multiprocessors;
};

struct ConvTile {
  int m, n;
  double efficiency;  // of the main loop, relative to the largest tile's
};

// Estimated from the operand bytes of a multiply-add. Not measured on any GPU yet.
inline constexpr ConvTile kConvTiles[] = {{128, 128, 1.0}, {128, 64, 0.8}, {64, 64, 0.6}};
inline constexpr ConvTile kSplitTile = kConvTiles[0];  // the split GEMM's, one block a multiprocessor
inline constexpr int kConvStepBytes = 128;             // of C in one step of the main loop

// What a block takes: registers of a thread, the most of the types of this size, and bytes of shared memory. The rest
// of the project holds the built kernels against it: static_asserts beside them, tests/aot_cuda.py their registers.
struct ConvUsage {
  ConvFamily family;
  int itemsize, m, n;
  int registers, shared;
};

// Every kernel. A thread of sm_80's epilogue stays in its columns, so its tiles have rows of 256 bytes at most.
inline constexpr ConvUsage kConvUsage[] = {
    {ConvFamily::kSm90a, 2, 128, 128, 200, 197120}, {ConvFamily::kSm90a, 2, 128, 64, 120, 74240},
    {ConvFamily::kSm90a, 2, 64, 64, 80, 49664},     {ConvFamily::kSm90a, 4, 128, 128, 190, 197632},
    {ConvFamily::kSm90a, 4, 128, 64, 123, 74752},   {ConvFamily::kSm90a, 4, 64, 64, 86, 50176},
    {ConvFamily::kSm80, 2, 128, 128, 244, 65536},   {ConvFamily::kSm80, 2, 128, 64, 162, 49152},
    {ConvFamily::kSm80, 2, 64, 64, 105, 32768},     {ConvFamily::kSm80, 4, 128, 64, 162, 49152},
    {ConvFamily::kSm80, 4, 64, 64, 106, 32768},
};

constexpr int conv_threads(ConvFamily family) { return family == ConvFamily::kSm90a ? 256 : 128; }

// Null where there is no such kernel.
constexpr const ConvUsage* conv_usage(ConvFamily family, int64_t itemsize, int64_t m, int64_t n) {
  for (const ConvUsage& usage : kConvUsage) {
    if (usage.family == family && usage.itemsize == itemsize && usage.m == m && usage.n == n) return &usage;
  }
  return nullptr;
}

constexpr int shared_of_multiprocessor(int major, int minor) {
  const bool small = major == 8 ? minor != 0 && minor != 7 : major >= 12;
  return (small ? 100 : major == 8 ? 164 : 228) * 1024;
}

// Blocks that share a multiprocessor: one's epilogue runs beside another's main loop. Registers go to warps by 8 a
// thread and to four warps alike; the system takes 1 KiB of a block's shared memory.
constexpr int conv_resident(const ConvUsage& usage, int major, int minor) {
  const int warps = 64 * 1024 / ((usage.registers + 7) / 8 * 8 * 32) / 4 * 4;
  const int by_registers = warps / (conv_threads(usage.family) / 32);
  const int by_shared = shared_of_multiprocessor(major, minor) / (usage.shared + 1024);
  return by_registers < by_shared ? by_registers : by_shared;
}

// What serves a device of this compute capability in a build with these families.
inline std::optional<ConvFamily> conv_family(int major, int minor, bool has_sm80, bool has_sm90a) {
  if (has_sm90a && major == 9 && minor == 0) return ConvFamily::kSm90a;
  if (has_sm80 && major >= 8) return ConvFamily::kSm80;
  return std::nullopt;
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Why the kernels of a family can't serve the convolution, or null. The limits are those of CUTLASS's can_implement and
// of the tensor memory accelerator.
inline const char* why_not_conv(const ConvProblem& p, ConvFamily family) {
  if (p.groups != 1) return "the convolution has groups; the CUDA kernels serve groups=1";
  if (p.C % 8 != 0 || p.K % 8 != 0) return "the CUDA kernels serve channels in multiples of 8";
  if (p.R != p.S || (p.R != 1 && p.R != 3)) return "the CUDA kernels serve 1x1 and 3x3 convolutions";
  const auto within = [](int64_t low, int64_t h, int64_t w, int64_t high) {
    return low <= h && h <= high && low <= w && w <= high;
  };
  if (!within(1, p.stride_h, p.stride_w, 2)) return "the CUDA kernels serve a stride of 1 or 2";
  if (!within(0, p.pad_h, p.pad_w, 127)) return "the CUDA kernels serve a padding of 0 to 127";
  if (!within(1, p.dilation_h, p.dilation_w, 64)) return "the CUDA kernels serve a dilation of 1 to 64";
  if (p.H + 2 * p.pad_h <= p.dilation_h * (p.R - 1) || p.W + 2 * p.pad_w <= p.dilation_w * (p.S - 1))
    return "the filter is larger than the padded input";
  const int64_t widest = (int64_t{1} << 31) - 1;
  if (p.M() > widest) return "there are 2^31 output pixels or more";
  if (family == ConvFamily::kSm80) {
    for (const int64_t numel : {p.N * p.H * p.W * p.C, p.K * p.R * p.S * p.C, p.M() * p.K}) {
      if (numel * p.itemsize > widest) return "a tensor has 2 GiB or more, which the kernels for sm_80 can't address";
    }
  }
  if (ceil_div(p.K, 64) > 65535) return "there are more output channels than a grid has rows of tiles";
  return nullptr;
}

inline int64_t conv_steps(const ConvProblem& p) { return p.R * p.S * ceil_div(p.C * p.itemsize, kConvStepBytes); }

inline int64_t conv_blocks(const ConvProblem& p, int tile_m, int tile_n) {
  return ceil_div(p.M(), tile_m) * ceil_div(p.K, tile_n);
}

inline bool can_split(const ConvProblem& p, ConvFamily family) {
  return family == ConvFamily::kSm90a && p.is_gemm() && p.itemsize == 2;
}

// Why no kernel of the family runs the convolution by this plan, or null; why_not_conv lets the problem pass.
inline const char* why_not_plan(const ConvProblem& p, const ConvPlan& plan, ConvFamily family) {
  if (conv_usage(family, p.itemsize, plan.tile_m, plan.tile_n) == nullptr) return "there is no such tile";
  if (plan.splits == 1) return nullptr;
  if (!can_split(p, family)) return "this convolution can't be split";
  if (plan.tile_m != kSplitTile.m || plan.tile_n != kSplitTile.n) return "only the tile 128x128 can be split";
  if (plan.splits < 1 || plan.splits > conv_steps(p)) return "splits must be between 1 and the steps over the channels";
  return nullptr;
}

// Estimated time, in steps of the largest tile's main loop: waves of resident blocks, the last one partly filled.
inline double conv_cost(const ConvProblem& p, const ConvTile& tile, int splits, int resident, int multiprocessors) {
  constexpr double kPrologue = 4;   // of a wave
  constexpr double kEpilogue = 3;   // of a block of the largest tile
  constexpr double kReduction = 4;  // of a split block's partial sums
  const double area = double(tile.m) * tile.n / (kConvTiles[0].m * kConvTiles[0].n);
  const double steps = static_cast<double>(ceil_div(conv_steps(p), splits));
  const double block = area * (steps / tile.efficiency + kEpilogue) + (splits > 1 ? kReduction : 0);
  const int64_t blocks = conv_blocks(p, tile.m, tile.n) * splits;
  const int64_t wave = int64_t{multiprocessors} * resident;
  const double full = static_cast<double>(blocks / wave);
  const int64_t rest = ceil_div(blocks % wave, multiprocessors);  // blocks on the busiest multiprocessor
  return full * (kPrologue + resident * block) + (rest > 0 ? kPrologue + double(rest) * block : 0);
}

// All that can serve, the cheapest by estimate first; the problem is one that why_not_conv lets pass.
inline std::vector<ConvPlan> conv_plans(const ConvProblem& p, ConvFamily family, const ConvDevice& device) {
  std::vector<ConvPlan> plans;
  std::vector<double> costs;
  const auto add = [&](const ConvTile& tile, int splits, int resident) {
    const double cost = conv_cost(p, tile, splits, resident, device.multiprocessors);
    size_t place = 0;
    while (place < costs.size() && costs[place] <= cost) ++place;
    costs.insert(costs.begin() + place, cost);
    plans.insert(plans.begin() + place, ConvPlan{tile.m, tile.n, splits});
  };
  for (const ConvTile& tile : kConvTiles) {
    const ConvUsage* usage = conv_usage(family, p.itemsize, tile.m, tile.n);
    if (usage != nullptr) add(tile, 1, conv_resident(*usage, device.major, device.minor));
  }
  if (can_split(p, family)) {
    for (const int splits : {2, 4, 8}) {  // no more blocks than one wave holds, two steps or more in each
      const int64_t blocks = conv_blocks(p, kSplitTile.m, kSplitTile.n) * splits;
      if (blocks <= device.multiprocessors && conv_steps(p) >= 2 * splits) add(kSplitTile, splits, 1);
    }
  }
  return plans;
}

}  // namespace resnet_fused
