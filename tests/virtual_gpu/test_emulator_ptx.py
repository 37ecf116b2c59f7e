"""The PTX emulator on PTX written here, and on tensor maps: what needs no compiler of CUDA."""

import ctypes
import shutil
import struct

import numpy as np
import pytest

from virtual_gpu import emulator

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is needed to build the emulator")

# d = op(a, b) of 32-bit words, in one lane for each
ELEMENTWISE = """
.version 7.0
.target sm_80
.address_size 64
.visible .entry elementwise(.param .u64 pa, .param .u64 pb, .param .u64 pd)
{
  .reg .b32 %a, %b, %d, %i;
  .reg .b16 %h<4>;
  .reg .pred %p;
  .reg .b64 %at<4>;
  mov.u32 %i, %tid.x;
  ld.param.u64 %at1, [pa];
  ld.param.u64 %at2, [pb];
  ld.param.u64 %at3, [pd];
  mad.wide.u32 %at1, %i, 4, %at1;
  mad.wide.u32 %at2, %i, 4, %at2;
  mad.wide.u32 %at3, %i, 4, %at3;
  ld.global.b32 %a, [%at1];
  ld.global.b32 %b, [%at2];
  BODY
  st.global.b32 [%at3], %d;
  ret;
}
"""
NAN, NAN_16, INFINITY = 0x7FFFFFFF, 0x7FFF, 0x7F800000
BFLOATS = [NAN_16, 0x3F80, 0x3F82]  # of NaN and two ties
QUIET = 0x7FC00000  # a NaN as numpy makes it


def bits(x: float) -> int:
    return struct.unpack("<I", struct.pack("<f", x))[0]


def evaluate(body: str, a: list[int], b: list[int]) -> list[int]:
    """`body` on pairs of words."""
    module = emulator.Module(ELEMENTWISE.replace("BODY", body))
    arrays = [np.array(a, np.uint32), np.array(b, np.uint32), np.zeros(len(a), np.uint32)]
    for x in arrays:
        emulator.allow(x.ctypes.data, x.nbytes)
    try:
        pointers = [struct.pack("<Q", x.ctypes.data) for x in arrays]
        module.launch("elementwise", (1, 1, 1), (len(a), 1, 1), pointers)
    finally:
        for x in arrays:
            emulator.forbid(x.ctypes.data)
    return arrays[2].tolist()


ONE, TWO, TINY, MINUS_ZERO = bits(1.0), bits(2.0), 0x00000001, 0x80000000


@pytest.mark.parametrize("body, a, b, expected", [
    ("min.f32 %d, %a, %b;", [QUIET, ONE, QUIET, MINUS_ZERO], [ONE, QUIET, QUIET, 0], [ONE, ONE, NAN, MINUS_ZERO]),
    ("max.f32 %d, %a, %b;", [QUIET, ONE, QUIET, MINUS_ZERO], [ONE, QUIET, QUIET, 0], [ONE, ONE, NAN, 0]),
    ("min.NaN.f32 %d, %a, %b;", [QUIET, ONE, TWO], [ONE, QUIET, ONE], [NAN, NAN, ONE]),
    ("max.NaN.f32 %d, %a, %b;", [QUIET, ONE, TWO], [ONE, QUIET, ONE], [NAN, NAN, TWO]),
    ("min.NaN.bf16x2 %d, %a, %b;", [0x3F807FC0], [0x40003F80], [0x3F807FFF]),
    ("max.bf16x2 %d, %a, %b;", [0x3F807FC0], [0x40003F80], [0x40003F80]),
    ("add.sat.f32 %d, %a, %b;", [QUIET, ONE, bits(-3.0)], [ONE, ONE, ONE], [0, ONE, 0]),
    ("add.f32 %d, %a, %b;", [TINY], [0], [TINY]),
    ("add.ftz.f32 %d, %a, %b;", [TINY, bits(1e-38)], [0, bits(-0.9e-38)], [0, 0]),
    ("mul.ftz.f32 %d, %a, %b;", [TINY], [bits(1e30)], [0]),
    ("setp.lt.ftz.f32 %p, %a, %b; selp.b32 %d, 1, 0, %p;", [0, ONE], [TINY, TWO], [0, 1]),
    ("setp.lt.f32 %p, %a, %b; selp.b32 %d, 1, 0, %p;", [0, QUIET], [TINY, TWO], [1, 0]),
    ("setp.ne.f32 %p, %a, %b; selp.b32 %d, 1, 0, %p;", [QUIET, ONE], [QUIET, TWO], [0, 1]),
    ("setp.neu.f32 %p, %a, %b; selp.b32 %d, 1, 0, %p;", [QUIET, ONE], [QUIET, ONE], [1, 0]),
    ("cvt.rzi.s32.f32 %d, %a;", [QUIET, INFINITY, bits(-1e20)], [0] * 3, [0, 0x7FFFFFFF, 0x80000000]),
    ("cvt.rni.u32.f32 %d, %a;", [bits(-1.0), bits(2.5), bits(5e9)], [0] * 3, [0, 2, 0xFFFFFFFF]),
    ("cvt.rn.f16.f32 %h1, %a; cvt.u32.u16 %d, %h1;", [QUIET, bits(65520.0), TINY], [0] * 3, [NAN_16, 0x7C00, 0]),
    ("cvt.rn.bf16.f32 %h1, %a; cvt.u32.u16 %d, %h1;", [QUIET, 0x3F808000, 0x3F818000], [0] * 3, BFLOATS),
    ("cvt.rn.relu.bf16x2.f32 %d, %a, %b;", [QUIET, bits(-1.0)], [bits(-2.0), ONE], [0x7FFF0000, 0x00003F80]),
    ("cvt.rna.tf32.f32 %d, %a;", [0x3F801000, 0x3F800FFF, INFINITY, QUIET], [0] * 4, [0x3F802000, ONE, INFINITY, NAN]),
    ("div.s32 %d, %a, %b;", [0x80000000, 7], [0xFFFFFFFF, 0xFFFFFFFE], [0x80000000, 0xFFFFFFFD]),
    ("bfe.s32 %d, %a, 4, 4;", [0x80, 0x70], [0, 0], [0xFFFFFFF8, 7]),
    ("prmt.b32 %d, %a, %b, 0x7250;", [0x33221100], [0x77665544], [0x77225500]),
    ("shf.l.wrap.b32 %d, %a, %b, 8;", [0x11223344], [0xAABBCCDD], [0xBBCCDD11]),
    ("lop3.b32 %d, %a, %b, 0xFF, 0x96;", [0xF0F0], [0xFF00], [0xF0F0 ^ 0xFF00 ^ 0xFF]),
])  # fmt: skip
def test_arithmetic(body, a, b, expected):
    assert [hex(x) for x in evaluate(body, a, b)] == [hex(x) for x in expected]


