"""What NVIDIA's management library says about a GPU; nothing where there is none, or no `nvidia-ml-py`."""

import importlib
from functools import lru_cache
from typing import Any

import torch


@lru_cache
def _library() -> Any:
    try:
        library = importlib.import_module("pynvml")
        library.nvmlInit()
    except Exception:  # not installed, or no driver
        return None
    return library


@lru_cache
def _handle(device: torch.device) -> Any:
    """By the card's UUID: CUDA_VISIBLE_DEVICES counts otherwise than NVML."""
    library = _library() if device.type == "cuda" else None
    if library is None:
        return None
    try:
        return library.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}".encode())
    except Exception:  # a slice of a card, or a driver that knows none of this
        return None


def _ask(function: str, *arguments: Any) -> Any:
    try:
        return getattr(_library(), function)(*arguments)
    except Exception:  # this card does not say
        return None


def state(device: torch.device) -> dict[str, Any]:
    """Driver, clocks in MHz, temperature in degrees C and watts now; empty where nobody knows."""
    handle = _handle(device)
    if handle is None:
        return {}
    milliwatts = _ask("nvmlDeviceGetPowerUsage", handle)
    return {
        "driver": str(_ask("nvmlSystemGetDriverVersion")),
        "sm_mhz": _ask("nvmlDeviceGetClockInfo", handle, 1),  # NVML_CLOCK_SM
        "memory_mhz": _ask("nvmlDeviceGetClockInfo", handle, 2),  # NVML_CLOCK_MEM
        "celsius": _ask("nvmlDeviceGetTemperature", handle, 0),
        "watts": None if milliwatts is None else milliwatts / 1e3,
    }


def joules(device: torch.device) -> float | None:
    """The card's own counter of energy since its driver was loaded, or None."""
    handle = _handle(device)
    millijoules = None if handle is None else _ask("nvmlDeviceGetTotalEnergyConsumption", handle)
    return None if millijoules is None else millijoules / 1e3
