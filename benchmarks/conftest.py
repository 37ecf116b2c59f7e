"""Lets `pytest benchmarks --benchmark-only` find ops.py and models.py; puts the conditions into its result files."""

from pathlib import Path
from typing import Any

import pytest
import torch

from resnet_fused import bench


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--dtype", action="append", choices=bench.DTYPES, help="time in this dtype only")


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    if file_path.name in ("ops.py", "models.py") and not parent.session.isinitpath(
        file_path
    ):  # a file that was named is collected anyway
        return pytest.Module.from_parent(parent, path=file_path)
    return None


def pytest_terminal_summary(terminalreporter: Any) -> None:
    ops = [value for r in terminalreporter.getreports("passed") for name, value in r.user_properties if name == "op"]
    if ops:
        terminalreporter.write_line(
            f"\n{'case':40}{'dtype':10}{'backend':9}{'us':>10}{'GB/s':>9}{'TFLOP/s':>9}{'to eager':>10}"
        )
    for op in ops:
        figures = f"{op['microseconds']:10.1f}{op['gb_per_s']:9.1f}{op['tflop_per_s']:9.2f}{op['ratio_to_eager']:10.2f}"
        terminalreporter.write_line(f"{op['case']:40}{op['dtype']:10}{op['backend']:9}{figures}")


def _conditions() -> dict[str, Any]:
    return bench.conditions(torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """What two runs that are compared have to have in common."""
    machine_info.clear()
    machine_info.update({k: _conditions()[k] for k in ("device", "cpu", "cpus", "threads", "torch", "triton", "cuda")})


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: Any, output_json: dict[str, Any]) -> None:
    output_json["conditions"] = _conditions()