@pytest.mark.parametrize("instruction", [
    "add.rz.f32 %d, %a, %b;", "tex.1d.v4.s32.s32 {%d, %d, %d, %d}, [%a, {%b}];", "frobnicate.b32 %d, %a;",
    "min.relu.s32 %d, %a, %b;", "fma.rn.relu.f16x2 %d, %a, %b, %b;", "call (%d), f, (%a);", "add.u64 %d, %a, %b;",
])  # fmt: skip
def test_unknown_instruction_is_refused_with_its_text(instruction):
    text = ELEMENTWISE.replace("BODY", instruction)
    line = next(i for i, s in enumerate(text.splitlines(), 1) if instruction in s)
    module = emulator.Module(text)
    (unsupported,) = module.unsupported("elementwise")
    assert unsupported.startswith(f"line {line}: ") and unsupported.endswith(instruction[:-1])
    with pytest.raises(emulator.EmulatorError, match=f"does not know: line {line}: "):
        module.launch("elementwise", (1, 1, 1), (32, 1, 1), [bytes(8)] * 3)


@pytest.mark.parametrize("text, message", [
    (".version 7.0\n.entry k() { bra nowhere; }", "no label nowhere"),
    (".version 7.0\n.entry k() { ret;", "unexpected end"),
    ("garbage", "line 1: cannot read"),
])  # fmt: skip
def test_text_that_is_no_ptx(text, message):
    with pytest.raises(emulator.EmulatorError, match=message):
        emulator.Module(text)


def test_global_variable():
    module = emulator.Module(".version 7.0\n.target sm_80\n.global .align 4 .u32 table[3] = {1, 2, 3};\n")
    address, size = module.variable("table")
    assert struct.unpack("<3I", ctypes.string_at(address, size)) == (1, 2, 3)


