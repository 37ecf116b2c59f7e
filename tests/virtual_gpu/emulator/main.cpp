// The parser, the scheduler and the C interface.
#include "emu.h"
#include <cstdarg>
#include <functional>
#include <set>
using std::string; using std::vector;

Options options;
u64 counters[8];
void fault(const char* format, ...) {
  char t[2000]; va_list a; va_start(a, format); vsnprintf(t, sizeof t, format, a); va_end(a);
  throw Fault(t);
}
string Module::line(int n) const {
  if (n < 1 || size_t(n) > lines.size()) return "";
  const char* p = lines[n - 1]; const char* e = p; while (*e && *e != '\n') ++e;
  while (p < e && (*p == ' ' || *p == '\t')) ++p;
  string s(p, e); if (s.size() > 220) s = s.substr(0, 220) + "...";
  return s;
}

// ---------------------------------------------------------------- parser
static thread_local u32 extern_shared_at = kSmemBase;
struct Var { int slot; u8 w; };
struct Scope { int parent; std::map<string, Var> vars; std::map<string, int> labels; std::map<string, std::pair<int, int>> families; };  // families: %r<n>
struct Parser {
  Module& M; const char* p; int line = 1;
  Func* f = nullptr;
  vector<Scope> scopes; int scope = 0; vector<int> stack;
  struct Fix { int ins; string label; int scope; };
  vector<Fix> fixes;
  std::map<std::pair<u8, u64>, int> constants;
  std::map<string, int> specials;
  std::map<string, u64> symbols;   // shared offsets, addresses of globals and of parameters
  std::map<string, u64> locals;
  std::map<string, std::pair<u32, u32>> statics;  // size and alignment of static shared arrays; a kernel has those it names
  u64 symbol(const string& n) {
    auto it = symbols.find(n); if (it != symbols.end()) return it->second;
    auto st = statics.find(n); if (st == statics.end() || !f) bad("unknown symbol " + n);
    u32& total = f->static_smem; total = (total + st->second.second - 1) / st->second.second * st->second.second;
    u64 at = kSmemBase + total; total += st->second.first; symbols[n] = at; return at;
  }
  int rf = 0, dump = -1;
  std::map<string, vector<string>> tables;

  Parser(Module& m) : M(m), p(m.text.c_str()) {}
  [[noreturn]] void bad(const string& what) { throw Fault("line " + std::to_string(line) + ": " + what + ": " + M.line(line)); }
  void space() {
    for (;;) {
      if (*p == '\n') { ++line; ++p; }
      else if (*p == ' ' || *p == '\t' || *p == '\r') ++p;
      else if (p[0] == '/' && p[1] == '/') { while (*p && *p != '\n') ++p; }
      else if (p[0] == '/' && p[1] == '*') { while (*p && !(p[0] == '*' && p[1] == '/')) { if (*p == '\n') ++line; ++p; } if (*p) p += 2; }
      else return;
    }
  }
  static bool ident(char c) { return isalnum((unsigned char)c) || c == '_' || c == '$' || c == '%' || c == '.'; }
  string word() { space(); const char* s = p; while (ident(*p)) ++p; return string(s, p); }
  string until(char end) {  // the statement up to ';', comments out
    string s; int depth = 0;
    for (;;) {
      if (!*p) bad("unexpected end");
      if (p[0] == '/' && p[1] == '/') { while (*p && *p != '\n') ++p; continue; }
      if (p[0] == '/' && p[1] == '*') { while (*p && !(p[0] == '*' && p[1] == '/')) { if (*p == '\n') ++line; ++p; } p += 2; continue; }
      if (*p == '{' || *p == '(') ++depth; if (*p == '}' || *p == ')') --depth;
      if (*p == end && depth <= 0) { ++p; return s; }
      if (*p == '\n') { ++line; s += ' '; ++p; continue; }
      s += *p++;
    }
  }
  int alloc(u8 w) { int n = w == 1 ? 4 : 32 * w; rf = (rf + (w == 1 ? 3 : 63)) / (w == 1 ? 4 : 64) * (w == 1 ? 4 : 64); int s = rf; rf += n; return s; }
  static u8 width(const string& t) {
    if (t == ".pred") return 1;
    if (t == ".b8" || t == ".u8" || t == ".s8") return 2;
    if (t == ".b16" || t == ".u16" || t == ".s16" || t == ".f16" || t == ".bf16") return 2;
    if (t == ".b32" || t == ".u32" || t == ".s32" || t == ".f32" || t == ".f16x2") return 4;
    if (t == ".b64" || t == ".u64" || t == ".s64" || t == ".f64") return 8;
    return 0;
  }
  static u32 bytes(const string& t) { if (t == ".b8" || t == ".u8" || t == ".s8") return 1; if (t == ".b128") return 16; return width(t); }
  int constant(u8 w, u64 v) {
    if (w == 2) v &= 0xffff; if (w == 4) v &= 0xffffffff; if (w == 1) v = v ? 0xffffffff : 0;
    auto key = std::make_pair(w, v); auto it = constants.find(key);
    if (it != constants.end()) return it->second;
    return constants[key] = alloc(w);
  }
  Var* find(const string& n) {
    for (int s = scope; s >= 0; s = scopes[s].parent) {
      auto it = scopes[s].vars.find(n); if (it != scopes[s].vars.end()) return &it->second;
      size_t k = n.size(); while (k > 0 && isdigit((unsigned char)n[k - 1])) --k;
      if (k < n.size()) { auto fit = scopes[s].families.find(n.substr(0, k)); if (fit != scopes[s].families.end() && atoi(n.c_str() + k) < fit->second.second) { Var v{alloc(u8(fit->second.first)), u8(fit->second.first)}; return &(scopes[s].vars[n] = v); } }
    }
    return nullptr;
  }
  static void trim(string& s) { size_t a = s.find_first_not_of(" \t\r\n"), b = s.find_last_not_of(" \t\r\n"); s = a == string::npos ? "" : s.substr(a, b - a + 1); }
  static vector<string> split(const string& s) {
    vector<string> out; string cur; int depth = 0;
    for (char c : s) { if (c == '{' || c == '[' || c == '(') ++depth; if (c == '}' || c == ']' || c == ')') --depth; if (c == ',' && depth == 0) { trim(cur); out.push_back(cur); cur.clear(); } else cur += c; }
    trim(cur); if (!cur.empty() || !out.empty()) out.push_back(cur);
    return out;
  }
  Operand operand(string s) {
    Operand o; trim(s);
    if (s.empty()) return o;
    if (s[0] == '{') { o.kind = Operand::VEC; for (auto& x : split(s.substr(1, s.rfind('}') - 1))) o.list.push_back(operand(x)); return o; }
    if (s[0] == '[') {
      string in = s.substr(1, s.rfind(']') - 1); auto parts = split(in);
      o.kind = Operand::ADDR;
      string base = parts[0]; string off;
      size_t plus = base.find('+');
      if (plus != string::npos) { off = base.substr(plus + 1); base = base.substr(0, plus); trim(base); trim(off); }
      else { size_t minus = base.find('-'); if (minus != string::npos && minus > 0) { off = base.substr(minus); base = base.substr(0, minus); trim(base); } }
      if (!off.empty()) { string t; for (char ch : off) if (ch != ' ') t += ch; o.offset = strtoll(t.c_str(), nullptr, 0); }
      Operand b = operand(base);
      if (b.kind == Operand::REG) { o.slot = b.slot; o.w = b.w; }
      else if (b.kind == Operand::IMM) { o.w = 8; o.slot = constant(8, b.value); }
      else if (b.kind == Operand::SYM) { o.w = 8; o.slot = constant(8, symbol(b.name)); o.name = b.name; }
      else bad("cannot read the address " + s);
      if (parts.size() > 1) o.list.push_back(operand(parts[1]));
      return o;
    }
    if (s[0] == '!') { o = operand(s.substr(1)); o.neg = true; return o; }
    size_t bar = s.find('|');
    if (bar != string::npos) { o = operand(s.substr(0, bar)); Operand q = operand(s.substr(bar + 1)); o.slot2 = q.kind == Operand::SINK ? -1 : q.slot; if (o.kind == Operand::SINK) { o.kind = Operand::REG; o.slot = dump; o.w = 4; } return o; }
    if (s == "_") { o.kind = Operand::SINK; return o; }
    if (isdigit((unsigned char)s[0]) || s[0] == '-') {
      if (s[0] == '0' && (s[1] == 'f' || s[1] == 'F')) { o.kind = Operand::FIMM; o.value = strtoull(s.c_str() + 2, nullptr, 16); return o; }
      if (s[0] == '0' && (s[1] == 'd' || s[1] == 'D')) { o.kind = Operand::DIMM; o.value = strtoull(s.c_str() + 2, nullptr, 16); return o; }
      if (s.find('.') != string::npos) bad("decimal floating-point immediate " + s);
      o.kind = Operand::IMM; o.value = s[0] == '-' ? u64(strtoll(s.c_str(), nullptr, 0)) : strtoull(s.c_str(), nullptr, 0); return o;
    }
    if (Var* v = find(s)) { o.kind = Operand::REG; o.slot = v->slot; o.w = v->w; return o; }
    if (s[0] == '%') {
      static const char* names[] = {"%tid.x", "%tid.y", "%tid.z", "%ntid.x", "%ntid.y", "%ntid.z", "%ctaid.x", "%ctaid.y", "%ctaid.z", "%nctaid.x", "%nctaid.y", "%nctaid.z", "%laneid", "%warpid", "%lanemask_lt", "%lanemask_le", "%lanemask_eq", "%lanemask_ge", "%lanemask_gt",
        "%cluster_ctarank", "%cluster_ctaid.x", "%cluster_ctaid.y", "%cluster_ctaid.z", "%clusterid.x", "%clusterid.y", "%clusterid.z", "%cluster_nctarank", "%cluster_nctaid.x", "%cluster_nctaid.y", "%cluster_nctaid.z", "%nclusterid.x", "%nclusterid.y", "%nclusterid.z", "%smid", "%nsmid", "%dynamic_smem_size", "%total_smem_size", "%nwarpid", "%is_explicit_cluster", "%gridid"};
      for (int i = 0; i < int(sizeof names / sizeof *names); ++i) if (s == names[i]) {
        if (!specials.count(s)) { specials[s] = alloc(4); f->specials.push_back({specials[s], i}); }
        o.kind = Operand::REG; o.slot = specials[s]; o.w = 4; return o;
      }
    }
    o.kind = Operand::SYM; o.name = s; return o;
  }

