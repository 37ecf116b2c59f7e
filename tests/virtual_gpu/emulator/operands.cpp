// Operands of instructions: registers, immediates, symbols, addresses, lists.
#include <algorithm>
#include <cctype>
#include <cstdlib>

#include "parser.h"

namespace emulator {

u64 Parser::address_of_symbol(const std::string& name) {
  const auto symbol = symbols_.find(name);
  if (symbol != symbols_.end()) return symbol->second;
  const auto array = statics_.find(name);
  if (array == statics_.end() || !kernel_) fail("unknown symbol " + name);
  const auto [bytes, alignment] = array->second;
  const u32 offset = u32(align_up(kernel_->static_smem, alignment));
  kernel_->static_smem = offset + bytes;
  return symbols_[name] = kSharedBase + offset;
}

Operand Parser::address(const std::string& text) {
  const std::vector<std::string> parts = split_list(text.substr(1, text.rfind(']') - 1));
  if (parts.empty()) fail("an empty address");
  Operand o;
  o.kind = Operand::kAddress;
  std::string base = parts[0];
  const size_t sign = base.find_first_of("+-", 1);
  if (sign != std::string::npos) {
    std::string offset = base.substr(base[sign] == '+' ? sign + 1 : sign);
    offset.erase(std::remove(offset.begin(), offset.end(), ' '), offset.end());
    o.offset = strtoll(offset.c_str(), nullptr, 0);
    base = base.substr(0, sign);
  }
  const Operand b = operand(base);
  switch (b.kind) {
    case Operand::kRegister:
      o.reg = b.reg;
      break;
    case Operand::kInteger:
      o.reg = registers_.constant(8, b.value);
      break;
    case Operand::kSymbol:
      o.reg = registers_.constant(8, address_of_symbol(b.name));
      break;
    default:
      fail("cannot read the address " + text);
  }
  if (parts.size() > 1) o.list.push_back(operand(parts[1]));
  return o;
}

Operand Parser::immediate(const std::string& text) {
  Operand o;
  const char* digits = text.c_str();
  const char marker = text.size() > 1 && text[0] == '0' ? char(tolower(text[1])) : ' ';
  if (marker == 'f' || marker == 'd') {
    o.kind = marker == 'f' ? Operand::kFloat : Operand::kDouble;
    o.value = strtoull(digits + 2, nullptr, 16);
    return o;
  }
  if (text.find('.') != std::string::npos) fail("decimal floating-point immediate " + text);
  o.kind = Operand::kInteger;
  o.value = text[0] == '-' ? u64(strtoll(digits, nullptr, 0)) : strtoull(digits, nullptr, 0);
  return o;
}

Operand Parser::operand(const std::string& untrimmed) {
  const std::string text = trimmed(untrimmed);
  Operand o;
  if (text.empty()) return o;
  if (text[0] == '{') {
    o.kind = Operand::kList;
    for (const std::string& part : split_list(text.substr(1, text.rfind('}') - 1))) o.list.push_back(operand(part));
    return o;
  }
  if (text[0] == '[') return address(text);
  if (text[0] == '!') {
    o = operand(text.substr(1));
    o.negated = true;
    return o;
  }
  const size_t bar = text.find('|');
  if (bar != std::string::npos) {
    o = operand(text.substr(0, bar));
    const Operand second = operand(text.substr(bar + 1));
    if (second.kind != Operand::kSink) o.second = second.reg;
    return o;
  }
  if (text == "_") {
    o.kind = Operand::kSink;
    return o;
  }
  if (isdigit(static_cast<unsigned char>(text[0])) || text[0] == '-') return immediate(text);
  if (const Register* r = registers_.find(text)) {
    o.kind = Operand::kRegister;
    o.reg = *r;
    return o;
  }
  o.reg = registers_.special(text, *kernel_);
  if (o.reg.exists()) {
    o.kind = Operand::kRegister;
    return o;
  }
  o.kind = Operand::kSymbol;
  o.name = text;
  return o;
}

}  // namespace emulator
