// wgmma: D (64 x n, 16 rows a warp) += A (64 x k) B (k x n). Products are exact, sums in float32 in order of k.
#include "wgmma.h"

#include <algorithm>
#include <cstdio>

#include "decode.h"
#include "lanes.h"
#include "numbers.h"
#include "shared_memory.h"

namespace emulator {
namespace {

constexpr int kWarpgroup = 4;  // warps
constexpr int kRows = 16;      // of D in each warp
constexpr int kChunk = 16;     // bytes that stay together under every swizzle
constexpr int kMaximumN = 256;

struct Descriptor {  // of a matrix in shared memory
  u32 start, leading_bytes, stride_bytes;
  int swizzle;  // bytes: 0, 32, 64, 128
};
Descriptor descriptor(u64 bits) {
  static const int swizzles[] = {0, 128, 64, 32};
  if (bits >> 49 & 7)
    fault("wgmma: a base offset in the matrix descriptor %#lx is not supported by the emulator", bits);
  auto field = [bits](int at) { return u32(bits >> at & 0x3fff) << 4; };
  return {field(0), field(16), field(32), swizzles[bits >> 62]};
}

u32 swizzled(u32 address, int swizzle) {
  const u32 chunks = u32(swizzle / kChunk);
  return chunks ? address ^ (address >> 7 & (chunks - 1)) << 4 : address;
}

// f(row, k, address) for the 16-byte chunks of rows first ... first + rows. A chunk goes on along k; where the matrix
// is transposed (MN-major), along the rows.
template <class F>
void for_chunks(const Descriptor& d, bool transposed, int first, int rows, int element_bytes, F f) {
  if (!transposed) {
    for (int row = first; row < first + rows; ++row)
      for (int half = 0; half < 2; ++half) {
        const u32 group = u32(row / 8) * d.stride_bytes;
        const u32 offset = d.swizzle ? group + u32(row % 8) * d.swizzle + half * kChunk
                                     : group + u32(row % 8) * kChunk + half * d.leading_bytes;
        f(row, half * kChunk / element_bytes, swizzled(d.start + offset, d.swizzle));
      }
    return;
  }
  const int per_span = d.swizzle / kChunk;
  for (int group = first / 8; group < (first + rows) / 8; ++group)
    for (int k = 0; k < 16; ++k) {
      const u32 offset = d.swizzle ? u32(group / per_span) * d.leading_bytes + u32(group % per_span) * kChunk +
                                         u32(k % 8) * d.swizzle + u32(k / 8) * d.stride_bytes
                                   : u32(group) * d.stride_bytes + u32(k % 8) * kChunk + u32(k / 8) * d.leading_bytes;
      f(group * 8, k, swizzled(d.start + offset, d.swizzle));
    }
}

int element_bytes(const MatrixMultiply& mma) { return mma.type == Type::kTF32 ? 4 : 2; }
int first_row(const Warp& w) { return kRows * (w.index % kWarpgroup); }

template <class F>
void for_operand_chunks(const Warp& w, const Wgmma& wgmma, F f) {
  const MatrixMultiply& mma = wgmma.instruction->mma;
  auto address_only = [&](int, int, u32 address) { f(address); };
  if (!mma.a_in_registers)
    for_chunks(descriptor(wgmma.a_descriptor), mma.a_transposed, first_row(w), kRows, element_bytes(mma), address_only);
  for_chunks(descriptor(wgmma.b_descriptor), mma.b_transposed, 0, mma.n, element_bytes(mma), address_only);
}

void begin_reads(Warp& w, const Wgmma& wgmma) {
  if (!options.race) return;
  for_operand_chunks(w, wgmma, [&](u32 address) { begin_wgmma_read(*w.cta, w, address, kChunk); });
}
void end_reads(Warp& w, const Wgmma& wgmma) {
  if (!options.race) return;
  for_operand_chunks(w, wgmma, [&](u32 address) { end_wgmma_read(*w.cta, w, address, kChunk); });
}

float element(Type type, const u8* bits) {
  if (type == Type::kTF32) {
    u32 word;
    memcpy(&word, bits, 4);
    return truncate_tf32(word);
  }
  u16 half;
  memcpy(&half, bits, 2);
  return type == Type::kF16 ? half_to_float(half) : bfloat_to_float(half);
}

// put(row, k, value) for a matrix in shared memory.
template <class F>
void read_matrix(Warp& w, const MatrixMultiply& mma, u64 bits, bool transposed, int first, int rows, F put) {
  const int bytes = element_bytes(mma);
  for_chunks(descriptor(bits), transposed, first, rows, bytes, [&](int row, int k, u32 address) {
    const u8* chunk = async_proxy_read(*w.cta, address, kChunk, "wgmma");
    for (int i = 0; i < kChunk / bytes; ++i) {
      const float value = element(mma.type, chunk + i * bytes);
      if (transposed) {
        put(row + i, k, value);
      } else {
        put(row, k + i, value);
      }
    }
  });
}

using A = float[kRows][16];

void read_a_registers(const Warp& w, const MatrixMultiply& mma, const Register* registers, A& a) {
  for (int i = 0; i < 4; ++i) {  // they alternate between the upper and the lower 8 rows
    const u32* source = lanes<u32>(w.registers, registers[i]);
    for (int lane = 0; lane < kWarpSize; ++lane) {
      float* row = a[lane / 4 + i % 2 * 8];
      const u8* bits = reinterpret_cast<const u8*>(&source[lane]);
      if (mma.type == Type::kTF32) {
        row[lane % 4 + i / 2 * 4] = element(mma.type, bits);
      } else {
        row[lane % 4 * 2 + i / 2 * 8] = element(mma.type, bits);
        row[lane % 4 * 2 + i / 2 * 8 + 1] = element(mma.type, bits + 2);
      }
    }
  }
}

void compute(Warp& w, Wgmma& wgmma) {
  const Instruction& op = *wgmma.instruction;
  const MatrixMultiply& mma = op.mma;
  const Register* d = w.cta->launch->kernel->lists.data() + op.list;
  alignas(64) A a;
  alignas(64) static float b[16][kMaximumN], sums[kRows][kMaximumN];
  if (mma.a_in_registers) {
    read_a_registers(w, mma, d + mma.n / 2, a);
  } else {
    const int first = first_row(w);
    read_matrix(w, mma, wgmma.a_descriptor, mma.a_transposed, first, kRows,
                [&](int row, int k, float value) { a[row - first][k] = value; });
  }
  read_matrix(w, mma, wgmma.b_descriptor, mma.b_transposed, 0, mma.n,
              [&](int column, int k, float value) { b[k][column] = value; });
  auto accumulator = [](int lane, int i) -> float& {
    return sums[lane / 4 + i / 2 % 2 * 8][i / 4 * 8 + lane % 4 * 2 + i % 2];
  };
  for (int i = 0; i < mma.n / 2; ++i) {
    const float* source = lanes<float>(w.registers, d[i]);
    for (int lane = 0; lane < kWarpSize; ++lane) accumulator(lane, i) = wgmma.accumulates ? source[lane] : 0.f;
  }
  for (int row = 0; row < kRows; ++row)
    for (int k = 0; k < mma.k; ++k) {
      const float x = mma.scale * a[row][k];
      for (int column = 0; column < mma.n; ++column)
        sums[row][column] = __builtin_fmaf(x, b[k][column], sums[row][column]);
    }
  for (int i = 0; i < mma.n / 2; ++i) {
    float* result = lanes<float>(w.registers, d[i]);
    for (int lane = 0; lane < kWarpSize; ++lane) result[lane] = accumulator(lane, i);
  }
  wgmma.done = true;
  counters.mma++;
}

void issue(Context& c, const Instruction& op, u32 mask) {
  Warp& w = c.warp;
  if (c.launch.threads() % (kWarpgroup * kWarpSize)) fault("wgmma in a CTA that is no multiple of four warps");
  const int leader = lowest(mask);
  auto descriptor_in = [&](Register r, int lane) { return r.exists() ? lanes<u64>(c, r)[lane] : 0; };
  const bool accumulates = op.p.exists() ? predicate(c, op.p) >> leader & 1 : op.mma.accumulates;
  const Wgmma wgmma{&op, descriptor_in(op.a, leader), descriptor_in(op.b, leader), accumulates, w.wgmma_group};
  for_lanes(mask, [&](int lane) {
    if (descriptor_in(op.a, lane) != wgmma.a_descriptor || descriptor_in(op.b, lane) != wgmma.b_descriptor)
      fault("wgmma: the descriptors differ between the lanes");
  });
  begin_reads(w, wgmma);
  w.wgmmas.push_back(wgmma);
  if (c.launch.style == kEager) compute(w, w.wgmmas.back());
}

void nothing(Context&, const Instruction&, u32) {}

void commit(Context& c, const Instruction&, u32) {
  c.warp.wgmma_group++;
  c.cta.wake();
}

// A wgmma completes for its whole warpgroup: the wait holds until the other three warps have committed the group too,
// and then none of the four reads shared memory for it any more. (CUTLASS overwrites the main loop's buffers without a
// barrier after it.)
void wait(Context& c, const Instruction& op, u32) {
  Warp& w = c.warp;
  Cta& cta = c.cta;
  const i64 end = i64(w.wgmma_group) - op.wait.pending;  // of the groups that must be complete
  const int first = w.index / kWarpgroup * kWarpgroup;
  for (int k = first; k < first + kWarpgroup; ++k) {
    const Warp& other = cta.warps[k];
    if (i64(other.wgmma_group) >= end) continue;
    if (other.state == State::kDone)
      fault("wgmma.wait_group: warp %d ended with fewer wgmma groups than warp %d", k, w.index);
    c.next_pc = w.pc;  // again, when another has committed
    w.state = State::kSleeps;
    return;
  }
  for (int k = first; k < first + kWarpgroup; ++k) {
    Warp& other = cta.warps[k];
    const auto rest = std::find_if(other.wgmmas.begin(), other.wgmmas.end(),
                                   [&](const Wgmma& wgmma) { return i64(wgmma.group) >= end; });
    bool closed_any = false;
    for (auto wgmma = other.wgmmas.begin(); wgmma != rest; ++wgmma) {
      if (!wgmma->done) compute(other, *wgmma);
      if (wgmma->closed) continue;
      end_reads(other, *wgmma);
      wgmma->closed = closed_any = true;
    }
    if (closed_any)  // later ones may read the same bytes
      std::for_each(rest, other.wgmmas.end(), [&](const Wgmma& wgmma) {
        if (!wgmma.closed) begin_reads(other, wgmma);
      });
    if (k == w.index) other.wgmmas.erase(other.wgmmas.begin(), rest);
  }
}

}  // namespace

bool complete_next_wgmma(Warp& w) {
  for (Wgmma& wgmma : w.wgmmas) {
    if (wgmma.done) continue;
    compute(w, wgmma);
    return true;
  }
  return false;
}

bool decode_wgmma(Decoder& d) {  // wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 {d...}, a, b, p, 1, 1, 0, 0
  Instruction& op = d.op;
  d.kernel().async_proxy = true;
  op.collective = true;
  if (d.has("fence")) return d.run(nothing);
  if (d.has("commit_group")) return d.run(commit);
  if (d.has("wait_group")) {
    op.wait = {d.integer(0), false};
    return d.run(wait);
  }
  const std::vector<std::string>& m = d.modifiers;
  if (m.size() != 7 || m[0] != "mma_async" || m[4] != "f32" || m[5] != m[6]) return false;
  int rows, n, k;
  if (sscanf(m[3].c_str(), "m%dn%dk%d", &rows, &n, &k) != 3) return false;
  const Type type = named_type(m[5]);
  if (type != Type::kF16 && type != Type::kBF16 && type != Type::kTF32) return false;
  if (rows != 64 || n % 8 || n < 8 || n > kMaximumN || k != (type == Type::kTF32 ? 8 : 16)) return false;
  MatrixMultiply mma{type, u16(n), u16(k), d.operand(1).kind == Operand::kList, false, false, 1, true};
  d.begin_list();
  if (d.append(d.operand(0), 0) != n / 2) return false;
  if (mma.a_in_registers) {
    if (d.append(d.operand(1), 4) != 4) return false;
  } else {
    op.a = d.source(1, 8);
  }
  if (!d.list_is_of_words()) return false;
  op.b = d.source(2, 8);
  if (d.operand(3).kind == Operand::kRegister) {
    op.p = d.source(3, 1);
  } else {
    mma.accumulates = d.integer(3) != 0;
  }
  mma.scale = float(d.integer(4) * d.integer(5));
  if (type != Type::kTF32) {  // TF32 is never transposed
    if (!mma.a_in_registers) mma.a_transposed = d.integer(6);
    mma.b_transposed = d.integer(mma.a_in_registers ? 6 : 7);
  }
  op.mma = mma;
  return d.run(issue);
}

}  // namespace emulator
