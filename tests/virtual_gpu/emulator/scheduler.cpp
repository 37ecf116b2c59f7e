// Runs warps in an order drawn by the seed, and lets asynchronous copies land in between.
#include "scheduler.h"

#include <algorithm>

#include "async_copy.h"
#include "bulk.h"
#include "control.h"
#include "lanes.h"
#include "special_registers.h"
#include "wgmma.h"

namespace emulator {

u32 Launch::random() {  // xorshift64*
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  random_state ^= random_state << 17;
  return u32((random_state * 0x2545F4914F6CDD1Dull) >> 32);
}

void Cta::wake() {
  for (Warp& w : warps)
    if (w.state == State::kSleeps) w.state = State::kRuns;
}

namespace {

// Chooses the lanes of a diverged warp that run next: those at the lowest instruction, where they wait for the others;
// after a spin also any.
void regroup(Warp& w, Launch& launch) {
  if (!w.live) return;
  const u32 candidates = w.live & ~w.parked;
  if (!candidates)
    fault("a warp-wide instruction is reached by some lanes only: the lanes wait at different instructions");
  u32 pc = ~0u;
  if (w.yielded && launch.random() % 2) {
    u32 rest = candidates;
    for (u32 skip = launch.random() % u32(count(candidates)); skip; --skip) rest &= rest - 1;
    pc = w.lane_pc[lowest(rest)];
  } else {
    for_lanes(candidates, [&](int lane) { pc = std::min(pc, w.lane_pc[lane]); });
  }
  w.active = 0;
  w.other_pc = ~0u;
  for_lanes(w.live, [&](int lane) {
    if (w.lane_pc[lane] == pc) {
      w.active |= 1u << lane;
    } else if (!(w.parked >> lane & 1)) {
      w.other_pc = std::min(w.other_pc, w.lane_pc[lane]);
    }
  });
  w.parked &= ~w.active;
  w.pc = pc;
  w.diverged = w.active != w.live;
}

// Other lanes that stand, or wait, where the active ones have come to join them.
void join(Warp& w, Launch& launch) {
  for_lanes(w.active, [&](int lane) { w.lane_pc[lane] = w.pc; });
  bool parked_here = false;
  for_lanes(w.parked, [&](int lane) { parked_here |= w.lane_pc[lane] == w.pc; });
  if (w.pc >= w.other_pc || parked_here || w.yielded) regroup(w, launch);
  w.yielded = false;
}

// Whether a collective instruction has all its lanes; else the active ones are parked until the others come.
bool complete_collective(Warp& w, const Instruction& op, Launch& launch) {
  u32 needed = w.live;
  if (op.member_mask.exists()) needed &= lanes<u32>(w.registers, op.member_mask)[lowest(w.active)];
  if ((w.active & needed) == needed) return true;
  for_lanes(w.active, [&](int lane) { w.lane_pc[lane] = w.pc; });
  w.parked |= w.active;
  regroup(w, launch);
  return false;
}

// The inner loop: at most `quantum` instructions of a warp.
void execute(Context& c, u32 quantum, u64& warp_instructions, u64& thread_instructions) {
  Warp& w = c.warp;
  const Instruction* code = c.launch.kernel->code.data();
  while (quantum-- && w.state == State::kRuns) {
    if (w.diverged && (w.pc >= w.other_pc || w.parked || w.yielded)) join(w, c.launch);
    const Instruction& op = code[w.pc];
    u32 mask = w.active;
    if (op.guard.exists()) mask &= predicate(c, op.guard, op.guard_negated);
    if (op.collective && w.diverged && mask && !complete_collective(w, op, c.launch)) continue;
    ++warp_instructions;
    thread_instructions += u32(count(mask));
    c.next_pc = w.pc + 1;
    c.active = w.active;
    if (mask) {
      op.run(c, op, mask);
      if (c.next_pc == kRegroup) {
        if (!w.live) {
          w.state = State::kDone;
          return;
        }
        regroup(w, c.launch);
        continue;
      }
    }
    w.pc = c.next_pc;
  }
}

void check_nothing_in_flight(const Warp& w) {
  for (const Wgmma& wgmma : w.wgmmas)
    if (!wgmma.done) fault("warp %d ends with wgmma in flight", w.index);
  if (!w.copies.empty()) fault("warp %d ends with cp.async in flight (line %d): no wait", w.index, w.copies[0].line);
}

void end_warp(Cta& cta, const Warp& w) {
  check_nothing_in_flight(w);
  cta.live_warps--;
  cta.made_progress();
  if (!cta.live_warps) return;
  for (int id = 0; id < 16; ++id) check_barrier(cta, id);  // for all live threads
}

void run_warp(Launch& launch, Cta& cta, Warp& w, u32 quantum) {
  Context c{w.registers, w, cta, launch, 0, 0};
  const Kernel& kernel = *launch.kernel;
  u64 warp_instructions = 0, thread_instructions = 0;
  try {
    execute(c, quantum, warp_instructions, thread_instructions);
  } catch (const Fault& error) {
    u32 pc = std::min<u32>(w.pc, u32(kernel.code.size()) - 1);
    if (w.state == State::kAtBarrier && pc) --pc;
    const int line = kernel.code[pc].line;
    fault("%.100s: CTA (%u, %u, %u), warp %d, lanes %08x, PTX line %d: %s\n    %s", kernel.name.c_str(), cta.id[0],
          cta.id[1], cta.id[2], w.index, w.active, line, error.what(), launch.module->line(line).c_str());
  }
  w.yielded = false;
  launch.executed += warp_instructions;
  counters.warp_instructions += warp_instructions;
  counters.thread_instructions += thread_instructions;
  if (w.state == State::kDone) end_warp(cta, w);
}

std::unique_ptr<Cta> make_cta(Launch& launch, u64 linear_id) {
  auto owned = std::make_unique<Cta>();
  Cta& cta = *owned;
  const Kernel& kernel = *launch.kernel;
  cta.launch = &launch;
  cta.linear_id = linear_id;
  cta.id[0] = u32(linear_id % launch.grid[0]);
  cta.id[1] = u32(linear_id / launch.grid[0] % launch.grid[1]);
  cta.id[2] = u32(linear_id / launch.grid[0] / launch.grid[1]);
  cta.smem_bytes = launch.smem_bytes;
  cta.smem.assign(kSharedBase + cta.smem_bytes + 16, 0xff);
  cta.shadow.assign(kSharedBase + cta.smem_bytes + 16, 0);
  const u32 threads = launch.threads(), warps = (threads + kWarpSize - 1) / kWarpSize;
  if (options.race) {
    const u32 words = cta.smem_bytes / 4 + 2;
    cta.write_clock.assign(words, 0);
    cta.read_clock.assign(size_t(words) * warps, 0);
  }
  const size_t bytes = kernel.initial_registers.size();
  cta.register_files.allocate(bytes * warps);
  cta.warps.resize(warps);
  for (u32 i = 0; i < warps; ++i) {
    Warp& w = cta.warps[i];
    w.cta = &cta;
    w.index = int(i);
    w.registers = cta.register_files.data() + bytes * i;
    memcpy(w.registers, kernel.initial_registers.data(), bytes);
    const u32 live = std::min(u32(kWarpSize), threads - i * kWarpSize);
    w.live = w.active = u32((1ull << live) - 1);
    w.clock.assign(kClockEntries, 0);
    w.clock[i] = 1;
    set_special_registers(w);
  }
  cta.live_warps = int(warps);
  counters.ctas++;
  return owned;
}

class Scheduler {
 public:
  explicit Scheduler(Launch& launch) : launch_(launch) {
    total_ = u64(launch.grid[0]) * launch.grid[1] * launch.grid[2];
    if (options.first > 0) next_ = std::min(u64(options.first), total_);
    if (options.first < 0) next_ = total_ - std::min(total_, u64(-options.first));
    if (options.shuffle && !options.first) {
      order_.resize(total_);
      for (u64 i = 0; i < total_; ++i) order_[i] = i;
      for (u64 i = total_; i > 1; --i) std::swap(order_[i - 1], order_[launch.random() % i]);
    }
  }

