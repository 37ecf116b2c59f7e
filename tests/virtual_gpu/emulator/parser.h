// The parser: a PTX file into a Module. Instructions go through decode.h.
#pragma once
#include <map>
#include <string>
#include <vector>

#include "emulator.h"
#include "text.h"

namespace emulator {

struct Operand {
  enum Kind { kNone, kRegister, kInteger, kFloat, kDouble, kSymbol, kAddress, kList, kSink } kind = kNone;
  std::string name;           // of a symbol
  Register reg;               // of a register, or an address's base
  bool negated = false;       // !p
  Register second;            // q of p|q
  u64 value = 0;              // of an immediate
  i64 offset = 0;             // of an address
  std::vector<Operand> list;  // {a, b}; of an address [base, {...}]: one operand, the coordinates
};

// The registers of the kernel that is being parsed: scopes, constants, special registers.
class RegisterFile {
 public:
  void clear();
  void declare(const std::string& statement);  // .reg .b32 %r<10>, %x
  void open_scope();
  void close_scope();
  int scope() const { return scope_; }
  int parent(int scope) const { return scopes_[scope].parent; }
  const Register* find(const std::string& name);
  // A register that holds the value in every lane.
  Register constant(u8 width, u64 value);
  // Where unused results go.
  Register sink(u8 width) const { return {sink_.slot, width}; }
  // %tid.x and its kind; doesn't exist where the name is none of them.
  Register special(const std::string& name, Kernel& kernel);
  std::vector<u8> initial() const;

 private:
  Register allocate(u8 width);
  struct Scope {
    int parent;
    std::map<std::string, Register> registers;
    std::map<std::string, std::pair<u8, int>> families;  // %r<n>: width and n
  };
  std::vector<Scope> scopes_;
  std::vector<int> open_;
  int scope_ = 0, bytes_ = 0;
  Register sink_;
  std::map<std::pair<u8, u64>, Register> constants_;
  std::map<std::string, Register> specials_;
};

class Parser {
 public:
  explicit Parser(Module& module) : module_(module), in_(module.text.c_str()) {}
  void parse();

  Operand operand(const std::string& text);
  u64 address_of_symbol(const std::string& name);
  Kernel& kernel() { return *kernel_; }
  RegisterFile& registers() { return registers_; }

 private:
  [[noreturn]] void fail(const std::string& what);
  void directive(const std::string& word);
  void function();
  void entry();
  void parameters();
  void header();
  void body();
  void body_directive();
  void instruction(std::string statement, int line);
  void resolve_branches();
  void variable(const std::string& statement, bool external);
  void shared_variable(const std::string& name, u64 bytes, u32 alignment, bool external);
  void global_variable(const std::string& name, u64 bytes, u32 element, const std::string& values);
  Operand address(const std::string& text);
  Operand immediate(const std::string& text);

  Module& module_;
  Scanner in_;
  Kernel* kernel_ = nullptr;
  RegisterFile registers_;
  std::map<std::string, u64> symbols_;                  // addresses of variables and parameters
  std::map<std::string, std::pair<u32, u32>> statics_;  // size and alignment; a kernel has those that it names
  std::vector<std::string> dynamic_;                    // extern shared arrays
  std::map<std::pair<int, std::string>, int> labels_;   // by scope and name
  struct Branch {
    int instruction;
    std::string label;
    int scope;
  };
  std::vector<Branch> branches_;
};

// Bytes of a lane's register, and of an element in memory, of a PTX type such as ".f16"; 0: not a type.
u8 register_width(const std::string& type);
u32 element_bytes(const std::string& type);

}  // namespace emulator
