// mbarriers: arrivals and bytes of bulk copies that complete a phase.
#include "mbarrier.h"

#include <algorithm>

#include "decode.h"
#include "lanes.h"
#include "shared_memory.h"

namespace emulator {

Mbarrier& mbarrier_at(Cta& cta, u32 address) {
  for (Mbarrier& barrier : cta.mbarriers)
    if (barrier.address == address && barrier.valid) return barrier;
  fault("no mbarrier was initialised at shared address %u", address);
}

void check_phase(Cta& cta, Mbarrier& barrier) {
  if (barrier.pending || barrier.pending_bytes) return;
  barrier.phase++;
  barrier.pending = barrier.expected;
  barrier.completed = barrier.arrived;
  cta.made_progress();
  cta.wake();
}

namespace {

constexpr u32 kBytes = 8;

void initialise(Cta& cta, Warp& w, u32 address, u64 count) {
  auto at_address = [&](const Mbarrier& barrier) { return barrier.address == address; };
  auto barrier = std::find_if(cta.mbarriers.begin(), cta.mbarriers.end(), at_address);
  if (barrier != cta.mbarriers.end() && barrier->valid)
    fault("mbarrier.init of the mbarrier at %u, which is live", address);
  if (cta.warps.size() + cta.mbarriers.size() >= kClockEntries - 6) fault("too many mbarriers");
  if (count == 0 || count >= 1 << 20) fault("mbarrier.init with count %lu", count);
  if (barrier == cta.mbarriers.end()) {  // one that is initialised again keeps its clocks
    Mbarrier fresh;
    fresh.address = address;
    fresh.arrived.assign(kClockEntries, 0);
    fresh.completed.assign(kClockEntries, 0);
    barrier = cta.mbarriers.insert(cta.mbarriers.end(), std::move(fresh));
  }
  barrier->expected = barrier->pending = i32(count);
  barrier->pending_bytes = 0;
  barrier->phase = 0;
  barrier->valid = true;
  if (options.race) race_write(cta, w, address, kBytes, RaceWrite::kCheckAndRecord);
  u8* shadow = cta.shadow.data() + address;
  for (u32 i = 0; i < kBytes; ++i) {
    if (shadow[i] >= kInFlight) fault("mbarrier.init at %u under an asynchronous copy", address);
    shadow[i] = kWritten;
  }
}

void invalidate(Cta& cta, Warp& w, Mbarrier& barrier) {
  barrier.valid = false;
  for (const BulkTransfer& t : cta.transfers)
    if (!t.store && t.mbarrier == barrier.address)
      fault("mbarrier.inval at %u while a bulk copy will complete on it (line %d)", barrier.address, t.line);
  if (barrier.pending_bytes)
    fault("mbarrier.inval at %u with %ld bytes expected", barrier.address, barrier.pending_bytes);
  cta.shadow[barrier.address] = 0;
  if (options.race) race_write(cta, w, barrier.address, kBytes, RaceWrite::kCheckAndRecord);
}

void arrive(Cta& cta, Warp& w, Mbarrier& barrier, i32 arrivals) {
  merge(barrier.arrived, w.clock);
  if (barrier.pending < arrivals)
    fault("mbarrier at %u: more arrivals than its count of %d in one phase", barrier.address, barrier.expected);
  barrier.pending -= arrivals;
  check_phase(cta, barrier);
}

bool completed(const Mbarrier& barrier, MbarrierOp operation, u32 wanted) {
  return operation == MbarrierOp::kWaitParity ? (barrier.phase & 1) != (wanted & 1) : barrier.phase != wanted;
}

void mbarrier(Context& c, const Instruction& op, u32 mask) {
  Cta& cta = c.cta;
  Warp& w = c.warp;
  for_lanes(mask, [&](int lane) {
    const u32 address = shared_address(address_of(c, op, lane));
    if (address % kBytes) fault("mbarrier at %u is not aligned to 8 bytes", address);
    shared_bytes(cta, address, kBytes, "mbarrier");
    const u64 b = op.b.exists() ? get_lane(c.registers, op.b, lane) : 1;  // a count, bytes or a phase
    if (op.mbarrier == MbarrierOp::kInit) return initialise(cta, w, address, b);
    Mbarrier& barrier = mbarrier_at(cta, address);
    switch (op.mbarrier) {
      case MbarrierOp::kInvalidate:
        invalidate(cta, w, barrier);
        break;
      case MbarrierOp::kArrive:
      case MbarrierOp::kArriveExpect: {
        const bool expects = op.mbarrier == MbarrierOp::kArriveExpect;
        if (expects) barrier.pending_bytes += i64(b);
        if (op.d.exists()) set_lane(c.registers, op.d, lane, barrier.phase);
        arrive(cta, w, barrier, expects ? 1 : i32(b));
        break;
      }
      case MbarrierOp::kExpect:
        barrier.pending_bytes += i64(b);
        break;
      case MbarrierOp::kComplete:
        barrier.pending_bytes -= i64(b);
        check_phase(cta, barrier);
        break;
      default: {
        const bool done = completed(barrier, op.mbarrier, u32(b));
        set_predicate(c.registers, op.d, 1u << lane, done ? ~0u : 0);
        if (done) {
          merge(w.clock, barrier.completed);
          w.synchronised = cta.epoch;
        } else {
          w.state = State::kSleeps;
          w.yielded = true;
        }
      }
    }
  });
  if (op.mbarrier == MbarrierOp::kArrive || op.mbarrier == MbarrierOp::kArriveExpect) {
    w.clock[w.index]++;
    cta.epoch++;
  }
}

}  // namespace

bool decode_mbarrier(Decoder& d) {  // mbarrier.arrive.expect_tx.shared::cta.b64 _, [bar], bytes
  Instruction& op = d.op;
  if (d.modifiers.empty() || d.has("noComplete")) return false;
  const std::string& what = d.modifiers[0];
  size_t address = 0;
  if (what == "init") {
    op.mbarrier = MbarrierOp::kInit;
  } else if (what == "inval") {
    op.mbarrier = MbarrierOp::kInvalidate;
  } else if (what == "expect_tx") {
    op.mbarrier = MbarrierOp::kExpect;
  } else if (what == "complete_tx") {
    op.mbarrier = MbarrierOp::kComplete;
  } else if (what == "arrive") {
    op.mbarrier = d.has("expect_tx") ? MbarrierOp::kArriveExpect : MbarrierOp::kArrive;
    address = d.operand(0).kind == Operand::kAddress ? 0 : 1;
    if (address && d.operand(0).kind == Operand::kRegister) op.d = d.operand(0).reg;
  } else if (what == "try_wait" || what == "test_wait") {
    op.mbarrier = d.has("parity") ? MbarrierOp::kWaitParity : MbarrierOp::kWait;
    op.d = d.destination(0, 1);
    address = 1;
  } else {
    return false;
  }
  d.address(address);
  const bool optional = op.mbarrier == MbarrierOp::kArrive || op.mbarrier == MbarrierOp::kInvalidate;
  if (!optional || d.size() > address + 1) op.b = d.any(d.operand(address + 1), 4);
  return d.run(mbarrier);
}

}  // namespace emulator
