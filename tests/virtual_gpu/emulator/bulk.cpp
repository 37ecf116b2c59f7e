// cp.async.bulk and cp.async.bulk.tensor: bulk copies through the TMA, in both directions.
#include "bulk.h"

#include <algorithm>
#include <cctype>

#include "decode.h"
#include "global_memory.h"
#include "lanes.h"
#include "mbarrier.h"
#include "numbers.h"
#include "shared_memory.h"
#include "tensor_map.h"

namespace emulator {
namespace {

constexpr u32 kChunk = 16;  // bytes that stay together under every swizzle
constexpr int kTfloat32 = 11;

// f(offset in the box, global address or 0 outside the tensor, bytes) for the runs along the innermost dimension.
template <class F>
void for_runs_in_row(const TensorMap& map, u32 row, u32 elements, i64 first, u64 address, bool inside, F f) {
  const u32 bytes = element_bytes(map), offset = row * elements * bytes;
  const i64 begin = std::max<i64>(0, -first), end = std::min<i64>(elements, i64(map.last[0]) + 1 - first);
  if (!inside || end <= begin) return f(offset, 0, elements * bytes);
  if (begin) f(offset, 0, u32(begin * bytes));
  f(u32(offset + begin * bytes), address + u64((first + begin) * bytes), u32((end - begin) * bytes));
  if (end < elements) f(u32(offset + end * bytes), 0, u32((elements - end) * bytes));
}

template <class F>
void for_tiled_runs(const TensorMap& map, const i32* coordinates, F f) {
  u32 rows = 1;
  for (int i = 1; i < map.rank; ++i) rows *= map.box[i];
  for (u32 row = 0; row < rows; ++row) {
    u32 rest = row;
    bool inside = true;
    u64 address = map.address;
    for (int i = 1; i < map.rank; ++i) {
      const i64 x = i64(coordinates[i]) + rest % map.box[i];
      rest /= map.box[i];
      if (x < 0 || x > i64(map.last[i])) inside = false;
      address += u64(x) * map.strides[i - 1];
    }
    for_runs_in_row(map, row, map.box[0], coordinates[0], address, inside, f);
  }
}

template <class F>
void for_im2col_runs(const TensorMap& map, const i32* coordinates, const u32* offsets, F f) {
  const int spatial = map.rank - 2;
  i64 pixel[3], image = coordinates[map.rank - 1];
  for (int i = 0; i < spatial; ++i) pixel[i] = coordinates[1 + i];
  for (u32 row = 0; row < map.pixels; ++row) {
    bool inside = image >= 0 && image <= i64(map.last[map.rank - 1]);
    u64 address = map.address + u64(image) * map.strides[map.rank - 2];
    for (int i = 0; i < spatial; ++i) {
      const i64 x = pixel[i] + offsets[i];
      if (x < 0 || x > i64(map.last[1 + i])) inside = false;
      address += u64(x) * map.strides[i];
    }
    for_runs_in_row(map, row, map.channels, coordinates[0], address, inside, f);
    int i = 0;  // the next pixel of the bounding box, then the next image
    for (; i < spatial; ++i) {
      pixel[i] += map.element_strides[1 + i];
      if (pixel[i] <= i64(map.last[1 + i]) + map.upper[i]) break;
      pixel[i] = map.lower[i];
    }
    if (i == spatial) ++image;
  }
}

template <class F>
void for_runs(const BulkTransfer& t, F f) {
  if (!t.tensor) return f(0, t.global, t.bytes);
  if (t.map.im2col) return for_im2col_runs(t.map, t.coordinates, t.offsets, f);
  for_tiled_runs(t.map, t.coordinates, f);
}

u32 swizzled(const BulkTransfer& t, u32 address) {
  const u32 chunks = t.tensor ? swizzle_span(t.map.swizzle) / kChunk : 0;
  return chunks ? address ^ (address >> 7 & (chunks - 1)) << 4 : address;
}

void round_to_tf32(u8* data, u32 bytes) {
  for (u32 i = 0; i < bytes; i += 4) {
    u32 word;
    memcpy(&word, data + i, 4);
    if ((word & 0x7f800000) != 0x7f800000) word = round_tf32(word, false);  // NaN and infinity stay
    memcpy(data + i, &word, 4);
  }
}

void land_load(Cta& cta, const BulkTransfer& t) {
  const bool rounds = t.tensor && t.map.data_type >= kTfloat32 && options.tma_tf32_round;
  for_runs(t, [&](u32 offset, u64 from, u32 bytes) {
    const u8* source = from ? global_memory(from, bytes, false) : nullptr;
    if (source) counters.bytes_loaded += bytes;
    for (u32 done = 0; done < bytes;) {
      const u32 address = t.shared + offset + done, step = std::min(bytes - done, kChunk - address % kChunk);
      u8* to = cta.smem.data() + swizzled(t, address);
      if (source) {
        memcpy(to, source + done, step);
      } else {
        memset(to, 0, step);
      }
      if (rounds) round_to_tf32(to, step);
      done += step;
    }
  });
  Mbarrier& barrier = mbarrier_at(cta, t.mbarrier);
  const u32 entry = u32(cta.warps.size() + (&barrier - cta.mbarriers.data()));
  const u32 time = ++barrier.arrived[entry];
  Clock issued = t.clock;
  issued[entry] = 0;
  merge(barrier.arrived, issued);
  record_bulk_write(cta, t.shared, t.bytes, entry, time);
  end_copy_into(cta, t.shared, t.bytes);
  mark_written(cta, nullptr, t.shared, t.bytes);
  barrier.pending_bytes -= t.bytes;
  check_phase(cta, barrier);
}

void read_store(Cta& cta, BulkTransfer& t) {
  async_proxy_read(cta, t.shared, t.bytes, "a bulk store");
  record_bulk_read(cta, cta.warps[t.warp], t.shared, t.bytes, false);
  t.data.resize(t.bytes);
  for (u32 i = 0; i < t.bytes; i += kChunk) memcpy(&t.data[i], cta.smem.data() + swizzled(t, t.shared + i), kChunk);
  t.read = true;
}

void land_store(BulkTransfer& t) {
  t.written = true;
  for_runs(t, [&](u32 offset, u64 to, u32 bytes) {
    if (!to) return;
    memcpy(global_memory(to, bytes, true), &t.data[offset], bytes);
    counters.bytes_stored += bytes;
  });
}

// What loads and stores have in common: the addresses, the tensor map and its box. The list holds the coordinates.
BulkTransfer begin(Context& c, const Instruction& op, int lane, bool store) {
  BulkTransfer t;
  t.store = store;
  t.tensor = op.bulk.tensor;
  t.warp = c.warp.index;
  t.lane = lane;
  t.line = op.line;
  t.shared = shared_address(address_of(c, op, lane));
  const u64 global = lanes<u64>(c, op.c)[lane] + u64(i64(op.c_offset));
  if (t.tensor) {
    t.map = read_tensor_map(global);
    if (t.map.rank != op.bulk.rank || t.map.im2col != op.bulk.im2col)
      fault("the tensor map has rank %d%s, the instruction %d%s", t.map.rank, t.map.im2col ? " im2col" : "",
            op.bulk.rank, op.bulk.im2col ? " im2col" : "");
    for (int i = 0; i < t.map.rank; ++i) t.coordinates[i] = i32(get_lane(c.registers, c.list(op)[i], lane));
    t.bytes = box_bytes(t.map);
    if (t.shared % 128) fault("TMA: shared address %u is not aligned to 128 bytes", t.shared);
    const u32 span = swizzle_span(t.map.swizzle);
    if (span && inner_bytes(t.map) != span)
      fault("TMA: an inner box of %u bytes under a swizzle of %u is not supported by the emulator", inner_bytes(t.map),
            span);
  } else {
    t.global = global;
    t.bytes = lanes<u32>(c, op.e)[lane];
    if (t.bytes % kChunk || global % kChunk || t.shared % kChunk) fault("cp.async.bulk: not aligned to 16 bytes");
    global_memory(global, t.bytes, store);
  }
  counters.bulk_copies++;
  return t;
}

void load(Context& c, const Instruction& op, u32 mask) {
  Cta& cta = c.cta;
  for_lanes(mask, [&](int lane) {
    BulkTransfer t = begin(c, op, lane, false);
    if (op.bulk.im2col)
      for (int i = 0; i < t.map.rank - 2; ++i)
        t.offsets[i] = u16(get_lane(c.registers, c.list(op)[t.map.rank + i], lane));
    t.mbarrier = shared_address(get_lane(c.registers, op.b, lane) + u64(i64(op.b_offset)));
    mbarrier_at(cta, t.mbarrier);
    shared_bytes(cta, t.shared, t.bytes, "bulk write");
    check_pending_stores(cta, t.shared, t.bytes);
    if (options.race) race_write(cta, c.warp, t.shared, t.bytes, RaceWrite::kCheck);
    begin_copy_into(cta, t.shared, t.bytes, "bulk copy");
    t.clock = c.warp.clock;
    if (c.launch.style == kEager) {
      land_load(cta, t);
    } else {
      cta.transfers.push_back(std::move(t));
    }
  });
}

void store(Context& c, const Instruction& op, u32 mask) {
  Cta& cta = c.cta;
  for_lanes(mask, [&](int lane) {
    BulkTransfer t = begin(c, op, lane, true);
    t.group = c.warp.bulk_group[lane];
    async_proxy_read(cta, t.shared, t.bytes, "a bulk store");
    if (options.race) race_read(cta, c.warp, t.shared, t.bytes);
    if (c.launch.style == kEager) {
      read_store(cta, t);
      land_store(t);
    }
    cta.transfers.push_back(std::move(t));
  });
}

void commit(Context& c, const Instruction&, u32 mask) {
  for_lanes(mask, [&](int lane) { c.warp.bulk_group[lane]++; });
}

void wait(Context& c, const Instruction& op, u32 mask) {
  Cta& cta = c.cta;
  Warp& w = c.warp;
  std::erase_if(cta.transfers, [&](BulkTransfer& t) {
    if (!t.store || t.warp != w.index || !(mask >> t.lane & 1)) return false;
    if (i64(t.group) >= i64(w.bulk_group[t.lane]) - op.wait.pending) return false;
    if (!t.read) read_store(cta, t);
    if (!t.released) record_bulk_read(cta, w, t.shared, t.bytes, true);
    t.released = true;
    if ((!op.wait.reads_only || c.launch.random() % 2) && !t.written) land_store(t);
    return t.written;
  });
}

void nothing(Context&, const Instruction&, u32) {}

bool advance_load(Cta& cta, size_t index) {
  const BulkTransfer t = std::move(cta.transfers[index]);
  cta.transfers.erase(cta.transfers.begin() + index);
  land_load(cta, t);
  return true;
}

}  // namespace

bool advance_some_transfer(Cta& cta) {
  std::vector<BulkTransfer>& transfers = cta.transfers;
  if (transfers.empty()) return false;
  const size_t index = cta.launch->random() % transfers.size();
  BulkTransfer& t = transfers[index];
  if (!t.store) return advance_load(cta, index);
  if (!t.read) {
    read_store(cta, t);
    return true;
  }
  if (!t.written) {
    land_store(t);
    if (t.released) transfers.erase(transfers.begin() + index);
    return true;
  }
  const auto next_load =
      std::find_if(transfers.begin(), transfers.end(), [](const BulkTransfer& x) { return !x.store; });
  return next_load != transfers.end() && advance_load(cta, size_t(next_load - transfers.begin()));
}

void finish_transfers(Cta& cta) {
  for (BulkTransfer& t : cta.transfers) {
    if (!t.store) fault("the CTA ends while a bulk load (line %d) into its shared memory is in flight", t.line);
    if (!t.released)
      fault("the CTA ends while a bulk store (line %d) may still read its shared memory: no cp.async.bulk.wait_group",
            t.line);
    if (!t.written) land_store(t);
  }
  cta.transfers.clear();
  for (const Mbarrier& barrier : cta.mbarriers)
    if (barrier.valid && barrier.pending_bytes)
      fault("the CTA ends with %ld bytes expected at the mbarrier at %u: a wrong expect_tx", barrier.pending_bytes,
            barrier.address);
}

// cp.async.bulk.tensor.4d.shared::cluster.global.im2col.mbarrier::complete_tx::bytes [to], [map, {c, w, h, n}], [bar],
// {x, y} cp.async.bulk.global.shared::cta.bulk_group [to], [from], bytes
bool decode_bulk_copy(Decoder& d) {
  Instruction& op = d.op;
  const std::vector<std::string>& m = d.modifiers;
  if (m.size() < 3 || m[0] != "async" || m[1] != "bulk") return false;
  if (m[2] == "commit_group") return d.run(commit);
  if (m[2] == "wait_group") {
    op.wait = {d.integer(0), d.has("read")};
    return d.run(wait);
  }
  if (m[2] == "prefetch") return d.run(nothing);
  d.kernel().async_proxy = true;
  op.bulk = {false, false, 0};
  int direction = 0;  // 1: from global to shared memory, -1: back; the destination is named first
  for (size_t i = 2; i < m.size(); ++i) {
    const std::string& modifier = m[i];
    if (modifier == "tensor") {
      op.bulk.tensor = true;
    } else if (modifier.size() == 2 && isdigit(static_cast<unsigned char>(modifier[0])) && modifier[1] == 'd') {
      op.bulk.rank = u8(modifier[0] - '0');
    } else if (modifier == "shared::cluster" || modifier == "shared::cta") {
      if (!direction) direction = 1;
    } else if (modifier == "global") {
      if (!direction) direction = -1;
    } else if (modifier == "im2col" || modifier == "im2col_no_offs") {
      op.bulk.im2col = true;
    } else if (modifier != "tile" && modifier != "mbarrier::complete_tx::bytes" && modifier != "L2::cache_hint" &&
               modifier != "bulk_group") {
      return false;
    }
  }
  if (!direction) return false;
  const bool loads = direction > 0;
  d.address(loads ? 0 : 1);
  const Operand& global = d.operand(loads ? 1 : 0);
  if (global.kind != Operand::kAddress || global.reg.width != 8) return false;
  op.c = global.reg;
  op.c_offset = i32(global.offset);
  d.begin_list();
  if (op.bulk.tensor && (global.list.empty() || d.append(global.list[0], 4) != op.bulk.rank)) return false;
  size_t next = 2;
  if (!op.bulk.tensor) op.e = d.source(next++, 4);
  if (!loads) return d.run(store);
  const Operand& barrier = d.operand(next++);
  if (barrier.kind != Operand::kAddress) return false;
  op.b = barrier.reg;
  op.b_offset = i32(barrier.offset);
  if (op.bulk.im2col && d.append(d.operand(next), 2) != op.bulk.rank - 2) return false;
  return d.run(load);
}

}  // namespace emulator
