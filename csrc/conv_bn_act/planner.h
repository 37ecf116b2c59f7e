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

struct ConvTile {
  int m, n;
  double efficiency;  // of the main loop, relative to the largest tile's
  int resident;       // blocks that share a multiprocessor: one's epilogue runs beside another's main loop
};

// Estimates: operand bytes a multiply-add, registers and shared memory. Not measured on any GPU yet.
inline constexpr ConvTile kConvTiles[] = {{128, 128, 1.0, 1}, {128, 64, 0.8, 2}, {64, 64, 0.6, 3}};
constexpr int conv_resident(int m, int n) {
  for (const ConvTile& tile : kConvTiles) {
    if (tile.m == m && tile.n == n) return tile.resident;
  }
  return 1;
}

inline constexpr ConvTile kSplitTile = {128, 128, 1.0, 1};  // the split GEMM's
inline constexpr int kConvStepBytes = 128;                  // of C in one step of the main loop

inline constexpr int kSm80RowBytes = 256;  // of a tile's row, in whose columns a thread of sm_80's epilogue stays

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
  if (p.stride_h > 2 || p.stride_w > 2) return "the CUDA kernels serve strides 1 and 2";
  if (p.pad_h > 127 || p.pad_w > 127) return "the CUDA kernels serve a padding of at most 127";
  if (p.dilation_h > 64 || p.dilation_w > 64) return "the CUDA kernels serve a dilation of at most 64";
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

// Estimated time, in steps of the largest tile's main loop: waves of resident blocks, the last one partly filled.
inline double conv_cost(const ConvProblem& p, const ConvTile& tile, int splits, int multiprocessors) {
  constexpr double kPrologue = 4;   // of a wave
  constexpr double kEpilogue = 3;   // of a block of the largest tile
  constexpr double kReduction = 4;  // of a split block's partial sums
  const double area = double(tile.m) * tile.n / (kConvTiles[0].m * kConvTiles[0].n);
  const double steps = static_cast<double>(ceil_div(conv_steps(p), splits));
  const double block = area * (steps / tile.efficiency + kEpilogue) + (splits > 1 ? kReduction : 0);
  const int64_t blocks = conv_blocks(p, tile.m, tile.n) * splits;
  const int64_t wave = int64_t{multiprocessors} * tile.resident;
  const double full = static_cast<double>(blocks / wave);
  const int64_t rest = ceil_div(blocks % wave, multiprocessors);  // blocks on the busiest multiprocessor
  return full * (kPrologue + tile.resident * block) + (rest > 0 ? kPrologue + double(rest) * block : 0);
}

// All that can serve, the cheapest by estimate first; the problem is one that why_not_conv lets pass.
inline std::vector<ConvPlan> conv_plans(const ConvProblem& p, ConvFamily family, int multiprocessors) {
  std::vector<ConvPlan> plans;
  std::vector<double> costs;
  const auto add = [&](const ConvTile& tile, int splits) {
    const double cost = conv_cost(p, tile, splits, multiprocessors);
    size_t place = 0;
    while (place < costs.size() && costs[place] <= cost) ++place;
    costs.insert(costs.begin() + place, cost);
    plans.insert(plans.begin() + place, ConvPlan{tile.m, tile.n, splits});
  };
  for (const ConvTile& tile : kConvTiles) {
    if (family == ConvFamily::kSm90a || tile.n * p.itemsize <= kSm80RowBytes) add(tile, 1);
  }
  if (family == ConvFamily::kSm90a && p.is_gemm() && p.itemsize == 2) {
    for (const int splits : {2, 4, 8}) {  // no more blocks than one wave holds, two steps or more in each
      if (conv_blocks(p, kSplitTile.m, kSplitTile.n) * splits <= multiprocessors && conv_steps(p) >= 2 * splits) {
        add(kSplitTile, splits);
      }
    }
  }
  return plans;
}

}  // namespace resnet_fused
