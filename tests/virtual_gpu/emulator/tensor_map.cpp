#include "tensor_map.h"

#include <cstring>

#include "ptx.h"

namespace emulator {
namespace {

constexpr u32 kMagic = 0x544d4150;
enum DataType { kFloat16 = 6, kDataTypes = 13 };  // CUtensorMapDataType; later ones are packed
constexpr u8 kTypeBytes[kDataTypes] = {1, 2, 4, 4, 8, 8, 2, 4, 8, 2, 4, 4, 4};

thread_local std::string last_error;

struct Common {  // the arguments of both functions
  const void* map;
  int data_type;
  u32 rank;
  const void* address;
  const u64 *dims, *strides;
  const u32* element_strides;
  int interleave, swizzle, l2_promotion, oob_fill;
};

// The checks that both share; the emulator's own limits say so. The documentation also wants each stride to include the
// preceding one, which the driver does not enforce: CUTLASS's maps of weights, (C, K, S, R), break it.
TensorMap encode_common(const Common& c, u32 least_rank) {
  if (reinterpret_cast<u64>(c.map) % 64) fault("tensorMap is not aligned to 64 bytes");
  if (c.data_type < 0 || c.data_type > 15) fault("tensorDataType %d is none", c.data_type);
  if (c.data_type >= kDataTypes) fault("tensorDataType %d, packed, is not supported by the emulator", c.data_type);
  if (c.rank < least_rank || c.rank > 5) fault("tensorRank %u is not in %u..5", c.rank, least_rank);
  if (c.interleave < 0 || c.interleave > 2) fault("interleave %d is none", c.interleave);
  if (c.interleave) fault("interleave %d is not supported by the emulator", c.interleave);
  if (reinterpret_cast<u64>(c.address) % 16) fault("globalAddress %p is not a multiple of 16", c.address);
  if (c.swizzle < 0 || c.swizzle > 6) fault("swizzle %d is none", c.swizzle);
  if (c.swizzle > 3) fault("swizzle %d is not supported by the emulator", c.swizzle);
  if (c.l2_promotion < 0 || c.l2_promotion > 3) fault("l2Promotion %d is none", c.l2_promotion);
  if (c.oob_fill < 0 || c.oob_fill > 1) fault("oobFill %d is none", c.oob_fill);
  if (c.oob_fill && c.data_type < kFloat16) fault("oobFill NaN needs a floating-point type, got %d", c.data_type);
  if (c.oob_fill) fault("oobFill NaN is not supported by the emulator");
  TensorMap map;
  memset(&map, 0, sizeof map);
  map.magic = kMagic;
  map.data_type = u8(c.data_type);
  map.rank = u8(c.rank);
  map.swizzle = u8(c.swizzle);
  map.address = reinterpret_cast<u64>(c.address);
  for (u32 i = 0; i < c.rank; ++i) {
    if (c.dims[i] < 1 || c.dims[i] > 1ull << 32) fault("globalDim[%u] = %lu is not in 1..2^32", i, c.dims[i]);
    if (c.element_strides[i] < 1 || c.element_strides[i] > 8)
      fault("elementStrides[%u] = %u is not in 1..8", i, c.element_strides[i]);
    map.last[i] = u32(c.dims[i] - 1);
    map.element_strides[i] = u8(c.element_strides[i]);
  }
  for (u32 i = 0; i + 1 < c.rank; ++i) {
    if (c.strides[i] % 16 || c.strides[i] >= 1ull << 40)
      fault("globalStrides[%u] = %lu is not a multiple of 16 below 2^40", i, c.strides[i]);
    map.strides[i] = c.strides[i];
  }
  return map;
}

void check_inner(const TensorMap& map, const char* argument) {
  const u32 bytes = inner_bytes(map);
  if (bytes % 16) fault("%s takes %u bytes, not a multiple of 16", argument, bytes);
  if (map.swizzle && bytes > swizzle_span(map.swizzle))
    fault("%s takes %u bytes, more than the swizzle of %u", argument, bytes, swizzle_span(map.swizzle));
}

TensorMap encode_tiled(const Common& c, const u32* box) {
  TensorMap map = encode_common(c, 1);
  for (u32 i = 0; i < c.rank; ++i) {
    if (box[i] < 1 || box[i] > 256) fault("boxDim[%u] = %u is not in 1..256", i, box[i]);
    if (i > 0 && c.element_strides[i] != 1)
      fault("elementStrides[%u] = %u in tile mode is not supported by the emulator", i, c.element_strides[i]);
    map.box[i] = u16(box[i]);
  }
  check_inner(map, "boxDim[0]");
  return map;
}

TensorMap encode_im2col(const Common& c, const int* lower, const int* upper, u32 channels, u32 pixels) {
  TensorMap map = encode_common(c, 3);
  const int limit = c.rank == 3 ? 32768 : c.rank == 4 ? 128 : 16;
  for (u32 i = 0; i + 2 < c.rank; ++i) {
    if (lower[i] < -limit || lower[i] >= limit)
      fault("pixelBoxLowerCorner[%u] = %d is not in %d..%d", i, lower[i], -limit, limit - 1);
    if (upper[i] < -limit || upper[i] >= limit)
      fault("pixelBoxUpperCorner[%u] = %d is not in %d..%d", i, upper[i], -limit, limit - 1);
    if (i64(c.dims[i + 1]) + upper[i] - lower[i] < 1)
      fault("the bounding box along dimension %u is empty: %lu + %d - %d", i + 1, c.dims[i + 1], upper[i], lower[i]);
    map.lower[i] = i16(lower[i]);
    map.upper[i] = i16(upper[i]);
  }
  if (channels < 1 || channels > 256) fault("channelsPerPixel = %u is not in 1..256", channels);
  if (pixels < 1 || pixels > 1024) fault("pixelsPerColumn = %u is not in 1..1024", pixels);
  map.im2col = 1;
  map.channels = u16(channels);
  map.pixels = u16(pixels);
  check_inner(map, "channelsPerPixel");
  return map;
}

template <class Encode>
int encode(void* to, Encode map) {
  last_error.clear();
  try {
    const TensorMap encoded = map();
    memset(to, 0, 128);
    memcpy(to, &encoded, sizeof encoded);
    return 0;
  } catch (const Fault& error) {
    last_error = error.what();
    return 1;
  }
}

}  // namespace

TensorMap read_tensor_map(u64 address) {
  if (address % 64) fault("the tensor map at %#lx is not aligned to 64 bytes", address);
  TensorMap map;
  memcpy(&map, reinterpret_cast<const void*>(address), sizeof map);
  if (map.magic != kMagic) fault("the 128 bytes at %#lx are no tensor map that this emulator encoded", address);
  return map;
}

u32 element_bytes(const TensorMap& map) { return kTypeBytes[map.data_type]; }
u32 inner_bytes(const TensorMap& map) { return element_bytes(map) * (map.im2col ? map.channels : map.box[0]); }
u32 box_bytes(const TensorMap& map) {
  u32 bytes = inner_bytes(map);
  if (map.im2col) return bytes * map.pixels;
  for (int i = 1; i < map.rank; ++i) bytes *= map.box[i];
  return bytes;
}
u32 swizzle_span(int swizzle) { return swizzle ? 16u << swizzle : 0; }

}  // namespace emulator

using namespace emulator;

int ptx_encode_tiled(void* map, int data_type, uint32_t rank, const void* address, const uint64_t* dims,
                     const uint64_t* strides, const uint32_t* box, const uint32_t* element_strides, int interleave,
                     int swizzle, int l2_promotion, int oob_fill) {
  return encode(map, [&] {
    return encode_tiled(
        {map, data_type, rank, address, dims, strides, element_strides, interleave, swizzle, l2_promotion, oob_fill},
        box);
  });
}

int ptx_encode_im2col(void* map, int data_type, uint32_t rank, const void* address, const uint64_t* dims,
                      const uint64_t* strides, const int* lower_corner, const int* upper_corner, uint32_t channels,
                      uint32_t pixels, const uint32_t* element_strides, int interleave, int swizzle, int l2_promotion,
                      int oob_fill) {
  return encode(map, [&] {
    return encode_im2col(
        {map, data_type, rank, address, dims, strides, element_strides, interleave, swizzle, l2_promotion, oob_fill},
        lower_corner, upper_corner, channels, pixels);
  });
}

const char* ptx_encode_error(void) { return last_error.c_str(); }