ADDRESS = 1 << 20
TILED = dict(data_type=6, address=ADDRESS, dims=[64, 32], strides=[128], box=[32, 8], element_strides=[1, 1], swizzle=2)
IM2COL = dict(
    data_type=6, address=ADDRESS, dims=[64, 14, 14, 2], strides=[128, 1792, 25088], lower=[-1, -1], upper=[-1, -1],
    channels=64, pixels=128, element_strides=[1, 2, 2, 1], swizzle=3,
)  # fmt: skip
COMMON_REFUSALS = [
    (dict(data_type=16), "tensorDataType 16 is none"),
    (dict(data_type=13), "tensorDataType 13, packed, is not supported by the emulator"),
    (dict(address=ADDRESS + 8), "globalAddress 0x100008 is not a multiple of 16"),
    (dict(interleave=3), "interleave 3 is none"),
    (dict(interleave=1), "interleave 1 is not supported by the emulator"),
    (dict(swizzle=7), "swizzle 7 is none"),
    (dict(swizzle=4), "swizzle 4 is not supported by the emulator"),
    (dict(l2_promotion=4), "l2Promotion 4 is none"),
    (dict(oob_fill=2), "oobFill 2 is none"),
    (dict(oob_fill=1, data_type=1), "oobFill NaN needs a floating-point type"),
    (dict(oob_fill=1), "oobFill NaN is not supported by the emulator"),
]
TILED_REFUSALS = [
    *COMMON_REFUSALS,
    (dict(misaligned=32), "tensorMap is not aligned to 64 bytes"),
    (dict(dims=[], strides=[]), "tensorRank 0 is not in 1..5"),
    (dict(dims=[64] * 6), "tensorRank 6 is not in 1..5"),
    (dict(dims=[64, 0]), r"globalDim\[1\] = 0"),
    (dict(dims=[64, 2**32 + 1]), r"globalDim\[1\] = 4294967297"),
    (dict(strides=[120]), r"globalStrides\[0\] = 120"),
    (dict(strides=[2**40]), r"globalStrides\[0\] = 1099511627776"),
    (dict(element_strides=[1, 0]), r"elementStrides\[1\] = 0"),
    (dict(element_strides=[1, 9]), r"elementStrides\[1\] = 9"),
    (dict(element_strides=[1, 2]), r"elementStrides\[1\] = 2 in tile mode is not supported by the emulator"),
    (dict(box=[32, 0]), r"boxDim\[1\] = 0"),
    (dict(box=[32, 257]), r"boxDim\[1\] = 257"),
    (dict(box=[12, 8]), r"boxDim\[0\] takes 24 bytes, not a multiple of 16"),
    (dict(box=[64, 8]), r"boxDim\[0\] takes 128 bytes, more than the swizzle of 64"),
]
FIVE = dict(dims=[64, 9, 9, 9, 2], strides=[128, 1152, 10368, 93312], element_strides=[1] * 5)
THREE = dict(dims=[64, 99999, 2], strides=[128, 128 * 99999], element_strides=[1] * 3)
IM2COL_REFUSALS = [
    *COMMON_REFUSALS,
    (dict(dims=[64, 14], strides=[128]), "tensorRank 2 is not in 3..5"),
    (dict(lower=[-129, 0]), r"pixelBoxLowerCorner\[0\] = -129 is not in -128..127"),
    (dict(upper=[0, 128]), r"pixelBoxUpperCorner\[1\] = 128 is not in -128..127"),
    (dict(lower=[0, 0, -17], upper=[0] * 3, **FIVE), r"pixelBoxLowerCorner\[2\] = -17 is not in -16..15"),
    (dict(lower=[0] * 3, upper=[0, 16, 0], **FIVE), r"pixelBoxUpperCorner\[1\] = 16 is not in -16..15"),
    (dict(lower=[-32769], upper=[0], **THREE), r"pixelBoxLowerCorner\[0\] = -32769 is not in -32768..32767"),
    (dict(upper=[-15, -1]), "the bounding box along dimension 1 is empty"),
    (dict(channels=0), "channelsPerPixel = 0"),
    (dict(channels=257), "channelsPerPixel = 257"),
    (dict(channels=12), "channelsPerPixel takes 24 bytes, not a multiple of 16"),
    (dict(channels=128), "channelsPerPixel takes 256 bytes, more than the swizzle of 128"),
    (dict(pixels=0), "pixelsPerColumn = 0"),
    (dict(pixels=1025), "pixelsPerColumn = 1025"),
]


@pytest.mark.parametrize("change, message", TILED_REFUSALS)
def test_tiled_map_is_refused(change, message):
    with pytest.raises(emulator.EmulatorError, match=message):
        emulator.encode_tiled(**TILED | change)


@pytest.mark.parametrize("change, message", IM2COL_REFUSALS)
def test_im2col_map_is_refused(change, message):
    with pytest.raises(emulator.EmulatorError, match=message):
        emulator.encode_im2col(**IM2COL | change)


@pytest.mark.parametrize("change", [
    {}, dict(lower=[-16] * 3, upper=[15] * 3, **FIVE), dict(lower=[-32768], upper=[32767], **THREE),
    dict(element_strides=[8, 2, 2, 1]), dict(channels=32, pixels=1024),
])  # fmt: skip
def test_im2col_map_at_its_limits(change):
    assert any(bytes(emulator.encode_im2col(**IM2COL | change)))


@pytest.mark.parametrize("change", [
    {}, dict(dims=[64], strides=[], box=[256], element_strides=[8], swizzle=0), dict(dims=[64, 2**32]),
])  # fmt: skip
def test_tiled_map_at_its_limits(change):
    assert any(bytes(emulator.encode_tiled(**TILED | change)))
