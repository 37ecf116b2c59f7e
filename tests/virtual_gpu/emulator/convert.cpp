// cvt.
#include <algorithm>
#include <limits>

#include "decode.h"
#include "lanes.h"
#include "numbers.h"

namespace emulator {
namespace {

bool is_float(Type type) { return type >= Type::kF16; }
u8 bytes_of(Type type) {
  static const u8 bytes[] = {1, 1, 2, 2, 4, 4, 8, 8, 2, 2, 4, 8, 4};
  return bytes[int(type)];
}
bool is_signed(Type type) { return int(type) % 2 == 1; }  // of an integer

// An integer of this many bits, extended to 64 by its sign or by 0.
u64 extended(u64 value, Type type) {
  switch (type) {
    case Type::kU8:
      return u8(value);
    case Type::kS8:
      return u64(i64(i8(value)));
    case Type::kU16:
      return u16(value);
    case Type::kS16:
      return u64(i64(i16(value)));
    case Type::kU32:
      return u32(value);
    case Type::kS32:
      return u64(i64(i32(value)));
    default:
      return value;
  }
}
i64 lowest_of(Type type) { return is_signed(type) ? -(1ll << (8 * bytes_of(type) - 2)) * 2 : 0; }
u64 highest_of(Type type) { return ~0ull >> (64 - 8 * bytes_of(type) + is_signed(type)); }

double read_float(u64 bits, const Conversion& how) {
  switch (how.from) {
    case Type::kF16:
      return half_to_float(u16(bits));
    case Type::kBF16:
      return bfloat_to_float(u16(bits));
    case Type::kF64: {
      double x;
      memcpy(&x, &bits, 8);
      return x;
    }
    default: {
      const float x = as_float(u32(bits));
      return how.ftz ? flush(x) : x;
    }
  }
}

double to_integral(double x, Rounding rounding) {
  switch (rounding) {
    case Rounding::kNearest:
      return std::nearbyint(x);
    case Rounding::kDown:
      return std::floor(x);
    case Rounding::kUp:
      return std::ceil(x);
    default:
      return std::trunc(x);
  }
}

u64 integer_to_integer(u64 bits, const Conversion& how) {
  u64 value = extended(bits, how.from);
  if (how.saturate) {
    if (is_signed(how.from)) {
      if (i64(value) < lowest_of(how.to)) value = u64(lowest_of(how.to));
      if (i64(value) > 0) value = std::min(value, highest_of(how.to));
    } else {
      value = std::min(value, highest_of(how.to));
    }
  }
  return extended(value, how.to);
}

u64 float_to_integer(double x, const Conversion& how) {  // out of range: the nearest; NaN: 0
  x = to_integral(x, how.to_integral ? how.integral : Rounding::kZero);
  if (x != x) return 0;
  if (x <= double(lowest_of(how.to))) return u64(lowest_of(how.to));
  if (x >= double(highest_of(how.to))) return highest_of(how.to);
  return how.to == Type::kU64 ? u64(x) : u64(i64(x));
}

// float32 of an exact value in double or long double.
template <class Exact>
u32 round_to_f32(Exact exact, Rounding rounding) {
  float f = float(exact);
  const float infinity = std::numeric_limits<float>::infinity();
  if (rounding == Rounding::kZero && std::fabs(Exact(f)) > std::fabs(exact)) f = std::nextafter(f, 0.f);
  if (rounding == Rounding::kDown && Exact(f) > exact) f = std::nextafter(f, -infinity);
  if (rounding == Rounding::kUp && Exact(f) < exact) f = std::nextafter(f, infinity);
  return as_bits(f);
}

u64 integer_to_float(u64 bits, const Conversion& how) {
  const u64 value = extended(bits, how.from);
  const bool sign = is_signed(how.from);
  if (how.to == Type::kF32) return round_to_f32(sign ? (long double)(i64(value)) : (long double)(value), how.rounding);
  const double x = sign ? double(i64(value)) : double(value);
  if (how.to == Type::kF16) return Half::down(x);
  if (how.to == Type::kBF16) return Bfloat::down(x);
  u64 result;
  memcpy(&result, &x, 8);
  return result;
}

u16 to_half(double x, Rounding rounding) {
  if (rounding == Rounding::kNearest || x != x) return Half::down(x);
  if (rounding != Rounding::kZero) fault("cvt to f16 with this rounding");
  const u16 bits = half_bits(_Float16(x));
  return std::fabs(half_to_float(bits)) > std::fabs(x) ? bits - 1 : bits;
}

u16 to_bfloat(double x, Rounding rounding) {
  if (rounding == Rounding::kNearest || x != x) return Bfloat::down(x);
  if (rounding != Rounding::kZero) fault("cvt to bf16 with this rounding");
  return u16(as_bits(float(x)) >> 16);
}

u64 float_to_float(double x, const Conversion& how) {
  if (how.to_integral) x = to_integral(x, how.integral);
  if (how.saturate) x = !(x > 0) ? 0 : x > 1 ? 1 : x;
  if (how.relu && x <= 0) x = 0;  // NaN stays
  switch (how.to) {
    case Type::kF16:
      return to_half(x, how.rounding);
    case Type::kBF16:
      return to_bfloat(x, how.rounding);
    case Type::kF64: {
      u64 bits;
      memcpy(&bits, &x, 8);
      return bits;
    }
    case Type::kTF32: {
      if (x != x) return kNanBits;
      const u32 bits = as_bits(float(x));
      if (how.rounding == Rounding::kNearest || how.rounding == Rounding::kNearestAway)
        return round_tf32(bits, how.rounding == Rounding::kNearestAway);
      return bits & ~0x1fffu;
    }
    default: {
      const u32 bits = x != x ? kNanBits : round_to_f32(x, how.rounding);
      return how.ftz ? as_bits(flush(as_float(bits))) : bits;
    }
  }
}

void convert(Context& c, const Instruction& op, u32 mask) {
  const Conversion& how = op.conversion;
  for_lanes(mask, [&](int lane) {
    const u64 bits = get_lane(c.registers, op.a, lane);
    u64 result;
    if (is_float(how.from)) {
      const double x = read_float(bits, how);
      result = is_float(how.to) ? float_to_float(x, how) : float_to_integer(x, how);
    } else {
      result = is_float(how.to) ? integer_to_float(bits, how) : integer_to_integer(bits, how);
    }
    set_lane(c.registers, op.d, lane, result);
  });
}

void convert_pair(Context& c, const Instruction& op, u32 mask) {  // d = {a high, b low}
  const float *high = lanes<float>(c, op.a), *low = lanes<float>(c, op.b);
  u32* d = lanes<u32>(c, op.d);
  const Conversion& how = op.conversion;
  auto one = [&](float x) -> u32 {
    if (how.relu && x <= 0) x = 0;
    return how.to == Type::kBF16 ? to_bfloat(x, how.rounding) : to_half(x, how.rounding);
  };
  for_lanes(mask, [&](int lane) { d[lane] = one(high[lane]) << 16 | one(low[lane]); });
}

struct WidenHalf {
  static float apply(u16 x) { return half_to_float(x); }
};
struct WidenBfloat {
  static float apply(u16 x) { return bfloat_to_float(x); }
};
struct NarrowHalf {
  static u16 apply(float x) { return float_to_half(x); }
};
struct NarrowBfloat {
  static u16 apply(float x) { return float_to_bfloat(x); }
};
struct Cast {
  template <class T>
  static T apply(T x) {
    return x;
  }
};

// Vector code for the conversions that kernels are full of, where registers have the types' own widths.
Handler fast_conversion(Type to, Type from) {
  if (to == Type::kF32 && from == Type::kF16) return unary<WidenHalf, float, u16>;
  if (to == Type::kF32 && from == Type::kBF16) return unary<WidenBfloat, float, u16>;
  if (to == Type::kF16 && from == Type::kF32) return unary<NarrowHalf, u16, float>;
  if (to == Type::kBF16 && from == Type::kF32) return unary<NarrowBfloat, u16, float>;
  const bool to_64 = to == Type::kS64 || to == Type::kU64, to_32 = to == Type::kS32 || to == Type::kU32;
  if (to_64 && from == Type::kS32) return unary<Cast, i64, i32>;
  if (to_64 && from == Type::kU32) return unary<Cast, u64, u32>;
  if (to_32 && (from == Type::kU64 || from == Type::kS64)) return unary<Cast, u32, u64>;
  if (to == Type::kU32 && from == Type::kU16) return unary<Cast, u32, u16>;
  return nullptr;
}

bool read_rounding(const std::string& modifier, Conversion& how) {
  if (modifier == "rn")
    how.rounding = Rounding::kNearest;
  else if (modifier == "rz")
    how.rounding = Rounding::kZero;
  else if (modifier == "rm")
    how.rounding = Rounding::kDown;
  else if (modifier == "rp")
    how.rounding = Rounding::kUp;
  else if (modifier == "rna")
    how.rounding = Rounding::kNearestAway;
  else if (modifier == "rni")
    how.to_integral = true, how.integral = Rounding::kNearest;
  else if (modifier == "rzi")
    how.to_integral = true, how.integral = Rounding::kZero;
  else if (modifier == "rmi")
    how.to_integral = true, how.integral = Rounding::kDown;
  else if (modifier == "rpi")
    how.to_integral = true, how.integral = Rounding::kUp;
  else
    return false;
  return true;
}

}  // namespace

bool decode_convert(Decoder& d) {  // cvt.rn.bf16x2.f32 d, a, b; cvt.rzi.s32.f32 d, a
  Instruction& op = d.op;
  const size_t n = d.modifiers.size();
  if (n < 2 || d.nan) return false;
  std::string to = d.modifiers[n - 2];
  const bool pair = to == "f16x2" || to == "bf16x2";
  if (pair) to.resize(to.size() - 2);
  Conversion& how = op.conversion;
  how = {named_type(to), d.type(), Rounding::kNearest, false, Rounding::kZero, d.saturate, d.ftz, d.relu};
  if (how.to == Type::kNone || how.from == Type::kNone) return false;
  for (size_t i = 0; i + 2 < n; ++i)
    if (!read_rounding(d.modifiers[i], how)) return false;
  const bool to_16 = how.to == Type::kF16 || how.to == Type::kBF16;
  if (to_16 && how.rounding != Rounding::kNearest && how.rounding != Rounding::kZero) return false;
  if (pair) {
    if (how.from != Type::kF32 || how.saturate || how.to_integral) return false;
    return d.sources(convert_pair, 2, 4);
  }
  op.d = d.any(d.operand(0), bytes_of(how.to));
  op.a = d.any(d.operand(1), std::max<u8>(2, bytes_of(how.from)));
  const bool simple = !how.saturate && !how.ftz && !how.relu && !how.to_integral && how.rounding == Rounding::kNearest;
  const bool own_widths = op.d.width == bytes_of(how.to) && op.a.width == bytes_of(how.from);
  const Handler fast = simple && own_widths ? fast_conversion(how.to, how.from) : nullptr;
  return d.run(fast ? fast : convert);
}

}  // namespace emulator
