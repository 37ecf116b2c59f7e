// float32 and float64 arithmetic.
#include "decode.h"
#include "lanes.h"
#include "numbers.h"

namespace emulator {
namespace {

struct Add {
  template <class T>
  static T apply(T a, T b) {
    return a + b;
  }
};
struct Subtract {
  template <class T>
  static T apply(T a, T b) {
    return a - b;
  }
};
struct Multiply {
  template <class T>
  static T apply(T a, T b) {
    return a * b;
  }
};
struct Divide {
  template <class T>
  static T apply(T a, T b) {
    return a / b;
  }
};
struct FusedMultiplyAdd {
  static float apply(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
  static double apply(double a, double b, double c) { return __builtin_fma(a, b, c); }
};
struct Minimum {  // the number where one is NaN; -0 is below 0
  static float apply(float a, float b) {
    if (a != a) return b != b ? nan_result() : b;
    if (b != b) return a;
    if (a == b) return std::signbit(a) ? a : b;
    return a < b ? a : b;
  }
  static double apply(double a, double b) { return std::fmin(a, b); }
};
struct Maximum {
  static float apply(float a, float b) {
    if (a != a) return b != b ? nan_result() : b;
    if (b != b) return a;
    if (a == b) return std::signbit(a) ? b : a;
    return a > b ? a : b;
  }
  static double apply(double a, double b) { return std::fmax(a, b); }
};
template <class Op>
struct NanWins {  // min.NaN, max.NaN
  static float apply(float a, float b) { return a != a || b != b ? nan_result() : Op::apply(a, b); }
};
struct SquareRoot {
  template <class T>
  static T apply(T a) {
    return std::sqrt(a);
  }
};
struct Reciprocal {
  template <class T>
  static T apply(T a) {
    return 1 / a;
  }
};
struct ReciprocalSquareRoot {
  static float apply(float a) { return float(1.0 / std::sqrt(double(a))); }
};
struct Exp2 {
  static float apply(float a) { return std::exp2(a); }
};
struct Log2 {
  static float apply(float a) { return std::log2(a); }
};
struct Sine {
  static float apply(float a) { return std::sin(a); }
};
struct Cosine {
  static float apply(float a) { return std::cos(a); }
};
struct Tanh {
  static float apply(float a) { return std::tanh(a); }
};
struct Negate {
  static float apply(float a) { return as_float(as_bits(a) ^ 0x80000000u); }
  static double apply(double a) { return -a; }
};
struct Absolute {
  static float apply(float a) { return as_float(as_bits(a) & 0x7fffffffu); }
  static double apply(double a) { return std::fabs(a); }
};

template <class Op>
struct Flushed {  // .ftz: subnormal operands and results are 0
  template <class... Floats>
  static float apply(Floats... operands) {
    return flush(Op::apply(flush(operands)...));
  }
};
template <class Op>
struct Saturated {  // .sat: NaN becomes 0
  static float apply(float a, float b) {
    const float x = Op::apply(a, b);
    return !(x > 0) ? 0.f : x > 1 ? 1.f : x;
  }
};

// Option approx: one unit in the last place or none, the same for the same significand; exact for powers of two.
float nudged(float result, u32 operand) {
  const u32 bits = as_bits(result), exponent = bits >> 23 & 255;
  if (exponent <= 1 || exponent >= 254 || !(operand & 0x7fffff)) return result;
  u64 hash = (operand & 0x7fffff) * 0x9E3779B97F4A7C15ull + u64(options.approx) * 0xD6E8FEB86659FD93ull;
  hash ^= hash >> 32;
  hash *= 0xD6E8FEB86659FD93ull;
  hash ^= hash >> 29;
  return as_float(bits + u32(i32(hash % 3) - 1));
}
template <class Op>
struct Approximate {
  static float apply(float a) {
    const float result = Op::apply(a);
    return options.approx ? nudged(result, as_bits(a)) : result;
  }
};
struct ApproximateDivide {  // as the hardware divides: times an approximate reciprocal, within 2 units
  static float apply(float a, float b) {
    const float quotient = a / b;
    const u32 exponent = as_bits(b) >> 23 & 255;
    if (!options.approx || exponent < 3 || exponent > 251 || !std::isfinite(quotient) || std::fabs(quotient) < 1e-30f)
      return quotient;
    return a * nudged(1.f / b, as_bits(b));
  }
};

template <class Op>
Handler unary_f32(bool ftz) {
  return ftz ? unary<Flushed<Op>, float, float> : unary<Op, float, float>;
}
template <class Op>
Handler binary_f32(bool ftz) {
  return ftz ? binary<Flushed<Op>, float, float> : binary<Op, float, float>;
}
template <class Op>
Handler unary_f32(const Decoder& d) {
  return d.has("approx") ? unary_f32<Approximate<Op>>(d.ftz) : unary_f32<Op>(d.ftz);
}
template <class Op>
Handler sum_or_product(const Decoder& d) {
  if (!d.saturate) return binary_f32<Op>(d.ftz);
  return d.ftz ? nullptr : binary<Saturated<Op>, float, float>;
}

bool decode_f32(Decoder& d) {
  const std::string& op = d.opcode;
  if (op == "add") return d.sources(sum_or_product<Add>(d), 2, 4);
  if (op == "sub") return d.sources(sum_or_product<Subtract>(d), 2, 4);
  if (op == "mul") return d.sources(sum_or_product<Multiply>(d), 2, 4);
  if (d.saturate) return false;
  if (op == "fma" || op == "mad")
    return d.sources(d.ftz ? ternary<Flushed<FusedMultiplyAdd>, float, float> : ternary<FusedMultiplyAdd, float, float>,
                     3, 4);
  if (op == "div") {
    const bool approximate = d.has("approx") || d.has("full");
    return d.sources(approximate ? binary_f32<ApproximateDivide>(d.ftz) : binary_f32<Divide>(d.ftz), 2, 4);
  }
  if (op == "sqrt") return d.sources(unary_f32<SquareRoot>(d), 1, 4);
  if (op == "rcp") return d.sources(unary_f32<Reciprocal>(d), 1, 4);
  if (op == "rsqrt") return d.sources(unary_f32<ReciprocalSquareRoot>(d), 1, 4);
  if (op == "ex2") return d.sources(unary_f32<Exp2>(d), 1, 4);
  if (op == "lg2") return d.sources(unary_f32<Log2>(d), 1, 4);
  if (op == "sin") return d.sources(unary_f32<Sine>(d), 1, 4);
  if (op == "cos") return d.sources(unary_f32<Cosine>(d), 1, 4);
  if (op == "tanh") return d.sources(unary_f32<Tanh>(d), 1, 4);
  if (d.modifiers.size() != 1) return false;
  if (op == "min") return d.sources(d.nan ? binary_f32<NanWins<Minimum>>(d.ftz) : binary_f32<Minimum>(d.ftz), 2, 4);
  if (op == "max") return d.sources(d.nan ? binary_f32<NanWins<Maximum>>(d.ftz) : binary_f32<Maximum>(d.ftz), 2, 4);
  if (op == "neg") return d.sources(unary_f32<Negate>(d.ftz), 1, 4);
  if (op == "abs") return d.sources(unary_f32<Absolute>(d.ftz), 1, 4);
  return false;
}

bool decode_f64(Decoder& d) {
  const std::string& op = d.opcode;
  if (op == "add") return d.sources(binary<Add, double, double>, 2, 8);
  if (op == "sub") return d.sources(binary<Subtract, double, double>, 2, 8);
  if (op == "mul") return d.sources(binary<Multiply, double, double>, 2, 8);
  if (op == "div") return d.sources(binary<Divide, double, double>, 2, 8);
  if (op == "fma") return d.sources(ternary<FusedMultiplyAdd, double, double>, 3, 8);
  if (op == "min") return d.sources(binary<Minimum, double, double>, 2, 8);
  if (op == "max") return d.sources(binary<Maximum, double, double>, 2, 8);
  if (op == "sqrt") return d.sources(unary<SquareRoot, double, double>, 1, 8);
  if (op == "rcp") return d.sources(unary<Reciprocal, double, double>, 1, 8);
  if (op == "neg") return d.sources(unary<Negate, double, double>, 1, 8);
  if (op == "abs") return d.sources(unary<Absolute, double, double>, 1, 8);
  return false;
}

}  // namespace

bool decode_float(Decoder& d) {
  if (!d.has_only({"rn", "approx", "full"}) || d.relu) return false;
  if (d.type() == Type::kF32) return decode_f32(d);
  if (d.type() == Type::kF64 && !d.saturate && !d.nan) return decode_f64(d);
  return false;
}

}  // namespace emulator
