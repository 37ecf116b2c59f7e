// ldmatrix, stmatrix and mma.sync. Products are exact, sums in float32 in order of k.
#include "decode.h"
#include "lanes.h"
#include "numbers.h"
#include "shared_memory.h"

namespace emulator {
namespace {

// 8 x 8 elements of 16 bits: lane i holds row i / 4, columns i % 4 * 2 and the next; transposed, columns and rows.
using Matrix = u16[8][8];

u32 row_address(Context& c, const Instruction& op, int row) {
  const u32 address = shared_address(address_of(c, op, row));
  if (address % 16) fault("matrix row at %u is not aligned to 16 bytes", address);
  return address;
}

void ldmatrix(Context& c, const Instruction& op, u32) {
  const Register* to = c.list(op);
  const auto [n, transposed] = op.matrix;
  Matrix matrices[4];
  for (int row = 0; row < 8 * n; ++row)
    memcpy(matrices[row / 8][row % 8], read_shared(c, row_address(c, op, row), 16), 16);
  for (int i = 0; i < n; ++i) {
    const Matrix& m = matrices[i];
    u32* d = lanes<u32>(c, to[i]);
    for (int lane = 0; lane < kWarpSize; ++lane) {
      const int row = lane / 4, column = lane % 4 * 2;
      d[lane] =
          transposed ? m[column][row] | u32(m[column + 1][row]) << 16 : m[row][column] | u32(m[row][column + 1]) << 16;
    }
  }
}

void stmatrix(Context& c, const Instruction& op, u32) {
  const Register* from = c.list(op);
  const auto [n, transposed] = op.matrix;
  for (int i = 0; i < n; ++i) {
    Matrix m;
    const u32* source = lanes<u32>(c, from[i]);
    for (int lane = 0; lane < kWarpSize; ++lane) {
      const int row = lane / 4, column = lane % 4 * 2;
      (transposed ? m[column][row] : m[row][column]) = u16(source[lane]);
      (transposed ? m[column + 1][row] : m[row][column + 1]) = u16(source[lane] >> 16);
    }
    for (int row = 0; row < 8; ++row) write_shared(c, row_address(c, op, 8 * i + row), m[row], 16);
  }
}

struct Fragments {  // how many registers of a lane hold A (16 x k) and B (k x 8)
  int a, b;
};
Fragments fragments(Type type, int k) {
  return type == Type::kTF32 ? Fragments{k / 2, k / 4} : Fragments{k / 4, k / 8};
}

void mma(Context& c, const Instruction& op, u32) {  // m16n8: D = A B + C
  const Type type = op.mma.type;
  const int depth = op.mma.k;
  const auto [a_registers, b_registers] = fragments(type, depth);
  const Register *d = c.list(op), *a = d + 4, *b = a + a_registers, *addend = b + b_registers;
  alignas(64) float A[16][16], B[16][8], C[16][8];
  auto up = [type](u32 bits) { return type == Type::kF16 ? half_to_float(u16(bits)) : bfloat_to_float(u16(bits)); };
  for (int i = 0; i < a_registers; ++i) {  // registers alternate between the upper and the lower 8 rows
    const u32* source = lanes<u32>(c, a[i]);
    for (int lane = 0; lane < kWarpSize; ++lane) {
      float* row = A[lane / 4 + i % 2 * 8];
      if (type == Type::kTF32) {
        row[lane % 4 + i / 2 * 4] = truncate_tf32(source[lane]);
      } else {
        row[lane % 4 * 2 + i / 2 * 8] = up(source[lane]);
        row[lane % 4 * 2 + i / 2 * 8 + 1] = up(source[lane] >> 16);
      }
    }
  }
  for (int i = 0; i < b_registers; ++i) {
    const u32* source = lanes<u32>(c, b[i]);
    for (int lane = 0; lane < kWarpSize; ++lane) {
      const int column = lane / 4;
      if (type == Type::kTF32) {
        B[lane % 4 + i * 4][column] = truncate_tf32(source[lane]);
      } else {
        B[lane % 4 * 2 + i * 8][column] = up(source[lane]);
        B[lane % 4 * 2 + i * 8 + 1][column] = up(source[lane] >> 16);
      }
    }
  }
  auto element = [&](int lane, int i) -> float& { return C[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2]; };
  for (int i = 0; i < 4; ++i)
    for (int lane = 0; lane < kWarpSize; ++lane) element(lane, i) = lanes<float>(c, addend[i])[lane];
  for (int row = 0; row < 16; ++row)
    for (int k = 0; k < depth; ++k) {
      const float x = A[row][k];
      for (int column = 0; column < 8; ++column) C[row][column] = __builtin_fmaf(x, B[k][column], C[row][column]);
    }
  for (int i = 0; i < 4; ++i)
    for (int lane = 0; lane < kWarpSize; ++lane) lanes<float>(c, d[i])[lane] = element(lane, i);
  counters.mma++;
}

}  // namespace

bool decode_matrix_move(Decoder& d) {  // ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16
  const u8 n = d.has("x1") ? 1 : d.has("x2") ? 2 : d.has("x4") ? 4 : 0;
  if (!n || !d.has("m8n8") || d.type_name() != "b16") return false;
  const bool loads = d.opcode == "ldmatrix";
  d.address(loads ? 1 : 0);
  d.begin_list();
  if (d.append(d.operand(loads ? 0 : 1), 4) != n || !d.list_is_of_words()) return false;
  d.op.collective = true;
  d.op.matrix = {n, d.has("trans")};
  return d.run(loads ? ldmatrix : stmatrix);
}

bool decode_mma(Decoder& d) {  // mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32
  const std::vector<std::string>& m = d.modifiers;
  if (m.size() != 9 || m[0] != "sync" || m[1] != "aligned" || m[3] != "row" || m[4] != "col") return false;
  const Type type = named_type(m[6]);
  if (m[5] != "f32" || m[8] != "f32" || m[6] != m[7]) return false;
  if (type != Type::kF16 && type != Type::kBF16 && type != Type::kTF32) return false;
  const u16 k = m[2] == "m16n8k16" ? 16 : m[2] == "m16n8k8" ? 8 : m[2] == "m16n8k4" ? 4 : 0;
  if (!k || k == (type == Type::kTF32 ? 16 : 4)) return false;
  d.begin_list();
  int registers = 0;
  for (int i = 0; i < 4; ++i) registers += d.append(d.operand(i), 4);
  const auto [a_registers, b_registers] = fragments(type, k);
  if (registers != 8 + a_registers + b_registers || !d.list_is_of_words()) return false;
  d.op.collective = true;
  d.op.mma = {type, 8, k, true, false, false, 1, true};
  return d.run(mma);
}

}  // namespace emulator
