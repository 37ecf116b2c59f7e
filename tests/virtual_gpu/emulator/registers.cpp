// The parser's register file.
#include <cctype>
#include <cstdlib>

#include "lanes.h"
#include "parser.h"
#include "special_registers.h"

namespace emulator {

u8 register_width(const std::string& type) {
  static const std::map<std::string, u8> widths = {{".pred", 1}, {".b8", 2},  {".u8", 2},  {".s8", 2},    {".b16", 2},
                                                   {".u16", 2},  {".s16", 2}, {".f16", 2}, {".bf16", 2},  {".b32", 4},
                                                   {".u32", 4},  {".s32", 4}, {".f32", 4}, {".f16x2", 4}, {".b64", 8},
                                                   {".u64", 8},  {".s64", 8}, {".f64", 8}};
  const auto it = widths.find(type);
  return it == widths.end() ? 0 : it->second;
}

u32 element_bytes(const std::string& type) {
  if (type == ".b8" || type == ".u8" || type == ".s8") return 1;
  if (type == ".b128") return 16;
  return register_width(type);
}

void RegisterFile::clear() {
  scopes_.assign(1, {-1, {}, {}});
  open_.clear();
  scope_ = bytes_ = 0;
  constants_.clear();
  specials_.clear();
  sink_ = allocate(8);
}

Register RegisterFile::allocate(u8 width) {
  const int size = width == 1 ? 4 : kWarpSize * width;
  const int slot = int(align_up(bytes_, width == 1 ? 4 : 64));
  bytes_ = slot + size;
  return {slot, width};
}

void RegisterFile::declare(const std::string& statement) {
  const std::vector<std::string> words = split_words(statement);
  const std::string& type = words.at(1);
  if (type == ".b128") return;  // a use of it is refused
  const u8 width = register_width(type);
  if (!width) throw Fault("register type " + type);
  const std::string names = statement.substr(statement.find(type) + type.size());
  for (const std::string& name : split_list(names)) {
    const size_t bracket = name.find('<');
    if (bracket == std::string::npos) {
      scopes_[scope_].registers[name] = allocate(width);
    } else {
      scopes_[scope_].families[trimmed(name.substr(0, bracket))] = {width, atoi(name.c_str() + bracket + 1)};
    }
  }
}

void RegisterFile::open_scope() {
  scopes_.push_back({scope_, {}, {}});
  open_.push_back(scope_);
  scope_ = int(scopes_.size()) - 1;
}

void RegisterFile::close_scope() {
  scope_ = open_.back();
  open_.pop_back();
}

const Register* RegisterFile::find(const std::string& name) {
  size_t digits = name.size();
  while (digits > 0 && isdigit(static_cast<unsigned char>(name[digits - 1]))) --digits;
  for (int scope = scope_; scope >= 0; scope = scopes_[scope].parent) {
    Scope& s = scopes_[scope];
    const auto it = s.registers.find(name);
    if (it != s.registers.end()) return &it->second;
    if (digits == name.size()) continue;
    const auto family = s.families.find(name.substr(0, digits));
    if (family != s.families.end() && atoi(name.c_str() + digits) < family->second.second)
      return &(s.registers[name] = allocate(family->second.first));
  }
  return nullptr;
}

Register RegisterFile::constant(u8 width, u64 value) {
  if (width == 1) value = value ? 1 : 0;
  if (width == 2 || width == 4) value &= (1ull << (8 * width)) - 1;
  Register& r = constants_[{width, value}];
  if (!r.exists()) r = allocate(width);
  return r;
}

Register RegisterFile::special(const std::string& name, Kernel& kernel) {
  const int index = special_register(name);
  if (index < 0) return {};
  Register& r = specials_[name];
  if (!r.exists()) {
    r = allocate(4);
    kernel.specials.push_back({r, index});
  }
  return r;
}

std::vector<u8> RegisterFile::initial() const {
  const u32 garbage = 0x7fffdead;  // NaN as a float
  std::vector<u8> image(align_up(bytes_, 128));
  for (size_t i = 0; i < image.size(); i += 4) memcpy(&image[i], &garbage, 4);
  for (const auto& [key, r] : constants_)
    for (int lane = 0; lane < kWarpSize; ++lane) set_lane(image.data(), r, lane, key.second);
  return image;
}

}  // namespace emulator
