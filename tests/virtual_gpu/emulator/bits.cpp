// Bitwise logic, shifts, bit fields, and the logic of predicates.
#include <algorithm>
#include <type_traits>

#include "decode.h"
#include "lanes.h"

namespace emulator {
namespace {

struct And {
  template <class T>
  static T apply(T a, T b) {
    return a & b;
  }
};
struct Or {
  template <class T>
  static T apply(T a, T b) {
    return a | b;
  }
};
struct Xor {
  template <class T>
  static T apply(T a, T b) {
    return a ^ b;
  }
};
struct Not {
  template <class T>
  static T apply(T a) {
    return T(~a);
  }
};
struct ShiftLeft {
  template <class T>
  static T apply(T a, u32 n) {
    return n >= 8 * sizeof(T) ? T(0) : T(a << n);
  }
};
struct ShiftRight {
  template <class T>
  static T apply(T a, u32 n) {
    if (n >= 8 * sizeof(T)) return T(std::is_signed_v<T> && a < 0 ? -1 : 0);
    return T(a >> n);
  }
};
struct PopulationCount {
  static u32 apply(u32 a) { return u32(__builtin_popcount(a)); }
  static u32 apply(u64 a) { return u32(__builtin_popcountll(a)); }
};
struct LeadingZeros {
  static u32 apply(u32 a) { return a ? u32(__builtin_clz(a)) : 32; }
  static u32 apply(u64 a) { return a ? u32(__builtin_clzll(a)) : 64; }
};
struct Reverse {
  static u32 apply(u32 a) {
    u32 result = 0;
    for (int i = 0; i < 32; ++i) result |= (a >> i & 1) << (31 - i);
    return result;
  }
};
struct HighestBit {  // bfind: of a negative number the highest bit that is not its sign
  static u32 apply(u32 a) { return a ? 31 - u32(__builtin_clz(a)) : ~0u; }
  static u32 apply(i32 a) { return apply(u32(a < 0 ? ~a : a)); }
};
struct Permute {
  static u32 apply(u32 a, u32 b, u32 selector) {
    const u64 bytes = u64(b) << 32 | a;
    u32 result = 0;
    for (int i = 0; i < 4; ++i) {
      const u32 choice = selector >> (4 * i) & 15;
      u32 byte = bytes >> (8 * (choice & 7)) & 255;
      if (choice & 8) byte = byte & 128 ? 255 : 0;
      result |= byte << (8 * i);
    }
    return result;
  }
};
struct ExtractField {
  template <class T>
  static T apply(T a, u32 position_operand, u32 length_operand) {
    using U = std::make_unsigned_t<T>;
    constexpr int bits = 8 * sizeof(T);
    const int position = position_operand & 255, length = length_operand & 255;
    if (length == 0) return 0;
    const U value = U(a);
    const bool negative = std::is_signed_v<T> && (value >> std::min(position + length - 1, bits - 1) & 1);
    U result = position >= bits ? 0 : value >> position;
    if (length < bits) result &= (U(1) << length) - 1;
    const int inside =
        std::clamp(bits - position, 0, std::min(length, bits));  // bits that a has; the sign fills the rest
    if (negative && inside < bits) result |= U(~U(0)) << inside;
    return T(result);
  }
};

template <class T>
void insert_field(Context& c, const Instruction& op, u32 mask) {
  constexpr int bits = 8 * sizeof(T);
  const T *a = lanes<T>(c, op.a), *b = lanes<T>(c, op.b);
  const u32 *positions = lanes<u32>(c, op.c), *lengths = lanes<u32>(c, op.e);
  write_lanes(lanes<T>(c, op.d), mask, [=](int lane) {
    const int position = positions[lane] & 255, length = lengths[lane] & 255;
    if (position >= bits || length == 0) return b[lane];
    const T field = (length >= bits ? T(~T(0)) : T((T(1) << length) - 1)) << position;
    return T((b[lane] & ~field) | ((a[lane] << position) & field));
  });
}

void lop3(Context& c, const Instruction& op, u32 mask) {
  const u32 *a = lanes<u32>(c, op.a), *b = lanes<u32>(c, op.b), *third = lanes<u32>(c, op.c);
  const int table = op.table;
  write_lanes(lanes<u32>(c, op.d), mask, [=](int lane) {
    const u32 x = a[lane], y = b[lane], z = third[lane];
    u32 result = 0;
    for (int row = 0; row < 8; ++row)
      if (table >> row & 1) result |= (row & 4 ? x : ~x) & (row & 2 ? y : ~y) & (row & 1 ? z : ~z);
    return result;
  });
}

void funnel_shift(Context& c, const Instruction& op, u32 mask) {
  const u32 *low = lanes<u32>(c, op.a), *high = lanes<u32>(c, op.b), *amount = lanes<u32>(c, op.c);
  const auto [left, wrap] = op.funnel;
  write_lanes(lanes<u32>(c, op.d), mask, [=](int lane) {
    const u32 n = wrap ? amount[lane] & 31 : std::min(amount[lane], 32u);
    const u64 value = u64(high[lane]) << 32 | low[lane];
    return u32(left ? value << n >> 32 : value >> n);
  });
}

template <class T>
Handler bit_field(bool extract) {
  return extract ? Handler(ternary<ExtractField, T, T, u32, u32>) : Handler(insert_field<T>);
}

template <class Op>
void predicate_logic(Context& c, const Instruction& op, u32 mask) {
  const u32 a = predicate(c, op.a, op.a_negated), b = predicate(c, op.b, op.b_negated);
  set_predicate(c.registers, op.d, mask, Op::apply(a, b));
}
struct First {
  static u32 apply(u32 a, u32) { return a; }
};
struct NotFirst {
  static u32 apply(u32 a, u32) { return ~a; }
};

}  // namespace

bool decode_bits(Decoder& d) {
  const Type type = d.type();
  if (type >= Type::kF16) return false;
  const std::string& name = d.opcode;
  const u8 width = d.width();
  const bool sign = type == Type::kS16 || type == Type::kS32 || type == Type::kS64;
  Instruction& op = d.op;
  if (name == "shf") {
    if (width != 4 || !d.has_only({"l", "r", "wrap", "clamp"})) return false;
    op.funnel = {d.has("l"), d.has("wrap")};
    return d.sources(funnel_shift, 3, width);
  }
  if (!d.plain()) return false;
  if (name == "and") return d.sources(unsigned_binary<And>(width), 2, width);
  if (name == "or") return d.sources(unsigned_binary<Or>(width), 2, width);
  if (name == "xor") return d.sources(unsigned_binary<Xor>(width), 2, width);
  if (name == "not") return d.sources(unsigned_unary<Not>(width), 1, width);
  if (name == "prmt") return width == 4 && d.sources(ternary<Permute, u32, u32>, 3, width);
  if (name == "lop3") {
    op.table = u8(d.integer(4));
    return width == 4 && d.sources(lop3, 3, width);
  }
  if (name == "brev") return width == 4 && d.sources(unary<Reverse, u32, u32>, 1, width);
  if (name == "bfind" && width == 4)
    return d.sources(sign ? unary<HighestBit, u32, i32> : unary<HighestBit, u32, u32>, 1, width);
  if (name == "shl" || name == "shr") {
    op.d = d.destination(0, width);
    op.a = d.source(1, width);
    op.b = d.source(2, 4);
    if (width == 2) {
      return d.run(name == "shl" ? binary<ShiftLeft, u16, u16, u32>
                   : sign        ? binary<ShiftRight, i16, i16, u32>
                                 : binary<ShiftRight, u16, u16, u32>);
    }
    if (width == 4) {
      return d.run(name == "shl" ? binary<ShiftLeft, u32, u32, u32>
                   : sign        ? binary<ShiftRight, i32, i32, u32>
                                 : binary<ShiftRight, u32, u32, u32>);
    }
    return d.run(name == "shl" ? binary<ShiftLeft, u64, u64, u32>
                 : sign        ? binary<ShiftRight, i64, i64, u32>
                               : binary<ShiftRight, u64, u64, u32>);
  }
  if (width < 4) return false;
  if (name == "popc" || name == "clz") {
    op.d = d.destination(0, 4);
    op.a = d.source(1, width);
    if (name == "popc") return d.run(width == 4 ? unary<PopulationCount, u32, u32> : unary<PopulationCount, u32, u64>);
    return d.run(width == 4 ? unary<LeadingZeros, u32, u32> : unary<LeadingZeros, u32, u64>);
  }
  if (name == "bfe" || name == "bfi") {
    const bool extract = name == "bfe";
    op.d = d.destination(0, width);
    op.a = d.source(1, width);
    op.b = d.source(2, extract ? 4 : width);
    op.c = d.source(3, 4);
    if (!extract) op.e = d.source(4, 4);
    if (width == 4) return d.run(extract && sign ? bit_field<i32>(true) : bit_field<u32>(extract));
    return d.run(extract && sign ? bit_field<i64>(true) : bit_field<u64>(extract));
  }
  return false;
}

bool decode_predicate_logic(Decoder& d) {
  if (d.type_name() != "pred" || !d.plain()) return false;
  const bool two = d.opcode != "not" && d.opcode != "mov";
  Instruction& op = d.op;
  op.d = d.destination(0, 1);
  op.a = d.source(1, 1, op.a_negated);
  op.b = two ? d.source(2, 1, op.b_negated) : op.a;
  return d.run(d.opcode == "and"   ? predicate_logic<And>
               : d.opcode == "or"  ? predicate_logic<Or>
               : d.opcode == "xor" ? predicate_logic<Xor>
               : d.opcode == "not" ? predicate_logic<NotFirst>
                                   : predicate_logic<First>);
}

}  // namespace emulator