  void run() {
    while (next_ < total_ && i64(ctas_.size()) < options.resident) start();
    while (!ctas_.empty()) {
      const auto [cta, w] = choose();
      if (!w) continue;
      const u32 longest = 2u << launch_.random() % 10;
      run_warp(launch_, *cta, *w, std::min(1 + launch_.random() % longest, u32(options.quantum)));
      check_limits();
      advance_copies(*cta);
      if (cta->live_warps == 0) end(*cta);
    }
  }

 private:
  void start() {
    ctas_.push_back(make_cta(launch_, order_.empty() ? next_ : order_[next_]));
    ++next_;
  }

  // A warp that can run; none where something had to be woken first.
  std::pair<Cta*, Warp*> choose() {
    ready_.clear();
    for (auto& cta : ctas_)
      for (Warp& w : cta->warps)
        if (w.state == State::kRuns) ready_.push_back({cta.get(), &w});
    if (!ready_.empty()) return ready_[launch_.random() % ready_.size()];
    if (!advance_all() && !poll_again()) throw Fault(name() + ": deadlock: every warp waits" + where());
    return {nullptr, nullptr};
  }

  bool advance_all() {
    bool any = false;
    for (auto& cta : ctas_) in_flight(*cta, [&] { any |= advance_some_transfer(*cta); });
    if (!any) return false;
    launch_.progress = launch_.executed;
    for (auto& cta : ctas_) cta->wake();
    idle_ = 0;
    return true;
  }

