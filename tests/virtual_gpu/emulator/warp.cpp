// Between a warp's lanes: shuffles, votes, reductions, elections.
#include <algorithm>

#include "decode.h"
#include "lanes.h"

namespace emulator {
namespace {

enum class Shuffle { kUp, kDown, kButterfly, kIndex };

constexpr u32 kGarbage = 0x7fffdead;  // what a lane gets from one that takes no part

template <Shuffle Mode>
void shuffle(Context& c, const Instruction& op, u32 mask) {
  const u32 *a = lanes<u32>(c, op.a), *b = lanes<u32>(c, op.b), *control = lanes<u32>(c, op.c);
  const u32* member_masks = lanes<u32>(c, op.member_mask);
  u32 results[kWarpSize], in_range = 0;
  for_lanes(mask, [&](int lane) {
    const u32 clamp = control[lane] & 31, segment = control[lane] >> 8 & 31, offset = b[lane] & 31;
    const int first = int(lane & segment), last = int((lane & segment) | (clamp & ~segment));
    int from = lane;
    bool ok = false;
    switch (Mode) {
      case Shuffle::kUp:
        from = lane - int(offset), ok = from >= last;
        break;
      case Shuffle::kDown:
        from = lane + int(offset), ok = from <= last;
        break;
      case Shuffle::kButterfly:
        from = lane ^ int(offset), ok = from <= last;
        break;
      case Shuffle::kIndex:
        from = first | int(offset & ~segment), ok = from <= last;
        break;
    }
    if (!ok) from = lane;
    const u32 member = member_masks[lane];
    if (!(member >> lane & 1)) fault("shfl.sync by a lane outside the member mask %08x", member);
    results[lane] = (mask & member) >> from & 1 ? a[from] : kGarbage;
    in_range |= u32(ok) << lane;
  });
  u32* d = lanes<u32>(c, op.d);
  for_lanes(mask, [&](int lane) { d[lane] = results[lane]; });
  if (op.p.exists()) set_predicate(c.registers, op.p, mask, in_range);
}

struct All {
  static bool apply(u32 votes, u32 mask) { return votes == mask; }
};
struct Any {
  static bool apply(u32 votes, u32) { return votes != 0; }
};
struct Uniform {
  static bool apply(u32 votes, u32 mask) { return votes == mask || !votes; }
};
template <class Op>
void vote(Context& c, const Instruction& op, u32 mask) {
  const bool result = Op::apply(predicate(c, op.a, op.a_negated) & mask, mask);
  set_predicate(c.registers, op.d, mask, result ? ~0u : 0);
}
void ballot(Context& c, const Instruction& op, u32 mask) {
  const u32 votes = predicate(c, op.a, op.a_negated) & mask;
  u32* d = lanes<u32>(c, op.d);
  for_lanes(mask, [&](int lane) { d[lane] = votes; });
}

template <class T, T (*Op)(T, T)>
void reduce(Context& c, const Instruction& op, u32 mask) {
  const T* a = lanes<T>(c, op.a);
  T result = a[lowest(mask)];
  for_lanes(mask & (mask - 1), [&](int lane) { result = Op(result, a[lane]); });
  T* d = lanes<T>(c, op.d);
  for_lanes(mask, [&](int lane) { d[lane] = result; });
}
template <class T>
T minimum(T a, T b) {
  return std::min(a, b);
}
template <class T>
T maximum(T a, T b) {
  return std::max(a, b);
}
u32 sum(u32 a, u32 b) { return a + b; }
u32 conjunction(u32 a, u32 b) { return a & b; }
u32 disjunction(u32 a, u32 b) { return a | b; }
u32 parity(u32 a, u32 b) { return a ^ b; }

void elect(Context& c, const Instruction& op, u32 mask) {
  const u32 leader = u32(lowest(mask));
  u32* d = lanes<u32>(c, op.d);
  for_lanes(mask, [&](int lane) { d[lane] = leader; });
  set_predicate(c.registers, op.p, mask, 1u << leader);
}

void active_mask(Context& c, const Instruction& op, u32 mask) {
  u32* d = lanes<u32>(c, op.d);
  for_lanes(mask, [&](int lane) { d[lane] = c.active; });
}

}  // namespace

bool decode_shuffle(Decoder& d) {
  if (!d.has("sync")) return false;
  Instruction& op = d.op;
  op.collective = true;
  op.d = d.destination(0, 4);
  op.p = d.operand(0).second;
  op.a = d.source(1, 4);
  op.b = d.source(2, 4);
  op.c = d.source(3, 4);
  op.member_mask = d.source(4, 4);
  if (d.has("up")) return d.run(shuffle<Shuffle::kUp>);
  if (d.has("down")) return d.run(shuffle<Shuffle::kDown>);
  if (d.has("bfly")) return d.run(shuffle<Shuffle::kButterfly>);
  return d.has("idx") && d.run(shuffle<Shuffle::kIndex>);
}

bool decode_vote(Decoder& d) {
  if (!d.has("sync")) return false;
  Instruction& op = d.op;
  op.collective = true;
  op.d = d.destination(0, d.has("ballot") ? 4 : 1);
  op.a = d.source(1, 1, op.a_negated);
  op.member_mask = d.source(2, 4);
  if (d.has("all")) return d.run(vote<All>);
  if (d.has("any")) return d.run(vote<Any>);
  if (d.has("uni")) return d.run(vote<Uniform>);
  return d.has("ballot") && d.run(ballot);
}

bool decode_reduce(Decoder& d) {
  if (!d.has("sync") || d.width() != 4) return false;
  const bool sign = d.type() == Type::kS32;
  Instruction& op = d.op;
  op.collective = true;
  op.d = d.destination(0, 4);
  op.a = d.source(1, 4);
  op.member_mask = d.source(2, 4);
  if (d.has("add")) return d.run(reduce<u32, sum>);
  if (d.has("min")) return d.run(sign ? reduce<i32, minimum<i32>> : reduce<u32, minimum<u32>>);
  if (d.has("max")) return d.run(sign ? reduce<i32, maximum<i32>> : reduce<u32, maximum<u32>>);
  if (d.has("and")) return d.run(reduce<u32, conjunction>);
  if (d.has("or")) return d.run(reduce<u32, disjunction>);
  return d.has("xor") && d.run(reduce<u32, parity>);
}

bool decode_elect(Decoder& d) {
  d.op.collective = true;
  d.op.d = d.destination(0, 4);
  d.op.p = d.operand(0).second;
  d.op.member_mask = d.source(1, 4);
  return d.op.p.exists() && d.run(elect);
}

bool decode_active_mask(Decoder& d) {
  d.op.d = d.destination(0, 4);
  return d.run(active_mask);
}

}  // namespace emulator