  void declare_reg(const string& st) {  // .reg .b32 %r<10>, %x;
    size_t q = st.find('.', 1); size_t e = q; while (e < st.size() && !isspace((unsigned char)st[e])) ++e;
    string ty = st.substr(q, e - q); u8 w = width(ty);
    string rest = st.substr(e);
    for (auto& n : split(rest)) {
      size_t a = n.find('<');
      if (!w) { if (ty == ".b128") continue; bad("register type " + ty); }
      if (a != string::npos) { string base = n.substr(0, a); trim(base); scopes[scope].families[base] = {w, atoi(n.c_str() + a + 1)}; }
      else scopes[scope].vars[n] = Var{alloc(w), w};
    }
  }
  // .shared/.global/.const/.local declarations
  void variable(const string& st, bool external) {
    vector<string> t; { string cur; for (char c : st) { if (isspace((unsigned char)c)) { if (!cur.empty()) t.push_back(cur); cur.clear(); } else cur += c; } if (!cur.empty()) t.push_back(cur); }
    string space, ty; u32 align = 1; size_t i = 0; string rest;
    for (; i < t.size(); ++i) {
      if (t[i] == ".shared" || t[i] == ".global" || t[i] == ".const" || t[i] == ".local") space = t[i];
      else if (t[i] == ".extern") external = true;
      else if (t[i] == ".align") align = u32(atoi(t[++i].c_str()));
      else if (t[i][0] == '.' && bytes(t[i])) ty = t[i];
      else if (t[i][0] == '.') continue;
      else break;
    }
    for (; i < t.size(); ++i) rest += t[i] + " ";
    string init; size_t eq = rest.find('='); if (eq != string::npos) { init = rest.substr(eq + 1); rest = rest.substr(0, eq); }
    trim(rest); size_t br = rest.find('['); string name = rest.substr(0, br); trim(name);
    u64 n = 1; for (size_t q = br; q != string::npos && q < rest.size(); q = rest.find('[', q + 1)) { u64 k = strtoull(rest.c_str() + q + 1, nullptr, 0); n *= k; if (rest[q + 1] == ']') n = 0; }
    u32 b = bytes(ty); align = std::max(align, b); u64 size = n * b;
    if (space == ".shared") {
      if (external && size == 0) { symbols[name] = extern_shared_at; externs.push_back(name); M.smem_align = std::max(M.smem_align, align); }
      else { statics[name] = {u32(size), align}; symbols.erase(name); }
    } else if (space == ".local") {
      u32& l = f->local_bytes; l = (l + align - 1) / align * align; symbols[name] = l; locals[name] = l; l += u32(size);
    } else {
      auto g = std::make_unique<Global>(); g->name = name; g->bytes = size; g->storage.assign(size / 8 + 18, 0); g->at = reinterpret_cast<u8*>((u64(g->storage.data()) + 127) / 128 * 128);
      if (!init.empty()) {
        trim(init); auto list = init[0] == '{' ? split(init.substr(1, init.rfind('}') - 1)) : vector<string>{init};
        u8* q = g->at;
        for (auto& x : list) { if (x.empty()) continue; if (x[0] == '{') bad("nested initialiser"); u64 v; if (x[0] == '0' && (x[1] == 'f' || x[1] == 'd' || x[1] == 'F' || x[1] == 'D')) v = strtoull(x.c_str() + 2, nullptr, 16); else if (isdigit((unsigned char)x[0]) || x[0] == '-') v = u64(strtoll(x.c_str(), nullptr, 0)); else { auto it = symbols.find(x); if (it == symbols.end()) bad("initialiser " + x); v = it->second; } memcpy(q, &v, std::min<u32>(b, 8)); q += b; }
      }
      symbols[name] = u64(g->at); M.globals.push_back(std::move(g));
    }
  }
  vector<string> externs;
  bool externs_unused() const { return true; }

  void skip_braces() { space(); if (*p != '{') bad("expected {"); int d = 0; do { if (*p == '{') ++d; if (*p == '}') --d; if (*p == '\n') ++line; if (!*p) bad("unexpected end"); ++p; } while (d); }
  void to_eol() { while (*p && *p != '\n') ++p; }

