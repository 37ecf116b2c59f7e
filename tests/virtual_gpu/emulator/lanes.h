// Access to the lanes of registers.
#pragma once
#include <cstring>

#include "emulator.h"

namespace emulator {

inline int lowest(u32 mask) { return __builtin_ctz(mask); }
inline int count(u32 mask) { return __builtin_popcount(mask); }

// f(lane) for every lane of a mask.
template <class F>
inline void for_lanes(u32 mask, F f) {
  for (; mask; mask &= mask - 1) f(lowest(mask));
}

// The 32 lanes of a register.
template <class T>
inline T* lanes(u8* registers, Register r) {
  return reinterpret_cast<T*>(registers + r.slot);
}
template <class T>
inline T* lanes(Context& c, Register r) {
  return lanes<T>(c.registers, r);
}

// d[lane] = f(lane). A full warp goes through a buffer, for d may be a source too: the loop becomes vector code.
template <class D, class F>
inline void write_lanes(D* d, u32 mask, F f) {
  if (mask == ~0u) {
    alignas(64) D results[32];
    for (int lane = 0; lane < 32; ++lane) results[lane] = f(lane);
    memcpy(d, results, sizeof results);
  } else {
    for_lanes(mask, [&](int lane) { d[lane] = f(lane); });
  }
}

// One lane of a register of any width.
inline u64 get_lane(u8* registers, Register r, int lane) {
  switch (r.width) {
    case 8:
      return lanes<u64>(registers, r)[lane];
    case 4:
      return lanes<u32>(registers, r)[lane];
    case 2:
      return lanes<u16>(registers, r)[lane];
    default:
      return *lanes<u32>(registers, r) >> lane & 1;
  }
}
inline void set_lane(u8* registers, Register r, int lane, u64 value) {
  switch (r.width) {
    case 8:
      lanes<u64>(registers, r)[lane] = value;
      break;
    case 4:
      lanes<u32>(registers, r)[lane] = u32(value);
      break;
    case 2:
      lanes<u16>(registers, r)[lane] = u16(value);
      break;
    default: {
      u32& word = *lanes<u32>(registers, r);
      word = (word & ~(1u << lane)) | u32(value & 1) << lane;
    }
  }
}

// A predicate's bits, inverted for !p.
inline u32 predicate(Context& c, Register r, bool negated = false) {
  const u32 bits = *lanes<u32>(c, r);
  return negated ? ~bits : bits;
}
inline void set_predicate(u8* registers, Register r, u32 mask, u32 bits) {
  u32& word = *lanes<u32>(registers, r);
  word = (word & ~mask) | (bits & mask);
}

// The address operand [a + offset] in one lane.
inline u64 address_of(Context& c, const Instruction& op, int lane) {
  return op.a.width == 8 ? lanes<u64>(c, op.a)[lane] + u64(op.offset) : u64(lanes<u32>(c, op.a)[lane] + u32(op.offset));
}

// d = Op::apply(a, ...) in every lane: the handlers of most arithmetic.
template <class Op, class D, class A>
void unary(Context& c, const Instruction& op, u32 mask) {
  const A* a = lanes<A>(c, op.a);
  write_lanes(lanes<D>(c, op.d), mask, [=](int lane) { return D(Op::apply(a[lane])); });
}
template <class Op, class D, class A, class B = A>
void binary(Context& c, const Instruction& op, u32 mask) {
  const A* a = lanes<A>(c, op.a);
  const B* b = lanes<B>(c, op.b);
  write_lanes(lanes<D>(c, op.d), mask, [=](int lane) { return D(Op::apply(a[lane], b[lane])); });
}
template <class Op, class D, class A, class B = A, class C = D>
void ternary(Context& c, const Instruction& op, u32 mask) {
  const A* a = lanes<A>(c, op.a);
  const B* b = lanes<B>(c, op.b);
  const C* third = lanes<C>(c, op.c);
  write_lanes(lanes<D>(c, op.d), mask, [=](int lane) { return D(Op::apply(a[lane], b[lane], third[lane])); });
}

// The same for whichever integer has this many bytes; nullptr: none.
template <class Op, class T16, class T32, class T64>
Handler unary_of(int width) {
  switch (width) {
    case 2:
      return unary<Op, T16, T16>;
    case 4:
      return unary<Op, T32, T32>;
    case 8:
      return unary<Op, T64, T64>;
    default:
      return nullptr;
  }
}
template <class Op, class T16, class T32, class T64>
Handler binary_of(int width) {
  switch (width) {
    case 2:
      return binary<Op, T16, T16>;
    case 4:
      return binary<Op, T32, T32>;
    case 8:
      return binary<Op, T64, T64>;
    default:
      return nullptr;
  }
}
template <class Op, class T16, class T32, class T64>
Handler ternary_of(int width) {
  switch (width) {
    case 2:
      return ternary<Op, T16, T16>;
    case 4:
      return ternary<Op, T32, T32>;
    case 8:
      return ternary<Op, T64, T64>;
    default:
      return nullptr;
  }
}
template <class Op>
Handler unsigned_unary(int width) {
  return unary_of<Op, u16, u32, u64>(width);
}
template <class Op>
Handler unsigned_binary(int width) {
  return binary_of<Op, u16, u32, u64>(width);
}
template <class Op>
Handler signed_binary(int width) {
  return binary_of<Op, i16, i32, i64>(width);
}

}  // namespace emulator
