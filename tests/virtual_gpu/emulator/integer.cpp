// Integer arithmetic.
#include <type_traits>

#include "decode.h"
#include "lanes.h"

namespace emulator {
namespace {

struct Add {
  template <class T>
  static T apply(T a, T b) {
    return T(a + b);
  }
};
struct Subtract {
  template <class T>
  static T apply(T a, T b) {
    return T(a - b);
  }
};
struct Multiply {  // the low half
  template <class T>
  static T apply(T a, T b) {
    return T(std::common_type_t<T, unsigned>(a) * b);
  }
};
struct MultiplyHigh {
  template <class T>
  static T apply(T a, T b) {
    using Wide = std::conditional_t<std::is_signed_v<T>, __int128, unsigned __int128>;
    return T(Wide(a) * Wide(b) >> (8 * sizeof(T)));
  }
};
template <class D>
struct MultiplyWide {
  template <class T>
  static D apply(T a, T b) {
    return D(a) * D(b);
  }
};
template <class Product>
struct MultiplyAdd {
  template <class T, class D>
  static D apply(T a, T b, D c) {
    return D(Product::apply(a, b) + c);
  }
};
struct Divide {
  template <class T>
  static T apply(T a, T b) {
    if (b == 0) return T(-1);
    if (std::is_signed_v<T> && b == T(-1)) return T(0 - a);
    return T(a / b);
  }
};
struct Remainder {
  template <class T>
  static T apply(T a, T b) {
    if (b == 0) return a;
    if (std::is_signed_v<T> && b == T(-1)) return 0;
    return T(a % b);
  }
};
struct Minimum {
  template <class T>
  static T apply(T a, T b) {
    return a < b ? a : b;
  }
};
struct Maximum {
  template <class T>
  static T apply(T a, T b) {
    return a > b ? a : b;
  }
};
struct Negate {
  template <class T>
  static T apply(T a) {
    return T(0 - a);
  }
};
struct Absolute {
  template <class T>
  static T apply(T a) {
    return T(a < 0 ? 0 - a : a);
  }
};

// Two 16-bit integers in a word.
template <class Op>
struct Pair {
  static u32 apply(u32 a, u32 b) {
    return Op::apply(u16(a), u16(b)) | u32(Op::apply(u16(a >> 16), u16(b >> 16))) << 16;
  }
};

bool is_signed(Type type) { return type == Type::kS16 || type == Type::kS32 || type == Type::kS64; }

template <class Wide, class T>
Handler wide(bool adds) {
  return adds ? Handler(ternary<MultiplyAdd<MultiplyWide<Wide>>, Wide, T>)
              : Handler(binary<MultiplyWide<Wide>, Wide, T>);
}

bool decode_multiply(Decoder& d, int width, bool sign) {
  const bool adds = d.opcode == "mad";
  const int n = adds ? 3 : 2;
  if (d.has("lo"))
    return d.sources(adds ? ternary_of<MultiplyAdd<Multiply>, u16, u32, u64>(width) : unsigned_binary<Multiply>(width),
                     n, width);
  if (d.has("hi")) {
    const Handler product = sign ? signed_binary<MultiplyHigh>(width) : unsigned_binary<MultiplyHigh>(width);
    const Handler sum = sign ? ternary_of<MultiplyAdd<MultiplyHigh>, i16, i32, i64>(width)
                             : ternary_of<MultiplyAdd<MultiplyHigh>, u16, u32, u64>(width);
    return d.sources(adds ? sum : product, n, width);
  }
  if (!d.has("wide") || width > 4) return false;
  d.op.d = d.destination(0, 2 * width);
  d.op.a = d.source(1, width);
  d.op.b = d.source(2, width);
  if (adds) d.op.c = d.source(3, 2 * width);
  if (width == 2) return d.run(sign ? wide<i32, i16>(adds) : wide<u32, u16>(adds));
  return d.run(sign ? wide<i64, i32>(adds) : wide<u64, u32>(adds));
}

}  // namespace

bool decode_integer(Decoder& d) {
  const std::string& op = d.opcode;
  if (d.type_name() == "s16x2" || d.type_name() == "u16x2") {
    if (!d.plain() || (op != "add" && op != "sub")) return false;
    return d.sources(op == "add" ? binary<Pair<Add>, u32, u32> : binary<Pair<Subtract>, u32, u32>, 2, 4);
  }
  const Type type = d.type();
  if (type >= Type::kF16) return false;
  const u8 width = d.width();
  const bool sign = is_signed(type);
  if ((op == "mul" || op == "mad") && d.modifiers.size() == 2 && !d.saturate) return decode_multiply(d, width, sign);
  if (!d.plain()) return false;
  if (op == "add") return d.sources(unsigned_binary<Add>(width), 2, width);
  if (op == "sub") return d.sources(unsigned_binary<Subtract>(width), 2, width);
  if (op == "div") return d.sources(sign ? signed_binary<Divide>(width) : unsigned_binary<Divide>(width), 2, width);
  if (op == "rem")
    return d.sources(sign ? signed_binary<Remainder>(width) : unsigned_binary<Remainder>(width), 2, width);
  if (op == "min") return d.sources(sign ? signed_binary<Minimum>(width) : unsigned_binary<Minimum>(width), 2, width);
  if (op == "max") return d.sources(sign ? signed_binary<Maximum>(width) : unsigned_binary<Maximum>(width), 2, width);
  if (op == "neg") return d.sources(unsigned_unary<Negate>(width), 1, width);
  if (op == "abs") return d.sources(unary_of<Absolute, i16, i32, i64>(width), 1, width);
  return false;
}

}  // namespace emulator