  void instruction(string st) {
    Ins I; I.line = line; trim(st);
    string text = st;
    if (st[0] == '@') {
      size_t e = 1; bool neg = false; if (st[e] == '!') { neg = true; ++e; }
      size_t b = e; while (e < st.size() && !isspace((unsigned char)st[e])) ++e;
      Operand q = operand(st.substr(b, e - b)); if (q.kind != Operand::REG || q.w != 1) bad("predicate");
      I.pred = q.slot; I.neg = neg; st = st.substr(e); trim(st);
    }
    size_t e = 0; while (e < st.size() && !isspace((unsigned char)st[e]) && st[e] != '[' && st[e] != '{') ++e;
    string op = st.substr(0, e), rest = st.substr(e);
    vector<string> t; { string cur; for (size_t i = 0; i < op.size(); ++i) { if (op[i] == '.') { t.push_back(cur); cur.clear(); } else cur += op[i]; } t.push_back(cur); }
    try {
      Operands o; o.f = f; o.parser = this;
      if (t[0] == "bra" || t[0] == "call" || t[0] == "brx") {
        if (t[0] == "bra") { string l = rest; trim(l); fixes.push_back({int(f->code.size()), l, scope}); }
        else throw Fault("not supported");
      } else for (auto& x : split(rest)) o.v.push_back(operand(x));
      // sources that are symbols become constants
      if (!decode(I, t, o)) throw Fault("not supported");
    } catch (Fault& x) { f->unsupported.push_back("line " + std::to_string(line) + ": " + string(x.what()) + ": " + text); I.fn = nullptr; }
    f->code.push_back(I);
  }
  bool decode(Ins& I, const vector<string>& t, Operands& o);

  void body() {  // after '{'
    int depth = 1;
    for (;;) {
      space();
      if (!*p) bad("unexpected end");
      if (*p == '{') { ++p; ++depth; scopes.push_back({scope, {}, {}, {}}); stack.push_back(scope); scope = int(scopes.size()) - 1; continue; }
      if (*p == '}') { ++p; if (--depth == 0) return; scope = stack.back(); stack.pop_back(); continue; }
      if (*p == ';') { ++p; continue; }
      if (*p == '.') {
        const char* s = p; string d = word();
        if (d == ".loc" || d == ".file") { to_eol(); continue; }
        p = s;
        string st = until(';');
        if (d == ".reg") declare_reg(st); else if (d == ".pragma") ; else if (d == ".shared" || d == ".local" || d == ".global" || d == ".const") variable(st, false); else bad("directive " + d);
        continue;
      }
      // label?
      const char* s = p; while (ident(*p)) ++p; const char* e = p; while (*p == ' ' || *p == '\t') ++p;
      if (e > s && *p == ':' && p[1] != ':') { ++p; string name(s, e); space(); if (!strncmp(p, ".branchtargets", 14)) bad("brx tables"); scopes[scope].labels[name] = int(f->code.size()); continue; }
      p = s;
      int at = line; string st = until(';'); int after = line; line = at; instruction(st); line = after;
    }
  }
  void entry(bool kernel) {
    space();
    if (!kernel && *p == '(') { until(')'); ++p; }
    string name = word(); space();
    auto fn = std::make_unique<Func>(); f = fn.get(); f->name = name; f->sm = M.sm;
    u32 off = 0;
    vector<std::pair<string, u32>> ps;
    if (*p == '(') {
      ++p; string list = until(')');
      for (auto& x : split(list)) {
        vector<string> t; { string cur; for (char c : x) { if (isspace((unsigned char)c)) { if (!cur.empty()) t.push_back(cur); cur.clear(); } else cur += c; } if (!cur.empty()) t.push_back(cur); }
        if (t.empty()) continue;
        u32 align = 1, b = 0; string n = t.back(); u32 count = 1;
        for (size_t i = 0; i < t.size(); ++i) { if (t[i] == ".align" && (i == 0 || t[i - 1] == ".param" )) align = u32(atoi(t[i + 1].c_str())); else if (b == 0 && bytes(t[i])) b = bytes(t[i]); }
        size_t br = n.find('['); if (br != string::npos) { count = u32(atoi(n.c_str() + br + 1)); n = n.substr(0, br); }
        align = std::max(align, b); off = (off + align - 1) / align * align;
        f->params.push_back({n, off, b * count, align}); off += b * count;
      }
    }
    f->param_bytes = off; f->param_buffer.assign(off / 8 + 32, 0);
    // 128-byte aligned start
    u64 base = (u64(f->param_buffer.data()) + 127) / 128 * 128; f->image.clear();
    param_base = base;
    auto saved = symbols;
    for (auto& q : f->params) symbols[q.name] = base + q.offset;
    for (;;) {
      space();
      if (*p == '{' || *p == ';') break;
      string d = word();
      if (d == ".maxntid" || d == ".reqntid") { u32 n = 1; string args; const char* s = p; while (*p && *p != '\n' && *p != '{') ++p; args.assign(s, p); int k = 0; u32 r[3] = {1, 1, 1}; for (auto& x : split(args)) { r[k++] = u32(atoi(x.c_str())); n *= u32(atoi(x.c_str())); } f->max_threads = n; if (d == ".reqntid") { f->reqntid = true; memcpy(f->req, r, sizeof r); } }
      else if (d.empty()) bad("cannot read the kernel's header");
      else { while (*p && *p != '\n' && *p != '{') ++p; }
    }
    if (*p == ';') { ++p; symbols = saved; return; }
    ++p;
    const char* from = p; int from_line = line; auto clean = symbols;
    for (int pass = 0; pass < 2; ++pass) {  // the first finds the static shared memory, behind which extern arrays begin
      p = from; line = from_line; symbols = clean;
      for (auto& n : externs) symbols[n] = kSmemBase + (pass ? (f->static_smem + 127) / 128 * 128 : 0);
      f->static_smem = 0; f->local_bytes = 0; f->code.clear(); f->pool.clear(); f->specials.clear(); f->unsupported.clear();
      scopes.clear(); scopes.push_back({-1, {}, {}, {}}); scope = 0; stack.clear(); fixes.clear(); constants.clear(); specials.clear(); rf = 0; dump = alloc(8);
      body();
      if (!f->static_smem && pass == 0 && externs_unused()) break;
    }
    for (auto& x : fixes) {
      int target = -1;
      for (int s = x.scope; s >= 0 && target < 0; s = scopes[s].parent) { auto it = scopes[s].labels.find(x.label); if (it != scopes[s].labels.end()) target = it->second; }
      if (target < 0) bad("no label " + x.label);
      f->code[x.ins].target = target;
    }
    Ins end; end.line = line; Operands none; none.f = f; none.parser = this; decode(end, {"ret"}, none); f->code.push_back(end);
    rf = (rf + 127) / 128 * 128;
    f->image.assign(rf, 0xff);
    for (int i = 0; i < rf / 4; ++i) { u32 v = 0x7fffdead; memcpy(&f->image[i * 4], &v, 4); }
    for (auto& [k, slot] : constants) {
      for (int i = 0; i < 32; ++i) reg_set(f->image.data(), slot, k.first, i, k.second & (k.first == 1 ? 1 : ~0ULL));
    }
    if (kernel) M.funcs[name] = std::move(fn);
    symbols = saved; f = nullptr;
  }
  u64 param_base = 0;
  void module() {
    // first pass over the text for statics happens as they come: extern shared symbols are placed at the end
    for (;;) {
      space();
      if (!*p) break;
      const char* s = p; int at = line; string d = word();
      if (d == ".version" || d == ".address_size" || d == ".file" || d == ".pragma") { to_eol(); continue; }
      if (d == ".target") { const char* q = p; to_eol(); string x(q, p); size_t k = x.find("sm_"); if (k != string::npos) { M.sm = atoi(x.c_str() + k + 3); size_t q = x.find_first_not_of("0123456789", k + 3); M.arch_specific = q != string::npos && x[q] == 'a'; } continue; }
      if (d == ".section") { word(); skip_braces(); continue; }
      if (d == ".loc") { to_eol(); continue; }
      if (d == ".visible" || d == ".weak" || d == ".entry" || d == ".func" || d == ".extern" || d == ".common") {
        bool ext = d == ".extern";
        while (d == ".visible" || d == ".weak" || d == ".extern" || d == ".common") { s = p; d = word(); if (d == ".extern") ext = true; }
        if (d == ".entry") { entry(true); continue; }
        if (d == ".func") { space(); const char* keep = p; int keep_line = line; (void)keep; (void)keep_line; while (*p && *p != '{' && *p != ';') { if (*p == '\n') ++line; ++p; } if (*p == '{') skip_braces(); else ++p; continue; }
        p = s; string st = until(';'); variable(st, ext); continue;
      }
      if (d == ".shared" || d == ".global" || d == ".const") { p = s; line = at; string st = until(';'); variable(st, false); continue; }
      bad("cannot read");
    }
  }
};

