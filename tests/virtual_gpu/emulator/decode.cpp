#include "decode.h"

#include <algorithm>
#include <unordered_map>

namespace emulator {

// Every opcode that the emulator knows, with the families that are asked in turn.
static const std::unordered_map<std::string, std::vector<bool (*)(Decoder&)>> kFamilies = {
    {"add", {decode_integer, decode_float, decode_half}},
    {"sub", {decode_integer, decode_float, decode_half}},
    {"mul", {decode_integer, decode_float, decode_half}},
    {"mad", {decode_integer, decode_float}},
    {"fma", {decode_float, decode_half}},
    {"div", {decode_integer, decode_float}},
    {"rem", {decode_integer}},
    {"min", {decode_integer, decode_float, decode_half}},
    {"max", {decode_integer, decode_float, decode_half}},
    {"neg", {decode_integer, decode_float, decode_half}},
    {"abs", {decode_integer, decode_float, decode_half}},
    {"sqrt", {decode_float}},
    {"rcp", {decode_float}},
    {"rsqrt", {decode_float}},
    {"ex2", {decode_float}},
    {"lg2", {decode_float}},
    {"sin", {decode_float}},
    {"cos", {decode_float}},
    {"tanh", {decode_float}},
    {"and", {decode_bits, decode_predicate_logic}},
    {"or", {decode_bits, decode_predicate_logic}},
    {"xor", {decode_bits, decode_predicate_logic}},
    {"not", {decode_bits, decode_predicate_logic}},
    {"shl", {decode_bits}},
    {"shr", {decode_bits}},
    {"shf", {decode_bits}},
    {"bfe", {decode_bits}},
    {"bfi", {decode_bits}},
    {"prmt", {decode_bits}},
    {"lop3", {decode_bits}},
    {"popc", {decode_bits}},
    {"clz", {decode_bits}},
    {"brev", {decode_bits}},
    {"bfind", {decode_bits}},
    {"setp", {decode_compare}},
    {"selp", {decode_select}},
    {"mov", {decode_predicate_logic, decode_move}},
    {"cvt", {decode_convert}},
    {"cvta", {decode_cvta}},
    {"mapa", {decode_mapa}},
    {"createpolicy", {decode_policy}},
    {"shfl", {decode_shuffle}},
    {"vote", {decode_vote}},
    {"redux", {decode_reduce}},
    {"elect", {decode_elect}},
    {"activemask", {decode_active_mask}},
    {"bra", {decode_branch}},
    {"ret", {decode_exit}},
    {"exit", {decode_exit}},
    {"trap", {decode_trap}},
    {"brkpt", {decode_trap}},
    {"bar", {decode_barrier}},
    {"barrier", {decode_barrier}},
    {"fence", {decode_fence}},
    {"membar", {decode_fence}},
    {"ld", {decode_load_store}},
    {"ldu", {decode_load_store}},
    {"st", {decode_load_store}},
    {"atom", {decode_atomic}},
    {"red", {decode_atomic}},
    {"cp", {decode_async_copy, decode_bulk_copy}},
    {"mbarrier", {decode_mbarrier}},
    {"ldmatrix", {decode_matrix_move}},
    {"stmatrix", {decode_matrix_move}},
    {"mma", {decode_mma}},
    {"wgmma", {decode_wgmma}},
    {"prefetch", {decode_nothing}},
    {"prefetchu", {decode_nothing}},
    {"griddepcontrol", {decode_nothing}},
    {"nanosleep", {decode_nothing}},
    {"setmaxnreg", {decode_nothing}},
    {"pmevent", {decode_nothing}},
    {"discard", {decode_nothing}},
    {"applypriority", {decode_nothing}},
};

bool decode(Decoder& d) {
  const auto families = kFamilies.find(d.opcode);
  if (families == kFamilies.end()) return false;
  return std::any_of(families->second.begin(), families->second.end(), [&](auto family) { return family(d); });
}

Decoder::Decoder(Parser& parser, Instruction& op, const std::string& name) : op(op), parser_(parser) {
  size_t dot = name.find('.');
  opcode = name.substr(0, dot);
  while (dot != std::string::npos) {
    const size_t begin = dot + 1;
    dot = name.find('.', begin);
    const std::string part = name.substr(begin, dot - begin);
    bool* flag = part == "ftz"    ? &ftz
                 : part == "sat"  ? &saturate
                 : part == "NaN"  ? &nan
                 : part == "relu" ? &relu
                                  : nullptr;
    if (flag) {
      *flag = true;
    } else {
      modifiers.push_back(part);
    }
  }
}

bool Decoder::has(const char* modifier) const {
  return std::find(modifiers.begin(), modifiers.end(), modifier) != modifiers.end();
}

bool Decoder::has_only(std::initializer_list<const char*> allowed) const {
  if (modifiers.empty()) return false;
  return std::all_of(modifiers.begin(), modifiers.end() - 1, [&](const std::string& modifier) {
    return std::find(allowed.begin(), allowed.end(), modifier) != allowed.end();
  });
}

bool Decoder::plain() const { return modifiers.size() == 1 && !ftz && !saturate && !nan && !relu; }

const std::string& Decoder::type_name() const {
  static const std::string none;
  return modifiers.empty() ? none : modifiers.back();
}

Type named_type(const std::string& name) {
  static const std::unordered_map<std::string, Type> types = {
      {"u8", Type::kU8},   {"s8", Type::kS8},     {"b8", Type::kU8},   {"u16", Type::kU16},   {"s16", Type::kS16},
      {"b16", Type::kU16}, {"u32", Type::kU32},   {"s32", Type::kS32}, {"b32", Type::kU32},   {"u64", Type::kU64},
      {"s64", Type::kS64}, {"b64", Type::kU64},   {"f16", Type::kF16}, {"bf16", Type::kBF16}, {"f32", Type::kF32},
      {"f64", Type::kF64}, {"tf32", Type::kTF32},
  };
  const auto it = types.find(name);
  return it == types.end() ? Type::kNone : it->second;
}

Type Decoder::type() const { return named_type(type_name()); }

u8 Decoder::width() const {
  const std::string& name = type_name();
  if (name == "tf32" || name == "bf16x2") return 4;
  return register_width("." + name);
}

const Operand& Decoder::operand(size_t i) const {
  if (i >= operands.size()) throw Fault("too few operands");
  return operands[i];
}

Register Decoder::any(const Operand& operand, u8 immediate_width) {
  RegisterFile& registers = parser_.registers();
  switch (operand.kind) {
    case Operand::kRegister:
      return operand.reg;
    case Operand::kSink:
      return registers.sink(4);
    case Operand::kInteger:
    case Operand::kFloat:
    case Operand::kDouble:
    case Operand::kSymbol:
      break;
    default:
      throw Fault("unexpected operand");
  }
  if (!immediate_width) throw Fault("destination is no register");
  if (operand.kind == Operand::kFloat && immediate_width != 4) throw Fault("float immediate");
  if (operand.kind == Operand::kDouble && immediate_width != 8) throw Fault("double immediate");
  const u64 value = operand.kind == Operand::kSymbol ? parser_.address_of_symbol(operand.name) : operand.value;
  return registers.constant(immediate_width, value);
}

Register Decoder::source(size_t i, u8 width) {
  if (operand(i).kind == Operand::kSink) throw Fault("unexpected operand");
  const Register r = any(operand(i), width);
  if (r.width != width) fault("operand of %d bytes where %d are read", r.width, width);
  return r;
}

Register Decoder::source(size_t i, u8 width, bool& negated) {
  negated = operand(i).negated;
  return source(i, width);
}

Register Decoder::destination(size_t i, u8 width) {
  const Operand& o = operand(i);
  if (o.kind == Operand::kSink) return parser_.registers().sink(width);
  if (o.kind != Operand::kRegister) throw Fault("destination is no register");
  if (o.reg.width != width) fault("destination of %d bytes where %d are written", o.reg.width, width);
  return o.reg;
}

int Decoder::integer(size_t i) const {
  if (operand(i).kind != Operand::kInteger) throw Fault("operand is no integer");
  return int(operand(i).value);
}

void Decoder::address(size_t i) {
  const Operand& o = operand(i);
  if (o.kind != Operand::kAddress) throw Fault("no address");
  op.a = o.reg;
  op.offset = o.offset;
}

void Decoder::begin_list() {
  op.list = int(kernel().lists.size());
  op.list_size = 0;
}

int Decoder::append(const Operand& operand, u8 immediate_width) {
  int n = 0;
  if (operand.kind == Operand::kList) {
    for (const Operand& element : operand.list) n += append(element, immediate_width);
    return n;
  }
  kernel().lists.push_back(any(operand, immediate_width));
  ++op.list_size;
  return 1;
}

bool Decoder::list_is_of_words() const {
  const auto begin = parser_.kernel().lists.begin() + op.list;
  return std::all_of(begin, begin + op.list_size, [](const Register& r) { return r.width == 4; });
}

bool Decoder::sources(Handler handler, int n, u8 width) {
  if (!handler) return false;
  op.d = destination(0, width);
  op.a = source(1, width);
  if (n > 1) op.b = source(2, width);
  if (n > 2) op.c = source(3, width);
  return run(handler);
}

}  // namespace emulator