  bool poll_again() {  // warps that sleep may wait for another that polls, too: some rounds
    if (launch_.progress != seen_progress_) seen_progress_ = launch_.progress, idle_ = 0;
    bool any = false;
    for (auto& cta : ctas_)
      for (Warp& w : cta->warps) any |= w.state == State::kSleeps;
    for (auto& cta : ctas_) cta->wake();
    return any && ++idle_ < 500;
  }

  void check_limits() const {
    if (i64(launch_.executed - launch_.progress) > options.stall)
      throw Fault(name() + ": no barrier completed and no warp ended in " + std::to_string(options.stall) +
                  " warp instructions" + where());
    if (i64(launch_.executed) > options.limit)
      throw Fault(name() + ": the limit of " + std::to_string(options.limit) + " warp instructions is reached" +
                  where());
  }

  void advance_copies(Cta& cta) {
    // a warp that spins on global memory keeps everyone busy while a copy that it waits for indirectly is in flight
    if (launch_.style != kEager && launch_.executed - launch_.progress > 20000 && one_in_four()) {
      Cta& other = *ctas_[launch_.random() % ctas_.size()];
      in_flight(other, [&] {
        if (advance_some_transfer(other)) launch_.progress = launch_.executed;
      });
    }
    if (launch_.style != kRandom) return;
    in_flight(cta, [&] {
      if (one_in_four()) advance_some_transfer(cta);
      if (one_in_four()) complete_next_wgmma(some_warp(cta));
      if (one_in_four()) land_some_copy(some_warp(cta));
    });
  }
  bool one_in_four() { return launch_.random() % 4 == 0; }
  Warp& some_warp(Cta& cta) { return cta.warps[launch_.random() % cta.warps.size()]; }

  void end(Cta& cta) {
    in_flight(cta, [&] { finish_transfers(cta); });
    std::erase_if(ctas_, [&](const auto& owned) { return owned.get() == &cta; });
    if (next_ < total_) start();
  }

  // What goes wrong between the instructions of warps happens to a CTA.
  template <class F>
  void in_flight(const Cta& cta, F advance) const {
    try {
      advance();
    } catch (const Fault& error) {
      throw Fault(name() + ": CTA " + std::to_string(cta.linear_id) + ": " + error.what() + where());
    }
  }

  std::string name() const { return launch_.kernel->name.substr(0, 100); }

  // What every warp and mbarrier waits for.
  std::string where() const {
    static const char* const states[] = {"runs", "waits at a barrier", "waits for an mbarrier", "is done"};
    const std::vector<Instruction>& code = launch_.kernel->code;
    std::string text;
    int lines = 0;
    for (const auto& cta : ctas_)
      for (const Warp& w : cta->warps) {
        if (w.state == State::kDone || ++lines > 24) continue;
        const bool at_barrier = w.state == State::kAtBarrier;
        const int line = at_barrier ? w.barrier->line : code[std::min<size_t>(w.pc, code.size() - 1)].line;
        text += "\n    CTA " + std::to_string(cta->linear_id) + " warp " + std::to_string(w.index) + " " +
                states[int(w.state)] + ", PTX line " + std::to_string(line) + ": " +
                launch_.module->line(line).substr(0, 100);
      }
    for (const auto& cta : ctas_)
      for (const Mbarrier& barrier : cta->mbarriers) {
        if (!barrier.valid || ++lines > 60) continue;
        text += "\n    CTA " + std::to_string(cta->linear_id) + " mbarrier at " + std::to_string(barrier.address) +
                ": phase " + std::to_string(barrier.phase) + ", " + std::to_string(barrier.pending) + " of " +
                std::to_string(barrier.expected) + " arrivals outstanding, " + std::to_string(barrier.pending_bytes) +
                " bytes outstanding";
      }
    return text;
  }

  Launch& launch_;
  u64 total_, next_ = 0;
  std::vector<u64> order_;
  std::vector<std::unique_ptr<Cta>> ctas_;
  std::vector<std::pair<Cta*, Warp*>> ready_;
  u64 seen_progress_ = 0;
  int idle_ = 0;
};

}  // namespace

void run(Launch& launch) { Scheduler(launch).run(); }

}  // namespace emulator