int source(const Operands& o, const Operand& x, u8 w) {
  Parser& P = *o.parser;
  switch (x.kind) {
    case Operand::REG: if (x.w != w) fault("operand of %d bytes where %d are read", x.w, w); return x.slot;
    case Operand::IMM: return P.constant(w, x.value);
    case Operand::FIMM: if (w != 4) fault("float immediate"); return P.constant(4, x.value);
    case Operand::DIMM: if (w != 8) fault("double immediate"); return P.constant(8, x.value);
    case Operand::SYM: return P.constant(w, P.symbol(x.name));
    default: fault("unexpected operand");
  }
}
int source(const Operands& o, size_t i, u8 w) { return source(o, o[i], w); }
int dest(const Operands& o, size_t i, u8 w) {
  const Operand& x = o[i];
  if (x.kind == Operand::SINK) return o.parser->dump;
  if (x.kind != Operand::REG) fault("destination is no register");
  if (x.w != w) fault("destination of %d bytes where %d are written", x.w, w);
  return x.slot;
}
Opd any(const Operands& o, const Operand& x, u8 w) {
  if (x.kind == Operand::REG) return {x.slot, x.w};
  if (x.kind == Operand::SINK) return {o.parser->dump, 4};
  if (!w) fault("destination is no register");
  return {source(o, x, w), w};
}

// ---------------------------------------------------------------- control flow
static void h_bra(Ctx& c, const Ins& I, u32 m) {
  Warp& w = *c.w;
  if (m == w.mask) { c.npc = u32(I.target); return; }
  u32 stay = w.mask & ~m;
  LANES(m) w.lpc[i] = u32(I.target);
  LANES(stay) w.lpc[i] = c.npc;
  if (!w.div) { w.div = true; }
  c.npc = ~0u;  // regroup
}
static void h_exit(Ctx& c, const Ins&, u32 m) {
  Warp& w = *c.w;
  w.live &= ~m;
  if (m != w.mask) { u32 stay = w.mask & ~m; LANES(stay) w.lpc[i] = c.npc; w.div = true; c.npc = ~0u; w.mask = stay; }
  else { w.mask = 0; c.npc = ~0u; }
}
static void h_trap(Ctx&, const Ins&, u32) { fault("trap"); }
static void bar_complete(Cta& t, Barrier& b, const Func& f) {
  for (int wi : b.waiting) {
    Warp& w = t.warps[wi]; const Ins& I = f.code[w.bar_ins];
    if (I.k[3]) {
      if (I.k[3] == 3) { u32* d = PR<u32>(w.R, I.d); LANES(w.mask) d[i] = b.red_count; }
      else { u32& d = PR<u32>(w.R, I.d)[0]; bool v = I.k[3] == 1 ? b.red_and : b.red_or; d = (d & ~w.mask) | (v ? w.mask : 0); }
    }
    w.vc = b.clock; w.vc[w.index]++;
    w.state = RUN; w.bar = -1; w.sync_seq = t.seq + 1;
  }
  t.seq++;
  b = Barrier{};
  counters[C_BAR]++;
  t.launch->progress = t.launch->executed;
}
static void bar_check(Cta& t, int id) {
  Barrier& b = t.bars[id];
  if (b.waiting.empty() && !b.arrived) return;
  u32 expected = b.expected ? b.expected : 32 * u32(t.live_warps);
  if (b.arrived > expected) fault("barrier %d: %u threads arrived, %u were expected", id, b.arrived, expected);
  if (b.arrived == expected) bar_complete(t, b, *t.launch->func);
}
// k: arrive only, id (-1: in a), count slot in b, reduction (1 and 2 or 3 popc); c: predicate
static void h_bar(Ctx& c, const Ins& I, u32 m) {
  Warp& w = *c.w; Cta& t = *c.cta;
  if (m != w.mask || m != w.live) fault("bar.sync by some lanes of a warp (%08x of %08x)", m, w.live);
  u32 id = P<u32>(c, I.a)[ctz(m)];
  if (id > 15) fault("barrier %u", id);
  Barrier& b = t.bars[id];
  u32 count = I.b >= 0 ? P<u32>(c, I.b)[ctz(m)] : 0;
  if (count % 32) fault("barrier count %u is no multiple of 32", count);
  if (b.arrived && b.expected != count) fault("barrier %u: counts %u and %u", id, b.expected, count);
  if (b.arrived == 0) b.clock.assign(w.vc.size(), 0);
  b.expected = count; b.arrived += 32;
  for (size_t k = 0; k < w.vc.size(); ++k) b.clock[k] = std::max(b.clock[k], w.vc[k]);
  if (I.k[3]) { u32 p = (P<u32>(c, I.c)[0] ^ (I.k[4] ? ~0u : 0)) & m; b.red_and = b.red_and && p == m; b.red_or = b.red_or || p; b.red_count += __builtin_popcount(p); }
  if (I.k[0]) { w.vc[w.index]++; t.seq++; }
  else { w.state = BAR; w.bar = int(id); w.bar_ins = int(&I - t.launch->func->code.data()); b.waiting.push_back(w.index); }
  c.npc = w.pc + 1;
  // advance before completing: the warp may run again at once
  w.pc = c.npc;
  bar_check(t, int(id));
}
static void h_warpsync(Ctx&, const Ins&, u32) {}
static void h_cluster(Ctx&, const Ins&, u32) { fault("barrier.cluster"); }

