"""PyTorch's own operators: always right, always there."""

IMPORT_ERROR = None


def unavailable(device_type: str, index: int | None = None) -> None:
    return None


def lacks(op: str) -> str:
    return f"eager has no {op}"
