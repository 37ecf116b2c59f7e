// setp and selp.
#include <array>
#include <type_traits>
#include <utility>

#include "decode.h"
#include "lanes.h"
#include "numbers.h"

namespace emulator {
namespace {

// The ...u comparisons are true where an operand is NaN.
enum Relation { kEq, kNe, kLt, kLe, kGt, kGe, kEqu, kNeu, kLtu, kLeu, kGtu, kGeu, kNum, kNan, kRelations };
constexpr int kIntegerRelations = kGe + 1;
const char* const kRelationNames[] = {"eq",  "ne",  "lt",  "le",  "gt",  "ge",  "equ",
                                      "neu", "ltu", "leu", "gtu", "geu", "num", "nan"};

template <Relation R, class T>
bool holds(T a, T b) {
  const bool unordered = a != a || b != b;
  switch (R) {
    case kEq:
      return a == b;
    case kNe:
      return !unordered && a != b;
    case kLt:
      return a < b;
    case kLe:
      return a <= b;
    case kGt:
      return a > b;
    case kGe:
      return a >= b;
    case kEqu:
      return unordered || a == b;
    case kNeu:
      return unordered || a != b;
    case kLtu:
      return unordered || a < b;
    case kLeu:
      return unordered || a <= b;
    case kGtu:
      return unordered || a > b;
    case kGeu:
      return unordered || a >= b;
    case kNum:
      return !unordered;
    default:
      return unordered;
  }
}

struct AsIs {
  template <class T>
  static T up(T x) {
    return x;
  }
};
struct FromHalf {
  static float up(u16 x) { return half_to_float(x); }
};
struct FromBfloat {
  static float up(u16 x) { return bfloat_to_float(x); }
};

template <class T, class Convert, Relation R>
void setp(Context& c, const Instruction& op, u32 mask) {
  const T *a = lanes<T>(c, op.a), *b = lanes<T>(c, op.b);
  u32 result = 0;
  if (std::is_same_v<T, float> && op.comparison.ftz) {
    for (int i = 0; i < kWarpSize; ++i) result |= u32(holds<R>(flush(float(a[i])), flush(float(b[i])))) << i;
  } else {
    for (int i = 0; i < kWarpSize; ++i) result |= u32(holds<R>(Convert::up(a[i]), Convert::up(b[i]))) << i;
  }
  u32 inverse = ~result;
  if (op.comparison.combine != Combine::kNone) {
    const u32 other = predicate(c, op.c, op.c_negated);
    switch (op.comparison.combine) {
      case Combine::kAnd:
        result &= other, inverse &= other;
        break;
      case Combine::kOr:
        result |= other, inverse |= other;
        break;
      default:
        result ^= other, inverse ^= other;
    }
  }
  set_predicate(c.registers, op.d, mask, result);
  if (op.p.exists()) set_predicate(c.registers, op.p, mask, inverse);
}

template <class T, class Convert = AsIs>
Handler setp_of(Relation relation) {
  constexpr int n = std::is_floating_point_v<T> || !std::is_same_v<Convert, AsIs> ? kRelations : kIntegerRelations;
  static constexpr auto handlers = []<size_t... R>(std::index_sequence<R...>) {
    return std::array<Handler, n>{setp<T, Convert, Relation(R)>...};
  }(std::make_index_sequence<n>());
  return relation < n ? handlers[relation] : nullptr;
}

Handler setp_of(Type type, Relation relation) {
  switch (type) {
    case Type::kU16:
      return setp_of<u16>(relation);
    case Type::kS16:
      return setp_of<i16>(relation);
    case Type::kU32:
      return setp_of<u32>(relation);
    case Type::kS32:
      return setp_of<i32>(relation);
    case Type::kU64:
      return setp_of<u64>(relation);
    case Type::kS64:
      return setp_of<i64>(relation);
    case Type::kF32:
      return setp_of<float>(relation);
    case Type::kF64:
      return setp_of<double>(relation);
    case Type::kF16:
      return setp_of<u16, FromHalf>(relation);
    case Type::kBF16:
      return setp_of<u16, FromBfloat>(relation);
    default:
      return nullptr;
  }
}

Relation named_relation(std::string name) {
  if (name == "lo") name = "lt";  // the unsigned names
  if (name == "ls") name = "le";
  if (name == "hi") name = "gt";
  if (name == "hs") name = "ge";
  int relation = 0;
  while (relation < kRelations && name != kRelationNames[relation]) ++relation;
  return Relation(relation);
}

template <class T>
void selp(Context& c, const Instruction& op, u32 mask) {
  const T *a = lanes<T>(c, op.a), *b = lanes<T>(c, op.b);
  const u32 chosen = predicate(c, op.c, op.c_negated);
  write_lanes(lanes<T>(c, op.d), mask, [=](int lane) { return chosen >> lane & 1 ? a[lane] : b[lane]; });
}

}  // namespace

bool decode_compare(Decoder& d) {  // setp.lt.and.f32 p|q, a, b, c
  Instruction& op = d.op;
  if (d.modifiers.size() < 2) return false;
  const Relation relation = named_relation(d.modifiers[0]);
  if (relation == kRelations) return false;
  op.comparison.combine = d.has("and")   ? Combine::kAnd
                          : d.has("or")  ? Combine::kOr
                          : d.has("xor") ? Combine::kXor
                                         : Combine::kNone;
  op.comparison.ftz = d.ftz;
  const bool combines = op.comparison.combine != Combine::kNone;
  if (d.modifiers.size() != (combines ? 3 : 2) || (d.ftz && d.type() != Type::kF32)) return false;
  op.d = d.destination(0, 1);
  op.p = d.operand(0).second;
  op.a = d.source(1, d.width());
  op.b = d.source(2, d.width());
  if (combines) op.c = d.source(3, 1, op.c_negated);
  return d.run(setp_of(d.type(), relation));
}

bool decode_select(Decoder& d) {
  const u8 width = d.width();
  if (width < 2 || !d.plain()) return false;
  d.op.d = d.destination(0, width);
  d.op.a = d.source(1, width);
  d.op.b = d.source(2, width);
  d.op.c = d.source(3, 1, d.op.c_negated);
  return d.run(width == 2 ? selp<u16> : width == 4 ? selp<u32> : selp<u64>);
}

}  // namespace emulator