bool Parser::decode(Ins& I, const vector<string>& t, Operands& o) {
  const string& op = t[0];
  auto has = [&](const char* s) { return std::find(t.begin() + 1, t.end(), s) != t.end(); };
  auto address = [&](size_t i) { const Operand& x = o[i]; if (x.kind != Operand::ADDR) fault("no address"); I.a = x.slot; I.wa = x.w; I.imm = x.offset; };
  auto list = [&](const Operand& x, u8 w) { if (x.kind == Operand::VEC) { for (auto& y : x.list) f->pool.push_back(any(o, y, w)); return int(x.list.size()); } f->pool.push_back(any(o, x, w)); return 1; };
  if (op == "bra") { I.fn = h_bra; return true; }
  if (op == "ret" || op == "exit") { I.fn = h_exit; return true; }
  if (op == "trap" || op == "brkpt") { I.fn = h_trap; return true; }
  if ((op == "bar" || op == "barrier") && t.size() > 1) {
    if (t[1] == "cluster") { I.fn = h_warpsync; I.coll = true; (void)h_cluster; return true; }  // clusters of one CTA
    size_t base = 0;
    string what = t[1] == "cta" ? t[2] : t[1];
    if (what == "warp") { I.fn = h_warpsync; I.member = source(o, 0, 4); I.coll = true; return true; }
    I.coll = true; I.fn = h_bar;
    if (what == "sync" || what == "arrive") { I.k[0] = what == "arrive"; I.a = source(o, 0, 4); if (o.size() > 1) I.b = source(o, 1, 4); return true; }
    if (what == "red") {
      I.k[3] = has("and") ? 1 : has("or") ? 2 : 3; I.d = dest(o, 0, I.k[3] == 3 ? 4 : 1); I.a = source(o, 1, 4);
      size_t last = o.size() - 1; if (last == 3) I.b = source(o, 2, 4); I.c = source(o, last, 1); I.k[4] = o[last].neg; (void)base; return true;
    }
    return false;
  }
  if (op == "ld" || op == "ldu" || op == "st") {
    bool ld = op != "st"; string ty = t.back(); int sp = SP_GEN; int vn = 1; bool sync = false;
    for (size_t i = 1; i + 1 < t.size(); ++i) {
      const string& x = t[i];
      if (x == "global") sp = SP_GLOBAL; else if (x == "shared" || x == "shared::cta" || x == "shared::cluster") sp = SP_SHARED; else if (x == "local") sp = SP_LOCAL; else if (x == "param" || x == "param::entry") sp = SP_PARAM; else if (x == "const") sp = SP_CONST;
      else if (x == "v2") vn = 2; else if (x == "v4") vn = 4; else if (x == "v8") vn = 8;
      else if (x == "volatile" || x == "acquire" || x == "relaxed") sync = true;
      else if (x == "nc" || x == "release" || x == "gpu" || x == "cta" || x == "sys" || x == "cluster" || x == "weak" || x == "ca" || x == "cg" || x == "cs" || x == "lu" || x == "cv" || x == "wb" || x == "wt" || x == "L1::no_allocate" || x == "L1::evict_last" || x == "L1::evict_first" || x == "L1::evict_normal" || x == "L1::evict_unchanged" || x == "L2::128B" || x == "L2::64B" || x == "L2::256B" || x == "L2::cache_hint" || x == "L2::evict_first" || x == "L2::evict_last" || x == "unified" || x == "mmio") ;
      else return false;
    }
    u32 n = bytes("." + ty); if (!n || n > 8) return false;
    bool sgn = ty[0] == 's';
    address(ld ? 1 : 0);
    const Operand& v = o[ld ? 0 : 1];
    I.vo = int(f->pool.size()); I.vn = list(v, ld ? 0 : u8(std::max(2u, n)));
    if (I.vn != vn) return false;
    bool other = false; for (int j = 0; j < I.vn; ++j) { u8 w = f->pool[I.vo + j].w; if (w != 4) other = true; if (w < n && v.kind != Operand::SINK) return false; }
    I.k[0] = sp == SP_CONST ? SP_GLOBAL : sp; I.k[1] = int(n); I.k[2] = sgn; I.k[3] = other; I.k[4] = sync && ld; I.fn = ld ? h_ld : h_st;
    return true;
  }
  if (op == "cp" && t.size() > 2 && t[1] == "async") {
    if (t[2] == "commit_group") { I.fn = h_cp_commit; return true; }
    if (t[2] == "wait_group") { I.k[0] = int(o[0].value); I.fn = h_cp_wait; return true; }
    if (t[2] == "wait_all") { I.k[0] = -1; I.fn = h_cp_wait; return true; }
    if (t[2] == "ca" || t[2] == "cg") {
      address(0); const Operand& s = o[1]; if (s.kind != Operand::ADDR || s.w != 8) return false;
      I.c = s.slot; I.k[1] = int(s.offset); I.k[0] = int(o[2].value); if (I.k[0] != 4 && I.k[0] != 8 && I.k[0] != 16) return false;
      if (t[2] == "cg" && I.k[0] != 16) return false;
      if (o.size() > 3) { if (o[3].kind == Operand::REG && o[3].w == 1) I.p = o[3].slot; else I.b = source(o, 3, 4); }
      I.fn = h_cpasync; return true;
    }
    if (t[2] == "bulk") {
      if (t[3] == "commit_group") { I.fn = h_bulk_commit; return true; }
      if (t[3] == "wait_group") { I.k[0] = int(o[0].value); I.k[1] = t.size() > 4 && t[4] == "read"; I.fn = h_bulk_wait; return true; }
      if (t[3] == "prefetch") { I.fn = h_warpsync; return true; }
      f->async_proxy = true;
      bool tensor = t[3] == "tensor"; int rank = 0, im = 0; bool load = false, store = false;
      for (size_t i = tensor ? 4 : 3; i < t.size(); ++i) {
        const string& x = t[i];
        if (x.size() == 2 && x[1] == 'd' && isdigit((unsigned char)x[0])) rank = x[0] - '0';
        else if (x == "shared::cluster" || x == "shared::cta") { if (!store) load = true; } else if (x == "global") { if (!load) store = true; }
        else if (x == "im2col" || x == "im2col_no_offs") im = 1;
        else if (x == "tile" || x == "mbarrier::complete_tx::bytes" || x == "L2::cache_hint" || x == "bulk_group") ;
        else return false;
      }
      I.k[0] = tensor; I.k[1] = rank; I.k[2] = im; I.vo = int(f->pool.size());
      const Operand& sm = load ? o[0] : o[1]; const Operand& gl = load ? o[1] : o[0];
      I.a = sm.slot; I.wa = sm.w; I.imm = sm.offset; I.c = gl.slot; I.k[5] = int(gl.offset); if (gl.w != 8) return false;
      if (tensor) { if (gl.list.empty() || int(gl.list[0].list.size()) != rank) return false; list(gl.list[0], 4); }
      size_t next = 2;
      if (!tensor) I.e = source(o, next++, 4);
      if (load) { I.b = o[next].slot; I.wb = o[next].w; I.k[4] = int(o[next].offset); ++next; }
      if (load && im) { if (o[next].kind != Operand::VEC || int(o[next].list.size()) != rank - 2) return false; list(o[next], 2); ++next; }
      I.fn = load ? h_bulk_load : h_bulk_store; return true;
    }
    return false;
  }
  if (op == "mbarrier") {
    string what = t[1]; bool expect = has("expect_tx");
    if (what == "init" || what == "expect_tx" || what == "complete_tx") { address(0); Opd b = any(o, o[1], 4); I.b = b.slot; I.wb = b.w; I.k[0] = what == "init" ? 0 : what == "expect_tx" ? 4 : 5; I.fn = h_mbar; return true; }
    if (what == "inval") { address(0); I.k[0] = 1; I.fn = h_mbar; return true; }
    if (what == "arrive") {
      size_t first = o[0].kind == Operand::ADDR ? 0 : 1;
      if (first && o[0].kind == Operand::REG) { I.k[4] = 1; I.d = o[0].slot; I.wd = o[0].w; }
      address(first); I.k[0] = expect ? 3 : 2;
      if (o.size() > first + 1) { Opd b = any(o, o[first + 1], 4); I.b = b.slot; I.wb = b.w; } else if (expect) return false;
      if (has("noComplete")) return false;
      I.fn = h_mbar; return true;
    }
    if (what == "try_wait" || what == "test_wait") { I.d = dest(o, 0, 1); address(1); Opd b = any(o, o[2], 4); I.b = b.slot; I.wb = b.w; I.k[0] = 6; I.k[1] = has("parity"); I.fn = h_mbar; return true; }
    return false;
  }
  if (op == "fence" || op == "membar") {
    if (has("proxy") ) { if (has("async") || has("async::generic")) I.fn = h_fence_proxy; else if (has("tensormap::generic") || has("alias")) I.fn = h_fence; else { for (auto& x : t) if (x.rfind("async", 0) == 0) I.fn = h_fence_proxy; if (!I.fn) return false; } return true; }
    I.fn = h_fence; return true;
  }
  if (op == "prefetch" && has("tensormap")) { I.fn = h_fence; return true; }
  if (op == "ldmatrix" || op == "stmatrix") {
    int n = has("x1") ? 1 : has("x2") ? 2 : has("x4") ? 4 : 0; if (!n || !has("m8n8") || t.back() != "b16") return false;
    bool ld = op == "ldmatrix"; address(ld ? 1 : 0); I.vo = int(f->pool.size()); I.vn = list(o[ld ? 0 : 1], 4); if (I.vn != n) return false;
    for (int j = 0; j < n; ++j) if (f->pool[I.vo + j].w != 4) return false;
    I.k[0] = n; I.k[1] = has("trans"); I.coll = true; I.fn = ld ? h_ldmatrix : h_stmatrix; return true;
  }
  if (op == "mma") {  // mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32
    size_t i = 1; if (t[i] != "sync" || t[i + 1] != "aligned") return false; i += 2;
    string shape = t[i]; if (t[i + 1] != "row" || t[i + 2] != "col") return false;
    string dt = t[i + 3], at = t[i + 4], bt = t[i + 5], ct = t[i + 6]; if (dt != "f32" || ct != "f32" || at != bt) return false;
    int ty = at == "f16" ? 0 : at == "bf16" ? 1 : at == "tf32" ? 2 : -1; if (ty < 0) return false;
    int K = shape == "m16n8k16" ? 16 : shape == "m16n8k8" ? 8 : shape == "m16n8k4" ? 4 : 0; if (!K || (ty == 2 && K == 16) || (ty < 2 && K == 4)) return false;
    I.k[0] = ty; I.k[1] = K; I.vo = int(f->pool.size()); for (int j = 0; j < 4; ++j) list(o[j], 4);
    size_t want = 8 + (ty == 2 ? K / 2 + K / 4 : K / 4 + K / 8); if (f->pool.size() - I.vo != want) return false;
    for (size_t j = I.vo; j < f->pool.size(); ++j) if (f->pool[j].w != 4) return false;
    I.coll = true; I.fn = h_mma; return true;
  }
  if (op == "wgmma") {
    f->async_proxy = true; I.coll = true;
    if (t[1] == "fence") { I.fn = h_wg_fence; return true; }
    if (t[1] == "commit_group") { I.fn = h_wg_commit; return true; }
    if (t[1] == "wait_group") { I.fn = h_wg_wait; I.k[0] = int(o[0].value); return true; }
    if (t[1] != "mma_async") return false;
    size_t i = 4; string shape = t[i]; int M_, N, K; if (sscanf(shape.c_str(), "m%dn%dk%d", &M_, &N, &K) != 3 || M_ != 64) return false;
    if (t[i + 1] != "f32" || t[i + 2] != t[i + 3]) return false;
    int ty = t[i + 2] == "f16" ? 0 : t[i + 2] == "bf16" ? 1 : t[i + 2] == "tf32" ? 2 : -1; if (ty < 0 || K != (ty == 2 ? 8 : 16)) return false;
    I.k[0] = ty; I.k[1] = N; I.k[2] = K; I.vo = int(f->pool.size());
    if (list(o[0], 0) != N / 2) return false;
    for (int j = 0; j < N / 2; ++j) if (f->pool[I.vo + j].w != 4) return false;
    if (o[1].kind == Operand::VEC) { I.k[3] = 1; if (list(o[1], 4) != 4) return false; } else I.a = source(o, 1, 8);
    I.b = source(o, 2, 8);
    if (o[3].kind == Operand::REG) { I.p = o[3].slot; if (o[3].w != 1) return false; } else I.imm = s64(o[3].value);
    I.k[6] = int(s64(o[4].value)); I.k[7] = int(s64(o[5].value));
    if (ty != 2) { size_t q = 6; if (!I.k[3]) I.k[4] = int(o[q++].value); I.k[5] = int(o[q].value); }
    I.fn = h_wgmma; return true;
  }
  if (op == "atom" || op == "red") {
    bool ret = op == "atom"; int sp = SP_GEN, k = -1; string ty = t.back();
    static const char* ops[] = {"add", "min", "max", "exch", "cas", "and", "or", "xor", "inc", "dec"};
    for (size_t i = 1; i + 1 < t.size(); ++i) {
      const string& x = t[i]; bool known = false;
      for (int j = 0; j < 10; ++j) if (x == ops[j]) { k = j; known = true; }
      if (x == "global") sp = SP_GLOBAL; else if (x == "shared" || x == "shared::cta") sp = SP_SHARED;
      else if (!known && x != "relaxed" && x != "release" && x != "acquire" && x != "acq_rel" && x != "gpu" && x != "cta" && x != "sys" && x != "cluster") return false;
    }
    if (k < 0) return false;
    u32 n = bytes("." + ty); if (n != 4 && n != 8) return false;
    I.k[0] = sp; I.k[1] = int(n); I.k[2] = k; I.k[3] = ty[0] == 's' ? 1 : ty == "f32" ? 2 : ty == "f64" ? 3 : (ty == "f16x2" || ty == "bf16x2") ? 4 : 0; I.k[4] = ret;
    size_t q = 0; if (ret) { I.d = dest(o, 0, u8(n)); I.wd = u8(n); q = 1; }
    address(q); I.b = source(o, q + 1, u8(n)); I.wb = u8(n); if (k == 4) { I.c = source(o, q + 2, u8(n)); I.wc = u8(n); }
    I.fn = h_atom; return true;
  }
  return decode_alu(*f, I, t, o);
}

