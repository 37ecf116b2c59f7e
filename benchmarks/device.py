"""Write what PyTorch and the driver say of the GPU, with a benchmark's conditions, into the file that is named."""

import sys
from pathlib import Path

import torch

from resnet_fused import bench


def properties(device: torch.device) -> dict[str, object]:
    found = torch.cuda.get_device_properties(device)
    names = (name for name in dir(found) if not name.startswith("_"))
    return {name: getattr(found, name) for name in names if isinstance(getattr(found, name), (int, float, str))}


if __name__ == "__main__":
    device = torch.device("cuda")
    bench.write_json(Path(sys.argv[1]), {"properties": properties(device), "conditions": bench.conditions(device)})
