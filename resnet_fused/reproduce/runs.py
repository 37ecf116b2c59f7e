"""The runs behind the figures: trained where they are not there yet, and looked at once."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torchvision.transforms import v2

from ..analysis import responses
from ..bench.report import write_json
from ..evaluation import SINGLE, TEN_CROPS, Network, Samples, Views, batches, evaluate, multi_scale
from ..train import RECIPES, Settings, logs
from ..train.loop import train
from ..train.recipes import DTYPES
from . import experiments
from .experiments import Experiment


@dataclass(frozen=True)
class Options:
    """What the command line says about all runs; None: the recipe's."""

    out: Path
    device: torch.device
    data: str | None = None
    fraction: float = 1.0
    batch: int | None = None
    lr: float | None = None
    dtype: str = "fp32"
    seed: int = 0
    backend: str = "auto"
    workers: int = 4
    images: int | None = None  # that trained networks are looked at on


@dataclass
class Run:
    """A trained network of an experiment."""

    network: experiments.Network
    folder: Path
    parameters: int
    train: list[dict[str, str]]  # rows of train.csv
    eval: list[dict[str, str]]  # rows of eval.csv

    @property
    def training_error(self) -> float:
        """Mean of the last tenth of the rows, in percent."""
        last = self.train[-max(1, len(self.train) // 10) :]
        return sum(float(row["error"]) for row in last) / len(last)

    @property
    def test_error(self) -> float:
        """After the last iteration, in percent."""
        return float(self.eval[-1]["error"])


def settings(experiment: Experiment, network: experiments.Network, options: Options) -> Settings:
    """Of the network's training: the recipe, shortened.

    Raises:
        ValueError: the recipe needs data and none are named, or an option that is not accepted.
    """
    if experiment.recipe == "imagenet" and options.data is None:
        raise ValueError(f"{experiment.title}: needs --data imagefolder:FOLDER, with train/CLASS/* and val/CLASS/*")
    iterations = max(1, round(options.fraction * RECIPES[experiment.recipe].iterations))
    given: dict[str, Any] = {key: getattr(options, key) for key in ("data", "batch", "lr", "dtype", "seed")}
    of_network: dict[str, Any] = {"model": network.model, "model_kwargs": network.kwargs}
    log_every = min(50, max(1, iterations // 50))
    return Settings(experiment.recipe, iterations=iterations, log_every=log_every, **of_network, **given)


def folder(network: experiments.Network, asked: Settings, options: Options) -> Path:
    """Of a run; experiments share the networks that they have in common."""
    kwargs = "".join(f"-{key}={value}" for key, value in network.kwargs.items())
    return options.out / "runs" / f"{network.model}{kwargs}-{asked.iterations}-{asked.dtype}-seed{asked.seed}"


def run(experiment: Experiment, network: experiments.Network, options: Options) -> Run:
    """The network trained: anew, from where it stopped, or as it is where it is finished.

    Raises:
        ValueError, OSError, FloatingPointError: of `train.loop.train`.
    """
    asked = settings(experiment, network, options)
    path = folder(network, asked, options)
    how: dict[str, Any] = {"backend": options.backend, "workers": options.workers}
    train(asked, path, device=options.device, resume=True, **how)
    parameters = sum(p.numel() for p in Network.from_checkpoint(path).model.parameters())
    return Run(network, path, parameters, logs.read(path / "train.csv"), logs.read(path / "eval.csv"))


def errors(experiment: Experiment, found: Sequence[Run], options: Options) -> dict[str, Any]:
    """Errors of one trained network, or of several as an ensemble, on the views that the experiment is about.

    Returns:
        "images", "top1_error" and "top5_error" in percent.
    """
    views = {
        "ten crops": lambda: TEN_CROPS,
        "scales": multi_scale,
        "ensemble": multi_scale,
        "crop 320": lambda: CROP_320,
    }[experiment.look]()

    def look() -> dict[str, Any]:
        samples = Samples(str(options.data), views, limit=options.images)
        networks = [Network.from_checkpoint(run.folder) for run in found]
        dtype = DTYPES[options.dtype]
        how: dict[str, Any] = {"device": options.device, "workers": options.workers}
        result = evaluate(networks, samples, batch=16, dtype=dtype, **how)
        return {"images": result.images, "top1_error": result.top1_error, "top5_error": result.top5_error}

    return _once(found[-1].folder, f"{experiment.look}-{len(found)}", options, look)


def layer_responses(run: Run, options: Options) -> list[tuple[str, float]]:
    """Of a trained network: every layer and the standard deviation of its responses on the test images."""

    def look() -> list[tuple[str, float]]:
        network = Network.from_checkpoint(run.folder)
        samples = Samples(str(network.data), SINGLE, limit=options.images)
        found = batches(network, samples, 64, options.device, options.workers)
        return responses(network.model.to(options.device), found)

    return [(layer, std) for layer, std in _once(run.folder, "responses", options, look)]


def _once(folder: Path, name: str, options: Options, look: Callable[[], Any]) -> Any:
    """What was found when a finished run was first looked at so."""
    path = folder / f"{name.replace(' ', '-')}-{options.images or 'all'}.json"
    if not path.is_file():
        write_json(path, look())
    return json.loads(path.read_text())


def _crop_320(image: Any) -> list[torch.Tensor]:
    crop = v2.functional.center_crop(v2.functional.resize(image, [320]), [320])
    return [v2.functional.to_image(crop)[None]]


CROP_320 = Views("center crop of 320, short side 320", _crop_320)