// ---------------------------------------------------------------- the scheduler
void wake(Cta& t) { for (auto& w : t.warps) if (w.state == SLEEP) w.state = RUN; }
static void regroup(Warp& w, Launch& L) {  // lanes' counters are in lpc
  if (!w.live) return;
  u32 candidates = w.live & ~w.parked;
  if (!candidates) {
    // every lane waits for a collective: those at the lowest counter are all that will come
    fault("a warp-wide instruction is reached by some lanes only: the lanes wait at different instructions");
  }
  u32 best = ~0u;
  if (w.yielded && rnd(L) % 2) { u32 n = rnd(L) % u32(__builtin_popcount(candidates)), q = candidates; while (n--) q &= q - 1; best = w.lpc[ctz(q)]; }
  else LANES(candidates) best = std::min(best, w.lpc[i]);
  u32 mask = 0; u32 other = ~0u;
  LANES(w.live) { if (w.lpc[i] == best) mask |= 1u << i; else if (!(w.parked >> i & 1)) other = std::min(other, w.lpc[i]); }
  w.parked &= ~mask;
  w.mask = mask; w.pc = best; w.other = other;
  w.div = mask != w.live;
}
static void run_warp(Launch& L, Cta& t, Warp& w, u32 quantum) {
  Func& f = *L.func; Ctx c{w.R, &w, &t, &L, 0, 0};
  const Ins* code = f.code.data();
  u64 n = 0, lanes = 0;
  try {
    while (quantum-- && w.state == RUN) {
      if (w.div && (w.pc >= w.other || w.parked || w.yielded)) {
        LANES(w.mask) w.lpc[i] = w.pc;
        // lanes parked where we stand join; otherwise the lowest goes first
        bool at_parked = false; LANES(w.parked) if (w.lpc[i] == w.pc) at_parked = true;
        if (w.pc >= w.other || at_parked || w.yielded) regroup(w, L);
        w.yielded = false;
      }
      const Ins& I = code[w.pc];
      u32 m = w.mask;
      if (I.pred >= 0) { u32 p = *reinterpret_cast<u32*>(w.R + I.pred); m &= I.neg ? ~p : p; }
      if (I.coll && w.div && m) {
        u32 need = w.live; if (I.member >= 0) need &= PR<u32>(w.R, I.member)[ctz(w.mask)];
        if ((w.mask & need) != need) {
          LANES(w.mask) w.lpc[i] = w.pc;
          w.parked |= w.mask; regroup(w, L); continue;
        }
      }
      ++n; lanes += __builtin_popcount(m);
      c.npc = w.pc + 1; c.mask = w.mask;
      if (m) {
        I.fn(c, I, m);
        if (c.npc == ~0u) {
          if (!w.live) { w.state = DONE; break; }
          if (!w.mask || w.div) { regroup(w, L); continue; }
        }
      }
      w.pc = c.npc;
    }
  } catch (Fault& x) {
    L.executed += n;
    const Ins& I = code[std::min<size_t>(w.pc, f.code.size() - 1)];
    const Ins& J = w.state == BAR && w.pc ? code[w.pc - 1] : I;
    char head[300]; snprintf(head, sizeof head, "%s: CTA (%u, %u, %u), warp %d, lanes %08x, PTX line %d: ", f.name.substr(0, 100).c_str(), t.id[0], t.id[1], t.id[2], w.index, w.mask, J.line);
    throw Fault(string(head) + x.what() + "\n    " + L.module->line(J.line));
  }
  w.yielded = false;
  L.executed += n; counters[C_WARP] += n; counters[C_THREAD] += lanes;
  if (w.state == DONE) {
    for (auto& op : w.wg) if (!op.done) fault("warp %d ends with wgmma in flight", w.index);
    if (!w.cp.empty()) fault("warp %d ends with cp.async in flight (line %d): no wait", w.index, std::abs(w.cp[0].line));
    t.live_warps--;
    L.progress = L.executed;
    if (t.live_warps) for (int i = 0; i < 16; ++i) bar_check(t, i);
  }
}
static std::unique_ptr<Cta> make_cta(Launch& L, u64 linear, std::unique_ptr<Cta> old) {
  auto c = old ? std::move(old) : std::make_unique<Cta>();
  Cta& t = *c; Func& f = *L.func;
  t.launch = &L; t.linear = linear; t.id[0] = u32(linear % L.grid[0]); t.id[1] = u32(linear / L.grid[0] % L.grid[1]); t.id[2] = u32(linear / L.grid[0] / L.grid[1]);
  t.smem_bytes = L.smem_bytes; t.smem.assign(kSmemBase + t.smem_bytes + 16, 0xff); t.shadow.assign(kSmemBase + t.smem_bytes + 16, 0);
  u32 threads = L.block[0] * L.block[1] * L.block[2], nw = (threads + 31) / 32;
  if (options.race) { u32 g = t.smem_bytes / 4 + 2; t.wclock.assign(g, 0); t.rclock.assign(size_t(g) * nw, 0); }
  t.regs.resize(f.image.size() * nw + 64);
  t.warps.clear(); t.warps.resize(nw);
  t.mbars.clear(); t.bulks.clear(); for (auto& b : t.bars) b = Barrier{};
  t.seq = 1;
  u8* base = reinterpret_cast<u8*>((u64(t.regs.data()) + 63) / 64 * 64);
  for (u32 k = 0; k < nw; ++k) {
    Warp& w = t.warps[k]; w.cta = &t; w.index = int(k); w.R = base + f.image.size() * k; memcpy(w.R, f.image.data(), f.image.size());
    u32 n = std::min(32u, threads - k * 32); w.live = w.mask = n == 32 ? ~0u : (1u << n) - 1; w.vc.assign(256, 0); w.vc[k] = 1;
    for (auto [slot, which] : f.specials) {
      u32* d = PR<u32>(w.R, slot);
      for (u32 i = 0; i < 32; ++i) {
        u32 tid = k * 32 + i, v = 0;
        switch (which) {
          case 0: v = tid % L.block[0]; break; case 1: v = tid / L.block[0] % L.block[1]; break; case 2: v = tid / L.block[0] / L.block[1]; break;
          case 3: case 4: case 5: v = L.block[which - 3]; break; case 6: case 7: case 8: v = t.id[which - 6]; break; case 9: case 10: case 11: v = L.grid[which - 9]; break;
          case 12: v = i; break; case 13: v = k; break; case 14: v = (1u << i) - 1; break; case 15: v = u32((2ULL << i) - 1); break; case 16: v = 1u << i; break; case 17: v = ~((1u << i) - 1); break; case 18: v = ~u32((2ULL << i) - 1); break;
          case 19: case 20: case 21: case 22: v = 0; break; case 23: case 24: case 25: v = t.id[which - 23]; break; case 26: case 27: case 28: case 29: v = 1; break; case 30: case 31: case 32: v = L.grid[which - 30]; break;
          case 33: v = u32(linear % 132); break; case 34: v = 132; break; case 35: v = L.smem_bytes - L.func->static_smem; break; case 36: v = L.smem_bytes; break; case 37: v = 64; break; case 38: v = 0; break; default: v = 0;
        }
        d[i] = v;
      }
    }
  }
  t.live_warps = int(nw);
  counters[C_CTA]++;
  return c;
}
static string where(const Launch& L, const vector<std::unique_ptr<Cta>>& ctas) {
  string s; int n = 0;
  static const char* names[] = {"runs", "waits at a barrier", "waits for an mbarrier", "is done"};
  for (auto& t : ctas) for (auto& w : t->warps) if (w.state != DONE && n++ < 24) {
    u32 pc = w.state == BAR ? u32(w.bar_ins) : w.pc; int line = L.func->code[std::min<size_t>(pc, L.func->code.size() - 1)].line;
    char b[200]; snprintf(b, sizeof b, "\n    CTA %lu warp %d %s, PTX line %d: ", t->linear, w.index, names[w.state], line); s += b + L.module->line(line).substr(0, 100);
  }
  for (auto& t : ctas) for (auto& b : t->mbars) if (b.valid && n++ < 60) { char x[160]; snprintf(x, sizeof x, "\n    CTA %lu mbarrier at %u: phase %u, %d of %d arrivals outstanding, %ld bytes outstanding", t->linear, b.address, b.phase, b.pending, b.expected, b.tx); s += x; }
  return s;
}
static void run_launch(Launch& L) {
  u64 total = u64(L.grid[0]) * L.grid[1] * L.grid[2], next = 0;
  vector<u64> order;
  if (options.first) next = options.first > 0 ? std::min<u64>(u64(options.first), total) : total - std::min<u64>(total, u64(-options.first));  // the last CTAs only
  if (options.shuffle && !options.first) { order.resize(total); for (u64 i = 0; i < total; ++i) order[i] = i; for (u64 i = total; i > 1; --i) std::swap(order[i - 1], order[rnd(L) % i]); }
  vector<std::unique_ptr<Cta>> ctas; std::unique_ptr<Cta> spare;
  auto start = [&] { u64 k = order.empty() ? next : order[next]; ++next; ctas.push_back(make_cta(L, k, std::move(spare))); };
  while (next < total && s64(ctas.size()) < options.resident) start();
  vector<std::pair<Cta*, Warp*>> ready;
  u64 idle = 0, seen = 0;
  while (!ctas.empty()) {
    ready.clear();
    for (auto& t : ctas) for (auto& w : t->warps) if (w.state == RUN) ready.push_back({t.get(), &w});
    if (ready.empty()) {
      bool any = false;
      try { for (auto& t : ctas) if (async_step(*t, true)) any = true; } catch (Fault& x) { throw Fault(string(x.what()) + where(L, ctas)); }
      if (any) { L.progress = L.executed; for (auto& t : ctas) wake(*t); idle = 0; continue; }
      bool slept = false;
      for (auto& t : ctas) for (auto& w : t->warps) if (w.state == SLEEP) { w.state = RUN; slept = true; }
      if (slept && ++idle < 500) continue;
      throw Fault(L.func->name.substr(0, 100) + ": deadlock: every warp waits" + where(L, ctas));
    }
    auto [t, w] = ready[rnd(L) % ready.size()];
    u32 shift = rnd(L) % 10; u32 quantum = std::min<u32>(1 + rnd(L) % (2u << shift), u32(options.quantum));
    if (w->pc != 0) {}
    u64 before = L.executed;
    run_warp(L, *t, *w, quantum);
    if (L.progress != seen) { seen = L.progress; idle = 0; }
    (void)before;
    if (s64(L.executed - L.progress) > options.stall) throw Fault(L.func->name.substr(0, 100) + ": no barrier completed and no warp ended in " + std::to_string(options.stall) + " warp instructions" + where(L, ctas));
    if (s64(L.executed) > options.limit) throw Fault(L.func->name.substr(0, 100) + ": the limit of " + std::to_string(options.limit) + " warp instructions is reached" + where(L, ctas));
    // a warp that spins on global memory keeps everyone busy while a copy that it waits for indirectly is in flight
    if (L.style != 0 && L.executed - L.progress > 20000 && rnd(L) % 4 == 0 && async_step(*ctas[rnd(L) % ctas.size()], false)) L.progress = L.executed;
    if (L.style == 1) {
      if (rnd(L) % 4 == 0) async_step(*t, false);
      if (rnd(L) % 4 == 0) { Warp& x = t->warps[rnd(L) % t->warps.size()]; wg_step(x); }
      if (rnd(L) % 4 == 0) { Warp& x = t->warps[rnd(L) % t->warps.size()]; if (!x.cp.empty()) { CpAsync& op = x.cp[rnd(L) % x.cp.size()]; if (op.line > 0) { complete_cp(x, op, op.mask); op.line = -op.line; } } }
    }
    if (t->live_warps == 0) {
      try { finish_cta(*t); } catch (Fault& x) { throw Fault(L.func->name.substr(0, 100) + ": CTA " + std::to_string(t->linear) + ": " + x.what()); }
      for (size_t i = 0; i < ctas.size(); ++i) if (ctas[i].get() == t) { spare = std::move(ctas[i]); ctas.erase(ctas.begin() + i); break; }
      if (next < total) start();
    }
  }
}

