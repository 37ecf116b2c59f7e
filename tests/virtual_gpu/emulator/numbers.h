// Floating-point formats: half (IEEE), bfloat16, TF32, and the bits of float.
#pragma once
#include <cmath>
#include <cstring>

#include "emulator.h"

namespace emulator {

inline float as_float(u32 bits) {
  float f;
  memcpy(&f, &bits, 4);
  return f;
}
inline u32 as_bits(float f) {
  u32 bits;
  memcpy(&bits, &f, 4);
  return bits;
}

// The NaNs that PTX arithmetic returns.
constexpr u32 kNanBits = 0x7fffffff;
constexpr u16 kHalfNanBits = 0x7fff;
inline float nan_result() { return as_float(kNanBits); }

inline float half_to_float(u16 bits) {
  _Float16 h;
  memcpy(&h, &bits, 2);
  return float(h);
}
inline u16 half_bits(_Float16 h) {
  u16 bits;
  memcpy(&bits, &h, 2);
  return bits;
}
inline u16 float_to_half(float f) { return f != f ? kHalfNanBits : half_bits(_Float16(f)); }

inline float bfloat_to_float(u16 bits) { return as_float(u32(bits) << 16); }
inline u16 float_to_bfloat(float f) {  // to the nearest, ties to even
  const u32 bits = as_bits(f);
  if ((bits & 0x7fffffff) > 0x7f800000) return kHalfNanBits;
  return u16((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// float32 as tensor cores read it: 13 bits dropped.
inline float truncate_tf32(u32 bits) { return as_float(bits & ~0x1fffu); }
// float32 rounded to TF32, ties to even or away from zero; NaN and infinity stay.
inline u32 round_tf32(u32 bits, bool ties_away) {
  if ((bits & 0x7f800000) != 0x7f800000) bits += ties_away ? 0x1000 : 0xfff + (bits >> 13 & 1);
  return bits & ~0x1fffu;
}

inline float flush(float x) { return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.f, x) : x; }

// 16-bit formats as the arithmetic templates take them. Sums and products of two are exact in double: one rounding.
struct Half {
  static double up(u16 bits) { return half_to_float(bits); }
  static u16 down(double x) { return x != x ? kHalfNanBits : half_bits(_Float16(x)); }
};
struct Bfloat {
  static double up(u16 bits) { return bfloat_to_float(bits); }
  static u16 down(double x);
};

}  // namespace emulator
