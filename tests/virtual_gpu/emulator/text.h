// Small helpers for PTX text.
#pragma once
#include <string>
#include <vector>

namespace emulator {

std::string trimmed(const std::string& s);
// Parts between commas that are outside brackets, trimmed; {} for "".
std::vector<std::string> split_list(const std::string& s);
// Parts between white space.
std::vector<std::string> split_words(const std::string& s);
inline unsigned long long align_up(unsigned long long n, unsigned long long alignment) {
  return (n + alignment - 1) / alignment * alignment;
}

// Reads PTX from the front, counting lines and skipping comments.
class Scanner {
 public:
  explicit Scanner(const char* text) : at_(text) {}
  const char* position() const { return at_; }
  int line() const { return line_; }
  void seek(const char* position, int line) { at_ = position, line_ = line; }

  void skip_space();
  char peek() { return skip_space(), *at_; }
  void advance() { ++at_; }
  std::string word();           // letters, digits and _ $ % .
  std::string label();          // the name of "name:", which is then behind us; "" where no label stands
  std::string until(char end);  // up to `end` outside brackets, which is then behind us
  std::string header_line();    // the rest of a line, up to {
  void skip_line();
  void skip_braces();                // { ... }
  void skip_to(const char* either);  // the first of these characters

 private:
  bool skip_comment();
  void step();  // one character, counted
  const char* at_;
  int line_ = 1;
};

}  // namespace emulator