// ---------------------------------------------------------------- interface
extern "C" {
void* ptx_load(const char* text) {
  Module* m = new Module; m->text = text;
  const char* p = m->text.c_str(); m->lines.push_back(p); for (; *p; ++p) if (*p == '\n') m->lines.push_back(p + 1);
  try {
    Parser(*m).module();
  } catch (Fault& x) { m->error = x.what(); }
  for (auto& g : m->globals) ptx_allow(g->at, g->bytes, 1, -1);
  return m;
}
const char* ptx_error(void* m) { return static_cast<Module*>(m)->error.c_str(); }
void ptx_free(void* module) {
  Module* m = static_cast<Module*>(module);
  for (auto& g : m->globals) ptx_forbid(g->at);
  for (auto& [k, f] : m->funcs) ptx_forbid(reinterpret_cast<void*>((u64(f->param_buffer.data()) + 127) / 128 * 128));
  delete m;
}
int ptx_launch(void* module, const char* kernel, int device, const u32 grid[3], const u32 block[3], u32 dynamic_smem, const void* params, size_t size, u64 seed) {
  Module& m = *static_cast<Module*>(module); m.error.clear(); launch_device = device;
  try {
    auto it = m.funcs.find(kernel);
    if (it == m.funcs.end()) fault("no kernel %s", kernel);
    Func& f = *it->second;
    if (!f.unsupported.empty()) throw Fault("instructions that the emulator does not know: " + f.unsupported[0] + " (and " + std::to_string(f.unsupported.size() - 1) + " more)");
    u32 threads = block[0] * block[1] * block[2];
    if (threads == 0 || threads > 1024) fault("%u threads in a CTA", threads);
    if (f.max_threads && threads > f.max_threads) fault("%u threads, the kernel's .maxntid allows %u", threads, f.max_threads);
    if (f.reqntid && (block[0] != f.req[0] || block[1] != f.req[1] || block[2] != f.req[2])) fault("block (%u, %u, %u), the kernel requires (%u, %u, %u)", block[0], block[1], block[2], f.req[0], f.req[1], f.req[2]);
    if (grid[0] == 0 || grid[1] == 0 || grid[2] == 0 || grid[0] > 0x7fffffff || grid[1] > 65535 || grid[2] > 65535) fault("grid (%u, %u, %u)", grid[0], grid[1], grid[2]);
    if (size != f.param_bytes) { if (size < f.param_bytes || size > f.param_bytes + 128) fault("%zu bytes of parameters, the kernel has %u", size, f.param_bytes); }
    u8* base = reinterpret_cast<u8*>((u64(f.param_buffer.data()) + 127) / 128 * 128);
    memcpy(base, params, f.param_bytes);
    ptx_allow(base, std::max<u32>(f.param_bytes, 1), 0, -1);
    Launch L; L.module = &m; L.func = &f; memcpy(L.grid, grid, 12); memcpy(L.block, block, 12);
    L.smem_bytes = dynamic_smem ? (f.static_smem + 127) / 128 * 128 + dynamic_smem : f.static_smem;
    u32 limit = options.smem_limit ? u32(options.smem_limit) : f.sm >= 90 ? 227 * 1024 : 163 * 1024;
    if (L.smem_bytes > limit) fault("%u bytes of shared memory, the device allows %u", L.smem_bytes, limit);
    L.rng = seed * 0x9E3779B97F4A7C15ULL + 0x1234567; L.rng ^= L.rng >> 29; if (!L.rng) L.rng = 1; for (int i = 0; i < 8; ++i) rnd(L);
    L.style = options.style >= 0 ? int(options.style) : int(seed % 3 == 0 ? 2 : seed % 3 == 1 ? 1 : 0);
    run_launch(L);
    return 0;
  } catch (Fault& x) { m.error = x.what(); return 1; }
}
void ptx_counters(u64 out[8]) { memcpy(out, counters, sizeof counters); }
int ptx_option(const char* n, s64 v) {
  string s = n;
  if (s == "tma_tf32_round") options.tma_tf32_round = v; else if (s == "uninit") options.uninit = v; else if (s == "resident") options.resident = v; else if (s == "shuffle") options.shuffle = v; else if (s == "limit") options.limit = v; else if (s == "style") options.style = v; else if (s == "race") options.race = v; else if (s == "quantum") options.quantum = v; else if (s == "stall") options.stall = v; else if (s == "approx") options.approx = v; else if (s == "first") options.first = v; else if (s == "smem_limit") options.smem_limit = v; else return 1;
  return 0;
}
size_t ptx_kernels(void* module, char* out, size_t n) { string s; for (auto& [k, v] : static_cast<Module*>(module)->funcs) s += k + "\n"; if (n) { size_t k = std::min(n - 1, s.size()); memcpy(out, s.data(), k); out[k] = 0; } return s.size(); }
s64 ptx_global(void* module, const char* name, size_t* bytes) { for (auto& g : static_cast<Module*>(module)->globals) if (g->name == name) { if (bytes) *bytes = g->bytes; return s64(g->at); } return 0; }
int ptx_param_layout(void* module, const char* kernel, u32* offsets, u32* sizes, u32 max) {
  auto& fs = static_cast<Module*>(module)->funcs; auto it = fs.find(kernel); if (it == fs.end()) return -1;
  u32 i = 0; for (auto& q : it->second->params) { if (i < max) { offsets[i] = q.offset; sizes[i] = q.size; } ++i; }
  return int(i);
}
const char* ptx_unsupported(void* module, const char* kernel) { string& s = static_cast<Module*>(module)->unsupported; s.clear(); auto& fs = static_cast<Module*>(module)->funcs; auto it = fs.find(kernel); if (it != fs.end()) for (auto& x : it->second->unsupported) s += x + "\n"; return s.c_str(); }
int ptx_info(void* module, const char* kernel, ptx_kernel_info* out) {
  Module& m = *static_cast<Module*>(module); auto it = m.funcs.find(kernel); if (it == m.funcs.end()) return 1;
  Func& f = *it->second; *out = {f.max_threads ? f.max_threads : 1024, f.static_smem, f.param_bytes, u32(m.sm), m.arch_specific}; return 0;
}
}
