// Moves: mov with packing and unpacking, address spaces, clusters of one CTA, and instructions that do nothing here.
#include "decode.h"
#include "lanes.h"

namespace emulator {
namespace {

struct Same {
  template <class T>
  static T apply(T a) {
    return a;
  }
};

u64 low_bits(int bits) { return bits == 64 ? ~0ull : (1ull << bits) - 1; }

void unpack(Context& c, const Instruction& op, u32 mask) {  // {d, ...} = a
  const Register* parts = c.list(op);
  const int bits = 8 * op.a.width / op.list_size;
  for_lanes(mask, [&](int lane) {
    const u64 value = get_lane(c.registers, op.a, lane);
    for (int i = 0; i < op.list_size; ++i) set_lane(c.registers, parts[i], lane, value >> (bits * i) & low_bits(bits));
  });
}

void pack(Context& c, const Instruction& op, u32 mask) {  // d = {a, ...}
  const Register* parts = c.list(op);
  const int bits = 8 * op.d.width / op.list_size;
  for_lanes(mask, [&](int lane) {
    u64 value = 0;
    for (int i = 0; i < op.list_size; ++i)
      value |= (get_lane(c.registers, parts[i], lane) & low_bits(bits)) << (bits * i);
    set_lane(c.registers, op.d, lane, value);
  });
}

void read_clock(Context& c, const Instruction& op, u32 mask) {
  for_lanes(mask, [&](int lane) { set_lane(c.registers, op.d, lane, c.launch.executed); });
}

void add_offset(Context& c, const Instruction& op, u32 mask) {
  const u64* a = lanes<u64>(c, op.a);
  const u64 offset = u64(op.offset);
  write_lanes(lanes<u64>(c, op.d), mask, [=](int lane) { return a[lane] + offset; });
}

void nothing(Context&, const Instruction&, u32) {}

bool is_clock(const Operand& o) {
  return o.kind == Operand::kSymbol && (o.name == "%clock" || o.name == "%clock_hi" || o.name == "%clock64" ||
                                        o.name == "%globaltimer" || o.name == "%globaltimer_lo");
}

}  // namespace

bool decode_move(Decoder& d) {
  const u8 width = d.width();
  if (!d.plain() || width < 2) return false;
  Instruction& op = d.op;
  const Operand &to = d.operand(0), &from = d.operand(1);
  if (is_clock(from)) {
    op.d = d.destination(0, width);
    return d.run(read_clock);
  }
  if (to.kind == Operand::kList) {
    d.begin_list();
    d.append(to, 0);
    op.a = d.source(1, width);
    return d.run(unpack);
  }
  if (from.kind == Operand::kList) {
    d.begin_list();
    d.append(from, u8(width / from.list.size()));
    op.d = d.destination(0, width);
    return d.run(pack);
  }
  return d.sources(unsigned_unary<Same>(width), 1, width);
}

bool decode_cvta(Decoder& d) {  // cvta.to.shared.u64, cvta.shared.u64
  const bool to = d.has("to");
  if (d.width() != 8 || d.modifiers.size() != (to ? 3 : 2)) return false;
  const std::string& space = d.modifiers[to ? 1 : 0];
  if (space == "global" || space == "const" || space == "param") return d.sources(unary<Same, u64, u64>, 1, 8);
  if (space != "shared" && space != "local") return false;
  d.op.offset = i64(space == "shared" ? kSharedWindow : kLocalWindow);
  if (to) d.op.offset = -d.op.offset;
  return d.sources(add_offset, 1, 8);
}

bool decode_mapa(Decoder& d) {  // the address in the only CTA of the cluster
  if (d.type_name() == "u64") return d.sources(unary<Same, u64, u64>, 1, 8);
  return d.sources(unary<Same, u32, u32>, 1, 4);
}

bool decode_policy(Decoder& d) {
  d.op.d = d.op.a = d.destination(0, 8);  // no cache: the value doesn't matter
  return d.run(unary<Same, u64, u64>);
}

bool decode_nothing(Decoder& d) { return d.run(nothing); }

}  // namespace emulator
