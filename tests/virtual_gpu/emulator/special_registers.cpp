#include "special_registers.h"

#include "lanes.h"

namespace emulator {
namespace {

struct Place {  // of a thread
  const Cta& cta;
  u32 warp, lane;
  u32 thread() const { return warp * kWarpSize + lane; }
  const u32* block() const { return cta.launch->block; }
  const u32* grid() const { return cta.launch->grid; }
};

struct SpecialRegister {
  const char* name;
  u32 (*value)(const Place&);
};

u32 zero(const Place&) { return 0; }
u32 one(const Place&) { return 1; }
template <int I>
u32 cta_id(const Place& at) {
  return at.cta.id[I];
}
template <int I>
u32 block_size(const Place& at) {
  return at.block()[I];
}
template <int I>
u32 grid_size(const Place& at) {
  return at.grid()[I];
}

constexpr u32 kMultiprocessors = 132;

const SpecialRegister kSpecialRegisters[] = {
    {"%tid.x", [](const Place& at) { return at.thread() % at.block()[0]; }},
    {"%tid.y", [](const Place& at) { return at.thread() / at.block()[0] % at.block()[1]; }},
    {"%tid.z", [](const Place& at) { return at.thread() / at.block()[0] / at.block()[1]; }},
    {"%ntid.x", block_size<0>},
    {"%ntid.y", block_size<1>},
    {"%ntid.z", block_size<2>},
    {"%ctaid.x", cta_id<0>},
    {"%ctaid.y", cta_id<1>},
    {"%ctaid.z", cta_id<2>},
    {"%nctaid.x", grid_size<0>},
    {"%nctaid.y", grid_size<1>},
    {"%nctaid.z", grid_size<2>},
    {"%laneid", [](const Place& at) { return at.lane; }},
    {"%warpid", [](const Place& at) { return at.warp; }},
    {"%nwarpid", [](const Place&) { return 64u; }},
    {"%lanemask_eq", [](const Place& at) { return 1u << at.lane; }},
    {"%lanemask_lt", [](const Place& at) { return (1u << at.lane) - 1; }},
    {"%lanemask_le", [](const Place& at) { return u32((2ull << at.lane) - 1); }},
    {"%lanemask_ge", [](const Place& at) { return ~((1u << at.lane) - 1); }},
    {"%lanemask_gt", [](const Place& at) { return ~u32((2ull << at.lane) - 1); }},
    // clusters are of one CTA
    {"%is_explicit_cluster", zero},
    {"%cluster_ctarank", zero},
    {"%cluster_ctaid.x", zero},
    {"%cluster_ctaid.y", zero},
    {"%cluster_ctaid.z", zero},
    {"%cluster_nctarank", one},
    {"%cluster_nctaid.x", one},
    {"%cluster_nctaid.y", one},
    {"%cluster_nctaid.z", one},
    {"%clusterid.x", cta_id<0>},
    {"%clusterid.y", cta_id<1>},
    {"%clusterid.z", cta_id<2>},
    {"%nclusterid.x", grid_size<0>},
    {"%nclusterid.y", grid_size<1>},
    {"%nclusterid.z", grid_size<2>},
    {"%smid", [](const Place& at) { return u32(at.cta.linear_id % kMultiprocessors); }},
    {"%nsmid", [](const Place&) { return kMultiprocessors; }},
    {"%dynamic_smem_size", [](const Place& at) { return at.cta.smem_bytes - at.cta.launch->kernel->static_smem; }},
    {"%total_smem_size", [](const Place& at) { return at.cta.smem_bytes; }},
    {"%gridid", zero},
};

}  // namespace

int special_register(const std::string& name) {
  int index = 0;
  for (const SpecialRegister& special : kSpecialRegisters) {
    if (name == special.name) return index;
    ++index;
  }
  return -1;
}

void set_special_registers(Warp& warp) {
  for (const auto& [reg, index] : warp.cta->launch->kernel->specials)
    for (u32 lane = 0; lane < kWarpSize; ++lane)
      lanes<u32>(warp.registers, reg)[lane] = kSpecialRegisters[index].value({*warp.cta, u32(warp.index), lane});
}

}  // namespace emulator
