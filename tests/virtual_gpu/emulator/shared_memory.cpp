#include "shared_memory.h"

#include <cstring>

#include "decode.h"

namespace emulator {
namespace {

constexpr u32 kReadByWgmma = 0xffffff;  // in read_clock: by a wgmma that was not waited for
constexpr u32 kTimeBits = 24;

struct LastWrite {  // an entry of write_clock
  u32 packed;
  u32 entry() const { return packed >> kTimeBits; }
  u32 time() const { return packed & ((1u << kTimeBits) - 1); }
  // Whether a warp doesn't know of it: another's write, later than the last synchronisation with it.
  bool races_with(const Warp& w) const { return packed && entry() != u32(w.index) && time() > w.clock[entry()]; }
};
u32 pack(u32 entry, u32 time) { return entry << kTimeBits | time; }

std::string writer(const Cta& cta, u32 entry) {
  if (entry < cta.warps.size()) return "warp " + std::to_string(entry);
  const u32 mbarrier = cta.mbarriers[entry - cta.warps.size()].address;
  return "the TMA through the mbarrier at " + std::to_string(mbarrier);
}

[[noreturn]] __attribute__((noinline)) void race(u32 word, const std::string& before, const std::string& now) {
  fault("race: shared memory at %u was %s and is %s without synchronisation between", word * 4 + kSharedBase,
        before.c_str(), now.c_str());
}
[[noreturn]] void race_with_write(const Cta& cta, u32 word, u32 entry, const char* now, const Warp& w) {
  race(word, "written by " + writer(cta, entry), now + std::string("warp ") + std::to_string(w.index));
}

u32 first_word(u32 address) { return (address - kSharedBase) / 4; }
u32 last_word(u32 address, u32 bytes) { return (address - kSharedBase + bytes + 3) / 4; }  // exclusive
u32* readers(Cta& cta, u32 word) { return &cta.read_clock[size_t(word) * cta.warps.size()]; }

void check_readable(const Cta& cta, u32 address, u32 bytes) {
  const u8* shadow = cta.shadow.data() + address;
  for (u32 i = 0; i < bytes; ++i) {
    if (shadow[i] >= kInFlight)
      fault("shared memory at %u is read while an asynchronous copy into it is in flight", address + i);
    if (!(shadow[i] & kWritten) && options.uninit)
      fault("shared memory at %u is read, and was never written", address + i);
  }
}

}  // namespace

void merge(Clock& into, const Clock& from) {
  for (size_t i = 0; i < into.size(); ++i) into[i] = std::max(into[i], from[i]);
}

u32 shared_address(u64 address) {
  if (address >= kSharedWindow) address -= kSharedWindow;
  if (address > ~0u) fault("%#lx is not a shared address", address);
  return u32(address);
}

u8* shared_bytes(Cta& cta, u32 address, u32 bytes, const char* what) {
  if (address < kSharedBase || address + bytes > kSharedBase + cta.smem_bytes || address + bytes < address)
    fault("shared %s of %u bytes at %u is outside the CTA's %u bytes at %u", what, bytes, address, cta.smem_bytes,
          kSharedBase);
  return cta.smem.data() + address;
}

void race_read(Cta& cta, Warp& w, u32 address, u32 bytes) {
  const u32 end = last_word(address, bytes);
  for (u32 word = first_word(address); word < end; ++word) {
    const LastWrite last{cta.write_clock[word]};
    if (last.races_with(w)) race_with_write(cta, word, last.entry(), "read by ", w);
    u32& time = readers(cta, word)[w.index];
    if (time < kReadByWgmma) time = w.clock[w.index];
  }
}

void race_write(Cta& cta, Warp& w, u32 address, u32 bytes, RaceWrite mode) {
  const u32 end = last_word(address, bytes), warps = u32(cta.warps.size()), self = u32(w.index);
  for (u32 word = first_word(address); word < end; ++word) {
    const LastWrite last{cta.write_clock[word]};
    if (last.races_with(w)) race_with_write(cta, word, last.entry(), "written by ", w);
    u32* read = readers(cta, word);
    for (u32 other = 0; other < warps; ++other)
      if (read[other] > w.clock[other] && other != self)
        race(word,
             "read by warp " + std::to_string(other) +
                 (read[other] >= kReadByWgmma ? " (by wgmma that was not waited for)" : ""),
             "overwritten by warp " + std::to_string(self));
    if (read[self] >= kReadByWgmma)
      fault("race: shared memory at %u is overwritten while this warp's own wgmma reads it", word * 4 + kSharedBase);
    if (mode == RaceWrite::kCheckAndRecord) {
      cta.write_clock[word] = pack(self, w.clock[self]);
      memset(read, 0, sizeof(u32) * warps);
    }
  }
}

void record_bulk_write(Cta& cta, u32 address, u32 bytes, u32 clock_entry, u32 time) {
  if (!options.race) return;
  const u32 end = first_word(address + bytes);
  for (u32 word = first_word(address); word < end; ++word) {
    cta.write_clock[word] = pack(clock_entry, time);
    memset(readers(cta, word), 0, sizeof(u32) * cta.warps.size());
  }
}

void record_bulk_read(Cta& cta, Warp& w, u32 address, u32 bytes, bool keep_wgmma) {
  if (!options.race) return;
  const u32 end = first_word(address + bytes);
  for (u32 word = first_word(address); word < end; ++word) {
    u32& time = readers(cta, word)[w.index];
    if (!keep_wgmma || time < kReadByWgmma) time = w.clock[w.index];
  }
}

void begin_wgmma_read(Cta& cta, Warp& w, u32 address, u32 bytes) {
  const u32 end = first_word(address + bytes);
  for (u32 word = first_word(address); word < end; ++word) {
    const LastWrite last{cta.write_clock[word]};
    if (last.races_with(w)) race_with_write(cta, word, last.entry(), "read by wgmma of ", w);
    readers(cta, word)[w.index] = kReadByWgmma;
  }
}

void end_wgmma_read(Cta& cta, Warp& w, u32 address, u32 bytes) {
  const u32 end = first_word(address + bytes);
  for (u32 word = first_word(address); word < end; ++word) readers(cta, word)[w.index] = 0;
}

const u8* read_shared(Context& c, u32 address, u32 bytes) {
  const u8* data = shared_bytes(c.cta, address, bytes, "read");
  check_readable(c.cta, address, bytes);
  if (options.race && bytes >= 4) race_read(c.cta, c.warp, address, bytes);
  return data;
}

u8* atomic_shared(Context& c, u32 address, u32 bytes) {
  u8* data = shared_bytes(c.cta, address, bytes, "atomic");
  check_readable(c.cta, address, bytes);
  return data;
}

void write_shared(Context& c, u32 address, const void* data, u32 bytes) {
  Cta& cta = c.cta;
  u8* to = shared_bytes(cta, address, bytes, "write");
  const u8* shadow = cta.shadow.data() + address;
  for (u32 i = 0; i < bytes; ++i)
    if (shadow[i] >= kInFlight)
      fault("shared memory at %u is written while an asynchronous copy into it is in flight", address + i);
  check_pending_stores(cta, address, bytes);
  // the same value again, as replicated layouts write it, is no race
  const bool same = (shadow[0] & kWritten) && memcmp(to, data, bytes) == 0;
  if (options.race && bytes >= 4 && !same) race_write(cta, c.warp, address, bytes, RaceWrite::kCheckAndRecord);
  mark_written(cta, &c.warp, address, bytes);
  memcpy(to, data, bytes);
}

const u8* async_proxy_read(Cta& cta, u32 address, u32 bytes, const char* reader) {
  const u8* data = shared_bytes(cta, address, bytes, "read");
  check_readable(cta, address, bytes);
  const u8* shadow = cta.shadow.data() + address;
  for (u32 i = 0; i < bytes; ++i)
    if (shadow[i] & kUnfenced)
      fault("%s reads shared memory at %u that st.shared or cp.async wrote, without fence.proxy.async between", reader,
            address + i);
  return data;
}

void mark_written(Cta& cta, Warp* generic_proxy, u32 address, u32 bytes) {
  u8 bits = kWritten;
  if (generic_proxy && cta.launch->kernel->async_proxy) {
    bits |= kUnfenced;
    std::vector<Unfenced>& unfenced = generic_proxy->unfenced;
    if (!unfenced.empty() && unfenced.back().end == address && unfenced.back().epoch == cta.epoch) {
      unfenced.back().end = address + bytes;
    } else {
      unfenced.push_back({address, address + bytes, cta.epoch});
    }
  }
  u8* shadow = cta.shadow.data() + address;
  for (u32 i = 0; i < bytes; ++i) shadow[i] = (shadow[i] & ~(kWritten | kUnfenced)) | bits;
}

void begin_copy_into(Cta& cta, u32 address, u32 bytes, const char* copy) {
  u8* shadow = cta.shadow.data() + address;
  for (u32 i = 0; i < bytes; ++i) {
    if (shadow[i] >= kInFlight)
      fault("%s into shared memory at %u, into which another asynchronous copy is in flight", copy, address + i);
    shadow[i] += kInFlight;
  }
}

void end_copy_into(Cta& cta, u32 address, u32 bytes) {
  u8* shadow = cta.shadow.data() + address;
  for (u32 i = 0; i < bytes; ++i) shadow[i] -= kInFlight;
}

void check_pending_stores(Cta& cta, u32 address, u32 bytes) {
  for (const BulkTransfer& t : cta.transfers)
    if (t.store && !t.released && address < t.shared + t.bytes && t.shared < address + bytes)
      fault("shared memory at %u is overwritten while a bulk store (line %d) may still read it", address, t.line);
}

// fence.proxy.async: the asynchronous proxy sees this warp's writes, and others' from before its last synchronisation.
static void fence_async_proxy(Context& c, const Instruction&, u32) {
  Cta& cta = c.cta;
  for (Warp& w : cta.warps)
    std::erase_if(w.unfenced, [&](const Unfenced& written) {
      if (&w != &c.warp && written.epoch >= c.warp.synchronised) return false;
      for (u32 at = written.begin; at < written.end; ++at) cta.shadow[at] &= ~kUnfenced;
      return true;
    });
}

bool decode_fence(Decoder& d) {  // fence.proxy.async.shared::cta; global memory is sequentially consistent
  if (!d.has("proxy")) return decode_nothing(d);
  for (const std::string& modifier : d.modifiers)
    if (modifier.starts_with("async")) return d.run(fence_async_proxy);
  return (d.has("tensormap::generic") || d.has("alias")) && decode_nothing(d);
}

}  // namespace emulator
