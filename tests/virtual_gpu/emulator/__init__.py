"""The PTX emulator through ctypes: modules of PTX text whose kernels run on host memory. ptx.h describes it."""

import ctypes
import functools
from collections.abc import Sequence
from pathlib import Path

from ..build import build

Dim3 = tuple[int, int, int]
COUNTERS = ("warp", "thread", "loaded", "stored", "mma", "bulk", "ctas", "barriers")


class EmulatorError(RuntimeError):
    """What a kernel did wrong, or why it can't be run."""


class KernelInfo(ctypes.Structure):
    """`ptx_kernel_info`."""

    _fields_ = [
        (name, ctypes.c_uint32) for name in ("max_threads", "static_smem", "param_bytes", "target", "arch_specific")
    ]


def library() -> Path:
    """libptxemulator.so, built where it isn't yet."""
    return build() / "libptxemulator.so"


@functools.cache
def _lib() -> ctypes.CDLL:
    lib = ctypes.CDLL(str(library()))
    text, pointer, u32, i32 = ctypes.c_char_p, ctypes.c_void_p, ctypes.c_uint32, ctypes.c_int
    encode = [pointer, i32, u32, pointer, pointer, pointer]
    signatures = {
        "ptx_load": (pointer, [text]),
        "ptx_error": (text, [pointer]),
        "ptx_free": (None, [pointer]),
        "ptx_launch": (i32, [pointer, text, i32, pointer, pointer, u32, text, ctypes.c_size_t, ctypes.c_uint64]),
        "ptx_allow": (None, [pointer, ctypes.c_size_t, i32, i32]),
        "ptx_forbid": (None, [pointer]),
        "ptx_counters": (None, [pointer]),
        "ptx_option": (i32, [text, ctypes.c_int64]),
        "ptx_kernels": (ctypes.c_size_t, [pointer, text, ctypes.c_size_t]),
        "ptx_unsupported": (text, [pointer, text]),
        "ptx_global": (ctypes.c_int64, [pointer, text, pointer]),
        "ptx_param_layout": (i32, [pointer, text, pointer, pointer, u32]),
        "ptx_info": (i32, [pointer, text, pointer]),
        "ptx_encode_tiled": (i32, [*encode, pointer, pointer, i32, i32, i32, i32]),
        "ptx_encode_im2col": (i32, [*encode, pointer, pointer, u32, u32, pointer, i32, i32, i32, i32]),
        "ptx_encode_error": (text, []),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    return lib


def option(name: str, value: int) -> None:
    """Sets an option of emulator.h for all later launches.

    Raises:
        ValueError: there is no such option.
    """
    if _lib().ptx_option(name.encode(), value):
        raise ValueError(f"the emulator has no option {name!r}")


def allow(address: int, size: int, writable: bool = True, device: int = -1) -> None:
    """Registers an allocation; kernels may touch nothing else. device -1: of every device."""
    _lib().ptx_allow(address, size, writable, device)


def forbid(address: int) -> None:
    """Removes the allocations that begin there."""
    _lib().ptx_forbid(address)


def counters() -> dict[str, int]:
    """What ran since the start, by COUNTERS."""
    out = (ctypes.c_uint64 * len(COUNTERS))()
    _lib().ptx_counters(out)
    return dict(zip(COUNTERS, out, strict=True))


class TensorMap:
    """128 bytes, aligned to 64."""

    def __init__(self):
        self._storage = ctypes.create_string_buffer(192)
        self.address = -(-ctypes.addressof(self._storage) // 64) * 64

    def __bytes__(self) -> bytes:
        return ctypes.string_at(self.address, 128)


def _array(kind: type, values: Sequence[int]) -> ctypes.Array:
    return (kind * max(1, len(values)))(*values)


def encode_tiled(
    data_type: int, address: int, dims: Sequence[int], strides: Sequence[int], box: Sequence[int],
    element_strides: Sequence[int], interleave: int = 0, swizzle: int = 0, l2_promotion: int = 0, oob_fill: int = 0,
    misaligned: int = 0,
) -> TensorMap:  # fmt: skip
    """cuTensorMapEncodeTiled: dimensions innermost first, strides in bytes.

    Raises:
        EmulatorError: an argument is refused.
    """
    tensor_map = TensorMap()
    sizes = _array(ctypes.c_uint64, dims), _array(ctypes.c_uint64, strides), _array(ctypes.c_uint32, box)
    steps = _array(ctypes.c_uint32, element_strides)
    modes = interleave, swizzle, l2_promotion, oob_fill
    to = tensor_map.address + misaligned
    if _lib().ptx_encode_tiled(to, data_type, len(dims), address, *sizes, steps, *modes):
        raise EmulatorError(_lib().ptx_encode_error().decode())
    return tensor_map


def encode_im2col(
    data_type: int, address: int, dims: Sequence[int], strides: Sequence[int], lower: Sequence[int],
    upper: Sequence[int], channels: int, pixels: int, element_strides: Sequence[int], interleave: int = 0,
    swizzle: int = 0, l2_promotion: int = 0, oob_fill: int = 0,
) -> TensorMap:  # fmt: skip
    """cuTensorMapEncodeIm2col, likewise."""
    tensor_map = TensorMap()
    sizes = _array(ctypes.c_uint64, dims), _array(ctypes.c_uint64, strides)
    corners = _array(ctypes.c_int, lower), _array(ctypes.c_int, upper)
    steps, modes = _array(ctypes.c_uint32, element_strides), (interleave, swizzle, l2_promotion, oob_fill)
    arguments = *sizes, *corners, channels, pixels, steps, *modes
    if _lib().ptx_encode_im2col(tensor_map.address, data_type, len(dims), address, *arguments):
        raise EmulatorError(_lib().ptx_encode_error().decode())
    return tensor_map


class Module:
    """A PTX file.

    Raises:
        EmulatorError: it can't be parsed.
    """

    def __init__(self, text: str):
        self._module = _lib().ptx_load(text.encode())
        if error := _lib().ptx_error(self._module):
            raise EmulatorError(error.decode())

    def __del__(self):
        if module := getattr(self, "_module", None):
            _lib().ptx_free(module)

    def kernels(self) -> list[str]:
        size = _lib().ptx_kernels(self._module, None, 0)
        names = ctypes.create_string_buffer(size + 1)
        _lib().ptx_kernels(self._module, names, size + 1)
        return names.value.decode().split()

    def unsupported(self, kernel: str) -> list[str]:
        """The instructions of a kernel that the emulator doesn't know."""
        return _lib().ptx_unsupported(self._module, kernel.encode()).decode().splitlines()

    def info(self, kernel: str) -> KernelInfo:
        info = KernelInfo()
        if _lib().ptx_info(self._module, kernel.encode(), ctypes.byref(info)):
            raise EmulatorError(f"no kernel {kernel}")
        return info

    def variable(self, name: str) -> tuple[int, int]:
        """The address and size of a global variable."""
        size = ctypes.c_size_t()
        address = _lib().ptx_global(self._module, name.encode(), ctypes.byref(size))
        if not address:
            raise EmulatorError(f"no variable {name}")
        return address, size.value

    def layout(self, kernel: str) -> list[tuple[int, int]]:
        """The offset and size of every parameter."""
        offsets, sizes = (ctypes.c_uint32 * 1024)(), (ctypes.c_uint32 * 1024)()
        count = _lib().ptx_param_layout(self._module, kernel.encode(), offsets, sizes, 1024)
        if count < 0:
            raise EmulatorError(f"no kernel {kernel}")
        return list(zip(offsets[:count], sizes[:count], strict=True))

    def launch(
        self, kernel: str, grid: Dim3, block: Dim3, params: Sequence[bytes], smem: int = 0, seed: int = 0,
        device: int = 0,
    ) -> None:  # fmt: skip
        """Runs a kernel with `smem` bytes of dynamic shared memory; params holds the bytes of each parameter.

        Raises:
            EmulatorError: the launch is refused, or the kernel does something wrong.
        """
        layout = self.layout(kernel)
        if [size for _, size in layout] != [len(p) for p in params]:
            given, taken = [len(p) for p in params], [size for _, size in layout]
            raise EmulatorError(f"{kernel} takes parameters of {taken} bytes, got {given}")
        block_of_params = bytearray(max((offset + size for offset, size in layout), default=0))
        for (offset, size), value in zip(layout, params, strict=True):
            block_of_params[offset : offset + size] = value
        grid, block = _array(ctypes.c_uint32, grid), _array(ctypes.c_uint32, block)
        values = bytes(block_of_params), len(block_of_params)
        if _lib().ptx_launch(self._module, kernel.encode(), device, grid, block, smem, *values, seed):
            raise EmulatorError(_lib().ptx_error(self._module).decode())
