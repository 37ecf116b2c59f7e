// A CTA's shared memory with what is known of every byte: written or not, copies in flight, who touched it last.
#pragma once
#include "emulator.h"

namespace emulator {

enum Shadow : u8 {
  kWritten = 1,
  kUnfenced = 2,  // by the generic proxy, without fence.proxy.async since
  kInFlight = 4,  // added for every asynchronous copy into it
};

// A generic or 32-bit shared address as the offset that shared memory is addressed by.
u32 shared_address(u64 address);
// The bytes themselves; faults outside the CTA's. `what` completes "shared ... of 16 bytes".
u8* shared_bytes(Cta& cta, u32 address, u32 bytes, const char* what);

// Accesses by a warp's ld, st and alike, with every check. An atomic's read is ordered: no race.
const u8* read_shared(Context& c, u32 address, u32 bytes);
u8* atomic_shared(Context& c, u32 address, u32 bytes);
void write_shared(Context& c, u32 address, const void* data, u32 bytes);
// Reads by the asynchronous proxy: wgmma and bulk stores.
const u8* async_proxy_read(Cta& cta, u32 address, u32 bytes, const char* reader);

// An asynchronous copy into shared memory is issued, and is over. Whoever ends it records the write.
void begin_copy_into(Cta& cta, u32 address, u32 bytes, const char* copy);
void end_copy_into(Cta& cta, u32 address, u32 bytes);
void mark_written(Cta& cta, Warp* generic_proxy, u32 address, u32 bytes);
// Faults where a bulk store that is in flight may still read these bytes.
void check_pending_stores(Cta& cta, u32 address, u32 bytes);

// Races: of an access with what other warps and bulk copies did since they last synchronised.
void race_read(Cta& cta, Warp& w, u32 address, u32 bytes);
enum class RaceWrite { kCheck, kCheckAndRecord };
void race_write(Cta& cta, Warp& w, u32 address, u32 bytes, RaceWrite mode);
// The mbarrier's bulk copies wrote these bytes at this time of their clock entry.
void record_bulk_write(Cta& cta, u32 address, u32 bytes, u32 clock_entry, u32 time);
// A bulk store read them on behalf of a warp, now or at the latest now.
void record_bulk_read(Cta& cta, Warp& w, u32 address, u32 bytes, bool keep_wgmma);
// wgmma reads them from now until its group has been waited for.
void begin_wgmma_read(Cta& cta, Warp& w, u32 address, u32 bytes);
void end_wgmma_read(Cta& cta, Warp& w, u32 address, u32 bytes);

}  // namespace emulator
