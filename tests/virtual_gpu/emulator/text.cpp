#include "text.h"

#include <cctype>
#include <cstring>

#include "emulator.h"

namespace emulator {

std::string trimmed(const std::string& s) {
  const size_t first = s.find_first_not_of(" \t\r\n"), last = s.find_last_not_of(" \t\r\n");
  return first == std::string::npos ? "" : s.substr(first, last - first + 1);
}

std::vector<std::string> split_list(const std::string& s) {
  std::vector<std::string> parts;
  std::string part;
  int depth = 0;
  for (char c : s) {
    if (strchr("{[(", c)) ++depth;
    if (strchr("}])", c)) --depth;
    if (c == ',' && depth == 0) {
      parts.push_back(trimmed(part));
      part.clear();
    } else {
      part += c;
    }
  }
  part = trimmed(part);
  if (!part.empty() || !parts.empty()) parts.push_back(part);
  return parts;
}

std::vector<std::string> split_words(const std::string& s) {
  std::vector<std::string> words;
  std::string word;
  for (char c : s + " ") {
    if (!isspace(static_cast<unsigned char>(c))) {
      word += c;
    } else if (!word.empty()) {
      words.push_back(word);
      word.clear();
    }
  }
  return words;
}

static bool in_word(char c) { return isalnum(static_cast<unsigned char>(c)) || (c && strchr("_$%.", c)); }

void Scanner::step() {
  if (!*at_) throw Fault("line " + std::to_string(line_) + ": unexpected end");
  if (*at_++ == '\n') ++line_;
}

bool Scanner::skip_comment() {
  if (at_[0] == '/' && at_[1] == '/') {
    skip_line();
  } else if (at_[0] == '/' && at_[1] == '*') {
    while (!(at_[0] == '*' && at_[1] == '/')) step();
    at_ += 2;
  } else {
    return false;
  }
  return true;
}

void Scanner::skip_space() {
  while (true) {
    if (*at_ && strchr(" \t\r\n", *at_)) {
      step();
    } else if (!skip_comment()) {
      return;
    }
  }
}

std::string Scanner::word() {
  skip_space();
  const char* begin = at_;
  while (in_word(*at_)) ++at_;
  return std::string(begin, at_);
}

std::string Scanner::label() {
  skip_space();
  const char* end = at_;
  while (in_word(*end)) ++end;
  const char* colon = end;
  while (*colon == ' ' || *colon == '\t') ++colon;
  if (end == at_ || colon[0] != ':' || colon[1] == ':') return "";
  const std::string name(at_, end);
  at_ = colon + 1;
  return name;
}

std::string Scanner::until(char end) {
  std::string text;
  int depth = 0;
  while (true) {
    if (skip_comment()) continue;
    if (*at_ == '{' || *at_ == '(') ++depth;
    if (*at_ == '}' || *at_ == ')') --depth;
    const char c = *at_;
    step();
    if (c == end && depth <= 0) return text;
    text += c == '\n' ? ' ' : c;
  }
}

std::string Scanner::header_line() {
  const char* begin = at_;
  while (*at_ && *at_ != '\n' && *at_ != '{') ++at_;
  return std::string(begin, at_);
}

void Scanner::skip_line() {
  while (*at_ && *at_ != '\n') ++at_;
}

void Scanner::skip_braces() {
  int depth = 0;
  do {
    if (peek() == '{') ++depth;
    if (*at_ == '}') --depth;
    step();
  } while (depth > 0);
}

void Scanner::skip_to(const char* either) {
  while (*at_ && !strchr(either, *at_)) step();
}

}  // namespace emulator
