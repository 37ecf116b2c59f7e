// Arithmetic of f16 and bf16, and of pairs of them.
#include "decode.h"
#include "lanes.h"
#include "numbers.h"

namespace emulator {

u16 Bfloat::down(double x) {  // through a float32 that is rounded to odd: one rounding
  if (x != x) return kHalfNanBits;
  const float nearest = float(x);
  const double rest = x - double(nearest);
  u32 bits = as_bits(nearest);
  if (rest != 0 && !(bits & 1) && std::isfinite(nearest)) {
    const bool positive = nearest > 0 || (nearest == 0 && rest > 0);
    bits += (rest > 0) == positive ? 1 : -1;
  }
  return float_to_bfloat(as_float(bits));
}

namespace {

struct Add {
  static double apply(double a, double b) { return a + b; }
};
struct Subtract {
  static double apply(double a, double b) { return a - b; }
};
struct Multiply {
  static double apply(double a, double b) { return a * b; }
};
struct Minimum {
  static double apply(double a, double b) {
    if (a != a) return b;
    if (b != b) return a;
    if (a == b) return std::signbit(a) ? a : b;
    return a < b ? a : b;
  }
};
struct Maximum {
  static double apply(double a, double b) {
    if (a != a) return b;
    if (b != b) return a;
    if (a == b) return std::signbit(a) ? b : a;
    return a > b ? a : b;
  }
};
template <class Op>
struct NanWins {
  static double apply(double a, double b) { return a != a || b != b ? NAN : Op::apply(a, b); }
};
struct FusedMultiplyAdd {
  static double apply(double a, double b, double c) { return __builtin_fma(a, b, c); }
};

template <class Format, class Op>
struct In {  // Op in a 16-bit format
  template <class... Bits>
  static u16 apply(Bits... operands) {
    return Format::down(Op::apply(Format::up(operands)...));
  }
};
template <class Format, class Op>
struct PairIn {  // in both halves of a word
  template <class... Words>
  static u32 apply(Words... operands) {
    return In<Format, Op>::apply(u16(operands)...) | u32(In<Format, Op>::apply(u16(operands >> 16)...)) << 16;
  }
};
template <u32 Mask>
struct FlipSign {
  static u32 apply(u32 a) { return a ^ Mask; }
};
template <u32 Mask>
struct ClearSign {
  static u32 apply(u32 a) { return a & Mask; }
};

struct Formats {
  bool bfloat, pair;
};
template <class Op>
Handler binary_in(Formats f) {
  if (f.pair) return f.bfloat ? binary<PairIn<Bfloat, Op>, u32, u32> : binary<PairIn<Half, Op>, u32, u32>;
  return f.bfloat ? binary<In<Bfloat, Op>, u16, u16> : binary<In<Half, Op>, u16, u16>;
}
Handler fused_multiply_add(Formats f) {
  using Op = FusedMultiplyAdd;
  if (f.pair) return f.bfloat ? ternary<PairIn<Bfloat, Op>, u32, u32> : ternary<PairIn<Half, Op>, u32, u32>;
  return f.bfloat ? ternary<In<Bfloat, Op>, u16, u16> : ternary<In<Half, Op>, u16, u16>;
}

}  // namespace

bool decode_half(Decoder& d) {
  const std::string &op = d.opcode, &type = d.type_name();
  const Formats f{type[0] == 'b', type.ends_with("x2")};
  if (type != "f16" && type != "bf16" && type != "f16x2" && type != "bf16x2") return false;
  if (d.saturate || d.ftz || d.relu || !d.has_only({"rn"})) return false;
  const u8 width = d.width();
  if (op == "neg")
    return d.sources(f.pair ? unary<FlipSign<0x80008000>, u32, u32> : unary<FlipSign<0x8000>, u16, u16>, 1, width);
  if (op == "abs")
    return d.sources(f.pair ? unary<ClearSign<0x7fff7fff>, u32, u32> : unary<ClearSign<0x7fff>, u16, u16>, 1, width);
  if (op == "add") return d.sources(binary_in<Add>(f), 2, width);
  if (op == "sub") return d.sources(binary_in<Subtract>(f), 2, width);
  if (op == "mul") return d.sources(binary_in<Multiply>(f), 2, width);
  if (op == "min") return d.sources(d.nan ? binary_in<NanWins<Minimum>>(f) : binary_in<Minimum>(f), 2, width);
  if (op == "max") return d.sources(d.nan ? binary_in<NanWins<Maximum>>(f) : binary_in<Maximum>(f), 2, width);
  if (op == "fma") return d.sources(fused_multiply_add(f), 3, width);
  return false;
}

}  // namespace emulator
