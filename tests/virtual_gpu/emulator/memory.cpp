// ld, st, atom and red.
#include <algorithm>
#include <tuple>

#include "decode.h"
#include "global_memory.h"
#include "lanes.h"
#include "numbers.h"
#include "shared_memory.h"

namespace emulator {
namespace {

// A generic address's own space, and the address in it.
std::pair<Space, u64> specific(Space space, u64 address) {
  if (space == Space::kShared) return {space, shared_address(address)};
  if (space != Space::kGeneric) return {space, address};
  if (address >= kSharedWindow) return {Space::kShared, shared_address(address)};
  if (address >= kLocalWindow) return {Space::kLocal, address - kLocalWindow};
  return {Space::kGlobal, address};
}

u8* local_memory(Context& c, u64 address, u32 bytes, int lane) {
  const u32 size = c.launch.kernel->local_bytes;
  if (address + bytes > size) fault("local access at %lu", address);
  std::vector<u8>& local = c.warp.local;
  if (local.empty()) local.assign(size_t(size) * kWarpSize, 0xff);
  return local.data() + size_t(size) * lane + address;
}

u8* param_memory(Context& c, u64 address, u32 bytes) {
  Kernel& kernel = *c.launch.kernel;
  const u64 begin = reinterpret_cast<u64>(kernel.param_buffer.data());
  if (address < begin || address + bytes > begin + kernel.param_bytes)
    fault("parameter access at byte %ld of %u", i64(address - begin), kernel.param_bytes);
  return reinterpret_cast<u8*>(address);
}

// Any memory but shared.
u8* memory(Context& c, Space space, u64 address, u32 bytes, bool write, int lane) {
  switch (space) {
    case Space::kLocal:
      return local_memory(c, address, bytes, lane);
    case Space::kParam:
      return param_memory(c, address, bytes);
    default:
      return global_memory(address, bytes, write);
  }
}

void check_alignment(u64 address, u32 bytes, const char* access) {
  if (address & (bytes - 1)) fault("%s of %u bytes at %#lx is not aligned", access, bytes, address);
}

const u8* read(Context& c, Space space, u64 address, u32 bytes, int lane) {
  check_alignment(address, bytes, "read");
  std::tie(space, address) = specific(space, address);
  if (space == Space::kShared) return read_shared(c, u32(address), bytes);
  return memory(c, space, address, bytes, false, lane);
}

void write(Context& c, Space space, u64 address, const u8* data, u32 bytes, int lane) {
  check_alignment(address, bytes, "write");
  std::tie(space, address) = specific(space, address);
  if (space == Space::kShared) return write_shared(c, u32(address), data, bytes);
  memcpy(memory(c, space, address, bytes, true, lane), data, bytes);
}

bool reaches_global(Space space) { return space == Space::kGlobal || space == Space::kGeneric; }

u64 sign_extended(u64 value, u32 bytes) {
  const int unused = 64 - 8 * int(bytes);
  return u64(i64(value << unused) >> unused);
}

void load(Context& c, const Instruction& op, u32 mask) {
  const Register* to = c.list(op);
  const MemoryAccess access = op.memory;
  const u32 bytes = access.bytes, n = u32(op.list_size);
  if (access.words) {
    for_lanes(mask, [&](int lane) {
      const u32* from = reinterpret_cast<const u32*>(read(c, access.space, address_of(c, op, lane), 4 * n, lane));
      for (u32 i = 0; i < n; ++i) lanes<u32>(c, to[i])[lane] = from[i];
    });
  } else {
    for_lanes(mask, [&](int lane) {
      const u8* from = read(c, access.space, address_of(c, op, lane), bytes * n, lane);
      for (u32 i = 0; i < n; ++i) {
        u64 value = 0;
        memcpy(&value, from + i * bytes, bytes);
        set_lane(c.registers, to[i], lane, access.sign ? sign_extended(value, bytes) : value);
      }
    });
  }
  if (reaches_global(access.space)) counters.bytes_loaded += u64(bytes) * n * u32(count(mask));
  if (access.yields) c.warp.yielded = true;
}

void store(Context& c, const Instruction& op, u32 mask) {
  const Register* from = c.list(op);
  const MemoryAccess access = op.memory;
  const u32 bytes = access.bytes, n = u32(op.list_size);
  for_lanes(mask, [&](int lane) {
    u8 data[64];
    for (u32 i = 0; i < n; ++i) {
      const u64 value = get_lane(c.registers, from[i], lane);
      memcpy(data + i * bytes, &value, bytes);
    }
    write(c, access.space, address_of(c, op, lane), data, bytes * n, lane);
  });
  if (reaches_global(access.space)) counters.bytes_stored += u64(bytes) * n * u32(count(mask));
}

u64 atomic_add(u64 old, u64 operand, Type type) {
  if (type == Type::kF32) return as_bits(as_float(u32(old)) + as_float(u32(operand)));
  if (type != Type::kF64) return old + operand;
  double x, y;
  memcpy(&x, &old, 8);
  memcpy(&y, &operand, 8);
  x += y;
  memcpy(&old, &x, 8);
  return old;
}

u64 atomic_result(const Atomic& atomic, u64 old, u64 operand, u64 swap) {
  const bool sign = atomic.type == Type::kS32 || atomic.type == Type::kS64;
  const bool less =
      sign ? i64(sign_extended(old, atomic.bytes)) < i64(sign_extended(operand, atomic.bytes)) : old < operand;
  switch (atomic.operation) {
    case AtomicOp::kAdd:
      return atomic_add(old, operand, atomic.type);
    case AtomicOp::kMin:
      return less ? old : operand;
    case AtomicOp::kMax:
      return less ? operand : old;
    case AtomicOp::kExchange:
      return operand;
    case AtomicOp::kCompareAndSwap:
      return old == operand ? swap : old;
    case AtomicOp::kAnd:
      return old & operand;
    case AtomicOp::kOr:
      return old | operand;
    case AtomicOp::kXor:
      return old ^ operand;
    case AtomicOp::kIncrement:
      return old >= operand ? 0 : old + 1;
    case AtomicOp::kDecrement:
      return old == 0 || old > operand ? operand : old - 1;
  }
  return old;
}

void update_atomically(Context& c, const Instruction& op, u32 mask) {
  const u32 bytes = op.atomic.bytes;
  c.warp.yielded = true;
  for_lanes(mask, [&](int lane) {
    const u64 any_address = address_of(c, op, lane);
    check_alignment(any_address, bytes, "atomic");
    const auto [space, address] = specific(op.atomic.space, any_address);
    u8* at =
        space == Space::kShared ? atomic_shared(c, u32(address), bytes) : memory(c, space, address, bytes, true, lane);
    u64 old = 0;
    memcpy(&old, at, bytes);
    const u64 swap = op.c.exists() ? get_lane(c.registers, op.c, lane) : 0;
    const u64 result = atomic_result(op.atomic, old, get_lane(c.registers, op.b, lane), swap);
    memcpy(at, &result, bytes);
    if (op.d.exists()) set_lane(c.registers, op.d, lane, old);
  });
  if (op.atomic.space == Space::kShared) return;
  counters.bytes_loaded += u64(bytes) * u32(count(mask));
  counters.bytes_stored += u64(bytes) * u32(count(mask));
}

bool named_space(const std::string& name, Space& space) {
  if (name == "global" || name == "const")
    space = Space::kGlobal;
  else if (name == "shared" || name == "shared::cta" || name == "shared::cluster")
    space = Space::kShared;
  else if (name == "local")
    space = Space::kLocal;
  else if (name == "param" || name == "param::entry")
    space = Space::kParam;
  else
    return false;
  return true;
}

bool is_scope_or_order(const std::string& name) {
  return name == "relaxed" || name == "acquire" || name == "release" || name == "acq_rel" || name == "weak" ||
         name == "cta" || name == "cluster" || name == "gpu" || name == "sys";
}

bool is_cache_hint(const std::string& name) {
  static const char* const hints[] = {"nc", "ca", "cg", "cs", "lu", "cv", "wb", "wt", "unified", "mmio"};
  return name.starts_with("L1::") || name.starts_with("L2::") ||
         std::find(std::begin(hints), std::end(hints), name) != std::end(hints);
}

}  // namespace

bool decode_load_store(Decoder& d) {  // ld.global.nc.v4.b32 {a, b, c, e}, [p+16]
  Instruction& op = d.op;
  const bool loads = d.opcode != "st";
  MemoryAccess access{Space::kGeneric, u8(element_bytes("." + d.type_name())), d.type_name()[0] == 's', false, false};
  int elements = 1;
  if (access.bytes == 0 || access.bytes > 8) return false;
  for (size_t i = 0; i + 1 < d.modifiers.size(); ++i) {
    const std::string& modifier = d.modifiers[i];
    if (modifier == "v2" || modifier == "v4" || modifier == "v8") {
      elements = modifier[1] - '0';
    } else if (modifier == "volatile" || modifier == "acquire" || modifier == "relaxed") {
      access.yields = loads;
    } else if (!named_space(modifier, access.space) && !is_scope_or_order(modifier) && !is_cache_hint(modifier)) {
      return false;
    }
  }
  d.address(loads ? 1 : 0);
  d.begin_list();
  if (d.append(d.operand(loads ? 0 : 1), loads ? 0 : std::max<u8>(2, access.bytes)) != elements) return false;
  for (int i = 0; i < elements; ++i)
    if (d.kernel().lists[op.list + i].width < access.bytes) return false;
  access.words = access.bytes == 4 && d.list_is_of_words();
  op.memory = access;
  return d.run(loads ? load : store);
}

bool decode_atomic(Decoder& d) {  // atom.global.gpu.add.u32 d, [p], b
  static const char* const names[] = {"add", "min", "max", "exch", "cas", "and", "or", "xor", "inc", "dec"};
  Instruction& op = d.op;
  Atomic atomic{Space::kGeneric, u8(element_bytes("." + d.type_name())), AtomicOp::kAdd, d.type()};
  bool known = false;
  for (size_t i = 0; i + 1 < d.modifiers.size(); ++i) {
    const std::string& modifier = d.modifiers[i];
    const auto name = std::find(std::begin(names), std::end(names), modifier);
    if (name != std::end(names)) {
      atomic.operation = AtomicOp(name - names);
      known = true;
    } else if (!named_space(modifier, atomic.space) && !is_scope_or_order(modifier)) {
      return false;
    }
  }
  const bool is_float = atomic.type >= Type::kF16;
  if (!known || (atomic.bytes != 4 && atomic.bytes != 8)) return false;
  if (is_float && (atomic.operation != AtomicOp::kAdd || atomic.type < Type::kF32 || atomic.type > Type::kF64))
    return false;
  const size_t address = d.opcode == "atom" ? 1 : 0;  // red returns nothing
  if (address) op.d = d.destination(0, atomic.bytes);
  d.address(address);
  op.b = d.source(address + 1, atomic.bytes);
  if (atomic.operation == AtomicOp::kCompareAndSwap) op.c = d.source(address + 2, atomic.bytes);
  op.atomic = atomic;
  return d.run(update_atomically);
}

}  // namespace emulator
