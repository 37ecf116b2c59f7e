// Decoding: an instruction's text into its handler and operands. Each family's file has its decoders beside its
// handlers.
#pragma once
#include <string>
#include <vector>

#include "emulator.h"
#include "parser.h"

namespace emulator {

// What a family's decoder works on. Operands that don't fit throw Fault: the instruction is then unsupported.
struct Decoder {
  Decoder(Parser& parser, Instruction& op, const std::string& name);

  std::string opcode;
  std::vector<std::string> modifiers;  // behind the opcode, without the four flags
  bool ftz = false, saturate = false, nan = false, relu = false;
  std::vector<Operand> operands;
  Instruction& op;

  bool has(const char* modifier) const;
  bool has_only(std::initializer_list<const char*> allowed) const;  // all modifiers but the type are among these
  bool plain() const;                                               // the type alone, and no flag
  Type type() const;                                                // of the last modifier
  const std::string& type_name() const;
  u8 width() const;  // bytes of a register of that type; f16x2 and bf16x2 4, pred 1, none 0

  size_t size() const { return operands.size(); }
  const Operand& operand(size_t i) const;
  Register source(size_t i, u8 width);                 // a register, or a constant
  Register source(size_t i, u8 width, bool& negated);  // a predicate
  Register destination(size_t i, u8 width);
  Register any(const Operand& operand, u8 immediate_width);  // a register of whatever width
  int integer(size_t i) const;
  void address(size_t i);                                  // into op.a and op.offset
  int append(const Operand& operand, u8 immediate_width);  // to the kernel's lists; returns how many registers
  void begin_list();
  bool list_is_of_words() const;
  Kernel& kernel() { return parser_.kernel(); }

  bool sources(Handler run, int n, u8 width);  // d, then n sources a, b, c of one width; false where run is null
  bool run(Handler handler) {
    op.run = handler;
    return handler != nullptr;
  }

 private:
  Parser& parser_;
};

// The type of a modifier such as "f16"; kNone: it names none.
Type named_type(const std::string& name);

// False: no family knows the instruction.
bool decode(Decoder& d);

// The families. Each returns false for what it doesn't know.
bool decode_integer(Decoder& d);  // add, sub, mul, mad, div, rem, min, max, neg, abs of integers
bool decode_bits(Decoder& d);     // and, or, xor, not, shifts, bit fields, prmt, lop3, counts
bool decode_predicate_logic(Decoder& d);
bool decode_float(Decoder& d);    // f32 and f64
bool decode_half(Decoder& d);     // f16, bf16 and their pairs
bool decode_compare(Decoder& d);  // setp
bool decode_select(Decoder& d);   // selp
bool decode_move(Decoder& d);     // mov
bool decode_cvta(Decoder& d);
bool decode_mapa(Decoder& d);
bool decode_policy(Decoder& d);   // createpolicy
bool decode_convert(Decoder& d);  // cvt
bool decode_shuffle(Decoder& d);
bool decode_vote(Decoder& d);
bool decode_reduce(Decoder& d);  // redux
bool decode_elect(Decoder& d);
bool decode_active_mask(Decoder& d);
bool decode_branch(Decoder& d);
bool decode_exit(Decoder& d);
bool decode_trap(Decoder& d);
bool decode_barrier(Decoder& d);  // bar, barrier
bool decode_fence(Decoder& d);    // fence, membar
bool decode_nothing(Decoder& d);  // hints
bool decode_load_store(Decoder& d);
bool decode_atomic(Decoder& d);      // atom, red
bool decode_async_copy(Decoder& d);  // cp.async
bool decode_bulk_copy(Decoder& d);   // cp.async.bulk
bool decode_mbarrier(Decoder& d);
bool decode_matrix_move(Decoder& d);  // ldmatrix, stmatrix
bool decode_mma(Decoder& d);
bool decode_wgmma(Decoder& d);

}  // namespace emulator
