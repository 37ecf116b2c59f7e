#include "parser.h"

#include <algorithm>
#include <cctype>
#include <cstdlib>
#include <cstring>

#include "decode.h"

namespace emulator {

void Parser::fail(const std::string& what) {
  throw Fault("line " + std::to_string(in_.line()) + ": " + what + ": " + module_.line(in_.line()));
}

void Parser::parse() {
  while (in_.peek()) {
    const std::string word = in_.word();
    if (word.empty()) fail("cannot read");
    directive(word);
  }
}

void Parser::directive(const std::string& word) {
  if (word == ".version" || word == ".address_size" || word == ".file" || word == ".pragma" || word == ".loc") {
    in_.skip_line();
  } else if (word == ".target") {
    const std::string names = in_.header_line();
    const size_t at = names.find("sm_");
    if (at == std::string::npos) return;
    module_.target = atoi(names.c_str() + at + 3);
    const size_t suffix = names.find_first_not_of("0123456789", at + 3);
    module_.arch_specific = suffix != std::string::npos && names[suffix] == 'a';
  } else if (word == ".section") {
    in_.word();
    in_.skip_braces();
  } else if (word == ".visible" || word == ".weak" || word == ".common" || word == ".extern") {
    const std::string next = in_.word();
    if (next == ".entry" || next == ".func") return directive(next);
    variable(next + " " + in_.until(';'), word == ".extern");
  } else if (word == ".entry") {
    entry();
  } else if (word == ".func") {
    function();
  } else if (word == ".shared" || word == ".global" || word == ".const") {
    variable(word + " " + in_.until(';'), false);
  } else {
    fail("cannot read");
  }
}

void Parser::function() {  // calls are refused: its body is of no use
  in_.skip_to("{;");
  if (in_.peek() == '{') {
    in_.skip_braces();
  } else {
    in_.advance();
  }
}

void Parser::entry() {
  auto owned = std::make_unique<Kernel>();
  kernel_ = owned.get();
  kernel_->name = in_.word();
  const auto symbols = symbols_;
  if (in_.peek() == '(') parameters();
  header();
  if (in_.peek() == ';') {  // a declaration
    in_.advance();
    symbols_ = symbols;
    kernel_ = nullptr;
    return;
  }
  in_.advance();
  const char* begin = in_.position();
  const int line = in_.line();
  const auto inner_symbols = symbols_;
  u32 static_bytes = 0;
  for (int pass = 0; pass < 2; ++pass) {  // the first finds the static arrays, behind which the dynamic ones begin
    in_.seek(begin, line);
    symbols_ = inner_symbols;
    for (const std::string& name : dynamic_) symbols_[name] = kSharedBase + align_up(static_bytes, 128);
    kernel_->static_smem = kernel_->local_bytes = 0;
    kernel_->code.clear();
    kernel_->lists.clear();
    kernel_->specials.clear();
    kernel_->unsupported.clear();
    registers_.clear();
    labels_.clear();
    branches_.clear();
    body();
    static_bytes = kernel_->static_smem;
    if (!static_bytes) break;
  }
  resolve_branches();
  instruction("ret", in_.line());
  kernel_->initial_registers = registers_.initial();
  module_.kernels[kernel_->name] = std::move(owned);
  symbols_ = symbols;
  kernel_ = nullptr;
}

void Parser::parameters() {
  in_.advance();
  u32 end = 0;
  for (const std::string& declaration : split_list(in_.until(')'))) {
    const std::vector<std::string> words = split_words(declaration);
    if (words.empty()) continue;
    u32 alignment = 1, bytes = 0;
    for (size_t i = 0; i < words.size(); ++i) {
      if (words[i] == ".align" && i > 0 && words[i - 1] == ".param") {  // not a pointer's ".ptr .align"
        alignment = u32(atoi(words.at(i + 1).c_str()));
      } else if (!bytes) {
        bytes = element_bytes(words[i]);
      }
    }
    alignment = std::max(alignment, bytes);
    const std::string& name = words.back();
    const size_t bracket = name.find('[');
    if (bracket != std::string::npos) bytes *= u32(atoi(name.c_str() + bracket + 1));
    const u32 offset = u32(align_up(end, alignment));
    kernel_->params.push_back({name.substr(0, bracket), offset, bytes});
    end = offset + bytes;
  }
  kernel_->param_bytes = end;
  kernel_->param_buffer.allocate(end + 128);
  for (const Param& param : kernel_->params)
    symbols_[param.name] = reinterpret_cast<u64>(kernel_->param_buffer.data()) + param.offset;
}

void Parser::header() {  // .maxntid 128, 1, 1
  while (in_.peek() != '{' && in_.peek() != ';') {
    const std::string word = in_.word();
    if (word.empty()) fail("cannot read the kernel's header");
    const std::vector<std::string> values = split_list(in_.header_line());
    if (word != ".maxntid" && word != ".reqntid") continue;
    u32 block[3] = {1, 1, 1};
    for (size_t i = 0; i < std::min<size_t>(values.size(), 3); ++i) block[i] = u32(atoi(values[i].c_str()));
    kernel_->max_threads = block[0] * block[1] * block[2];
    if (word == ".reqntid") {
      kernel_->exact_block = true;
      std::copy(block, block + 3, kernel_->block);
    }
  }
}

void Parser::body() {  // behind its {
  for (int depth = 1; depth > 0;) {
    switch (in_.peek()) {
      case '\0':
        fail("unexpected end");
      case '{':
        in_.advance();
        ++depth;
        registers_.open_scope();
        break;
      case '}':
        in_.advance();
        if (--depth) registers_.close_scope();
        break;
      case ';':
        in_.advance();
        break;
      case '.':
        body_directive();
        break;
      default: {
        const int line = in_.line();
        const std::string label = in_.label();
        if (label.empty()) {
          instruction(in_.until(';'), line);
        } else {
          if (in_.peek() == '.' && !strncmp(in_.position(), ".branchtargets", 14)) fail("brx tables");
          labels_[{registers_.scope(), label}] = int(kernel_->code.size());
        }
      }
    }
  }
}

void Parser::body_directive() {
  const std::string word = in_.word();
  if (word == ".loc" || word == ".file") return in_.skip_line();
  const std::string statement = word + " " + in_.until(';');
  if (word == ".reg") {
    registers_.declare(statement);
  } else if (word == ".shared" || word == ".local" || word == ".global" || word == ".const") {
    variable(statement, false);
  } else if (word != ".pragma") {
    fail("directive " + word);
  }
}

void Parser::instruction(std::string statement, int line) {
  statement = trimmed(statement);
  const std::string text = statement;
  Instruction op;
  op.line = line;
  if (statement[0] == '@') {
    op.guard_negated = statement[1] == '!';
    const size_t begin = op.guard_negated ? 2 : 1, end = statement.find_first_of(" \t", begin);
    const Operand guard = operand(statement.substr(begin, end - begin));
    if (guard.kind != Operand::kRegister || guard.reg.width != 1) fail("predicate");
    op.guard = guard.reg;
    statement = trimmed(statement.substr(std::min(end, statement.size())));
  }
  const size_t end = std::min(statement.find_first_of(" \t\r[{"), statement.size());
  const std::string name = statement.substr(0, end), arguments = statement.substr(end);
  try {
    Decoder decoder(*this, op, name);
    if (decoder.opcode == "bra") {
      branches_.push_back({int(kernel_->code.size()), trimmed(arguments), registers_.scope()});
    } else if (decoder.opcode != "call" && decoder.opcode != "brx") {
      for (const std::string& argument : split_list(arguments)) decoder.operands.push_back(operand(argument));
    }
    if (!decode(decoder)) throw Fault("not supported");
  } catch (Fault& error) {
    kernel_->unsupported.push_back("line " + std::to_string(op.line) + ": " + error.what() + ": " + text);
    op.run = nullptr;
  }
  kernel_->code.push_back(op);
}

void Parser::resolve_branches() {
  for (const Branch& branch : branches_) {
    int& target = kernel_->code[branch.instruction].target;
    for (int scope = branch.scope; scope >= 0 && target < 0; scope = registers_.parent(scope)) {
      const auto label = labels_.find({scope, branch.label});
      if (label != labels_.end()) target = label->second;
    }
    if (target < 0) fail("no label " + branch.label);
  }
}

void Parser::variable(const std::string& statement, bool external) {  // .shared .align 16 .b8 name[1024] = {...}
  const size_t equals = statement.find('=');
  const std::string values = equals == std::string::npos ? "" : trimmed(statement.substr(equals + 1));
  std::string space, type, declarator;
  u32 alignment = 1;
  const std::vector<std::string> words = split_words(statement.substr(0, equals));
  for (size_t i = 0; i < words.size(); ++i) {
    const std::string& word = words[i];
    if (word == ".shared" || word == ".global" || word == ".const" || word == ".local") {
      space = word;
    } else if (word == ".align") {
      alignment = u32(atoi(words.at(++i).c_str()));
    } else if (element_bytes(word)) {
      type = word;
    } else if (word[0] != '.') {
      declarator += word;
    }
  }
  const u32 element = element_bytes(type);
  alignment = std::max(alignment, element);
  u64 bytes = element;
  for (size_t at = declarator.find('['); at != std::string::npos; at = declarator.find('[', at + 1))
    bytes *= strtoull(declarator.c_str() + at + 1, nullptr, 0);  // 0 for []
  const std::string name = declarator.substr(0, declarator.find('['));
  if (space == ".shared") {
    shared_variable(name, bytes, alignment, external);
  } else if (space == ".local") {
    const u64 offset = align_up(kernel_->local_bytes, alignment);
    symbols_[name] = offset;
    kernel_->local_bytes = u32(offset + bytes);
  } else {
    global_variable(name, bytes, element, values);
  }
}

void Parser::shared_variable(const std::string& name, u64 bytes, u32 alignment, bool external) {
  if (external && bytes == 0) {
    symbols_[name] = kSharedBase;  // entry() moves it behind the kernel's static arrays
    dynamic_.push_back(name);
  } else {
    statics_[name] = {u32(bytes), alignment};
    symbols_.erase(name);
  }
}

void Parser::global_variable(const std::string& name, u64 bytes, u32 element, const std::string& values) {
  auto variable = std::make_unique<GlobalVariable>();
  variable->name = name;
  variable->bytes = bytes;
  variable->storage.allocate(bytes);
  u8* at = variable->storage.data();
  const bool list = !values.empty() && values[0] == '{';
  for (const std::string& value : split_list(list ? values.substr(1, values.rfind('}') - 1) : values)) {
    if (value.empty()) continue;
    const bool number = isdigit(static_cast<unsigned char>(value[0])) || value[0] == '-';
    if (!number && !symbols_.count(value)) fail("initialiser " + value);
    if (at + element > variable->storage.data() + bytes) fail("too many initialisers");
    const u64 word = number ? immediate(value).value : symbols_[value];
    memcpy(at, &word, std::min<u32>(element, 8));
    at += element;
  }
  symbols_[name] = reinterpret_cast<u64>(variable->storage.data());
  module_.globals.push_back(std::move(variable));
}

}  // namespace emulator
