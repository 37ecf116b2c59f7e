"""The training loop: a run that stops at any moment goes on from its last checkpoint with the same numbers."""

import contextlib
import math
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from .. import models
from ..dispatch import registry
from ..layers import Recompute
from . import checkpoint, recipes
from .batches import Batch, make_source
from .distributed import World, join
from .logs import Log
from .recipes import DTYPES, RECIPES, Schedule, Settings

ALONE = World()


class Evaluation(NamedTuple):
    loss: float
    error: float  # top-1, percent


def evaluate(model: nn.Module, batches: Iterable[Batch], world: World = ALONE) -> Evaluation:
    """Mean cross-entropy and top-1 error in eval mode, over the batches of all processes; the mode is put back."""
    training = model.training
    model.eval()
    total = torch.zeros(3, dtype=torch.float64, device=next(model.parameters()).device)
    with torch.inference_mode():
        for x, labels in batches:
            logits = model(x).float()
            loss = F.cross_entropy(logits, labels, reduction="sum")
            total += torch.stack((loss, (logits.argmax(1) != labels).sum(), loss.new_tensor(len(labels))))
    model.train(training)
    loss, wrong, count = world.sum(total).tolist()
    return Evaluation(loss / count, 100 * wrong / count)


def train(
    settings: Settings,
    out: Path,
    *,
    device: torch.device | str = "cpu",
    resume: bool = False,
    backend: str = "auto",
    compile: bool = False,
    recompute: Recompute = None,
    workers: int = 4,
) -> Evaluation:
    """Train a network, alone or as one of torchrun's processes, and evaluate it on the test split.

    `out` receives `checkpoint.pt`, `train.csv`, `eval.csv`, `curves.png` and, with TensorBoard installed, its events.

    Args:
        settings: what decides the numbers.
        out: the run's folder; made where it is missing.
        resume: go on from the folder's checkpoint where there is one.
        backend, compile, recompute, workers: how the numbers are computed and the samples read.

    Raises:
        ValueError: settings that don't fit each other, the data, or the run that is resumed.
        FileExistsError: the folder holds a run and `resume` is false.
        FileNotFoundError: the data are not there.
        FloatingPointError: the loss or a weight is not finite any more.
        OSError: the disk is full or not writable.
    """
    with join(torch.device(device)) as (world, own_device), registry.backend(backend):
        run = _Run(settings, out, world, own_device, workers, compile, recompute)
        return run(resume)


class _Run:
    def __init__(
        self,
        settings: Settings,
        out: Path,
        world: World,
        device: torch.device,
        workers: int,
        compile: bool,
        recompute: Recompute,
    ) -> None:
        self.settings, self.out, self.world, self.device = settings, out, world, device
        self.source = make_source(settings, world, device, workers)
        settings.complete(self.source.count)
        torch.backends.cudnn.benchmark = device.type == "cuda"
        torch.manual_seed(settings.seed)
        classes = len(self.source.classes)
        self.model_kwargs = {"num_classes": classes, **settings.model_kwargs}
        if self.model_kwargs["num_classes"] < classes:
            raise ValueError(f"num_classes is {self.model_kwargs['num_classes']}, and {settings.data} has {classes}")
        try:
            self.model = models.get_model(settings.model, **self.model_kwargs).train().to(device)
        except TypeError as error:
            raise ValueError(f"{settings.model} does not take model_kwargs={settings.model_kwargs}: {error}") from None
        self.model.set_recompute(recompute)
        if settings.sync_bn:
            self.model = nn.SyncBatchNorm.convert_sync_batchnorm(self.model)
        self.forward: Callable[[Tensor], Tensor] = world.wrap(self.model)
        if compile:
            self.forward = torch.compile(self.forward)
        self.optimizer = recipes.make_optimizer(settings, self.model)
        self.scaler = torch.amp.GradScaler(device.type, enabled=settings.dtype == "fp16")
        patience = recipes.PATIENCE if settings.plateau else None
        self.schedule = Schedule(self.optimizer, settings.milestones(), patience, self._warms_up())
        self.step, self.seconds, self.lr = 0, 0.0, settings.lr
        self.last: Evaluation | None = None
        self.evaluated = 0  # the iteration of the last evaluation
        self.window: list[Tensor] = []  # [2] each: loss and error of an iteration

    def __call__(self, resume: bool) -> Evaluation:
        settings = self.settings
        self._open(resume)
        if self.evaluated < settings.iterations:
            self._iterate_all()
        assert self.last is not None  # the last iteration evaluates
        return self.last

    def _iterate_all(self) -> None:
        settings = self.settings
        log = Log(self.out, self.step, self.evaluated) if self.world.rank == 0 else None
        bar = tqdm(
            total=settings.iterations,
            initial=self.step,
            desc=settings.model,
            unit="it",
            disable=None if self.world.rank == 0 else True,
        )
        with bar, contextlib.closing(log) if log else contextlib.nullcontext():
            if self._evaluates() and self.evaluated < self.step:  # it stopped there
                self._evaluate(log)
            started = time.perf_counter()
            for x, labels in self.source.train(self.step, settings.iterations):
                self._iterate(x, labels)
                bar.update()
                evaluates = self._evaluates()
                saves = evaluates or self.step % settings.save_every == 0
                if saves or self.step % settings.log_every == 0:
                    self._flush(log, bar, started)
                if saves:  # before an evaluation too: whatever stops that, the training is kept
                    self._save()
                if evaluates:
                    self._evaluate(log)
                if not self.window:
                    started = time.perf_counter()

    def _iterate(self, x: Tensor, labels: Tensor) -> None:
        with self._autocast():
            logits = self.forward(x)
            loss = F.cross_entropy(logits, labels)
        self.scaler.scale(loss).backward()
        self.world.average(self.model)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.step += 1
        self.lr = self.schedule.lr
        self.schedule.iterated(self.step)
        wrong = (logits.argmax(1) != labels).float().mean()
        self.window.append(torch.stack((loss.detach().float(), 100 * wrong)))

    def _flush(self, log: Log | None, bar: tqdm, started: float) -> None:
        """Look at the iterations since the last look: the only place that waits for the device."""
        rows = (self.world.sum(torch.stack(self.window)) / self.world.size).tolist()
        seconds = time.perf_counter() - started
        self.seconds += seconds
        for step, (loss, _) in enumerate(rows, self.step - len(rows) + 1):
            if not math.isfinite(loss):
                raise FloatingPointError(f"the loss is {loss} at iteration {step}; {self._last_good()}")
        loss, error = (sum(column) / len(rows) for column in zip(*rows, strict=True))
        self.schedule.trained(error)
        speed = len(rows) * self.settings.batch / seconds
        bar.set_postfix_str(f"loss {loss:.3f}, error {error:.1f} %, {speed:.0f} img/s")
        if log is not None:
            epoch = self.step * self.settings.batch / self.source.count
            log.train(
                step=self.step, epoch=round(epoch, 3), lr=self.lr, loss=loss, error=error, images_per_s=round(speed, 1)
            )
        self.window.clear()

    def _evaluates(self) -> bool:
        """Whether this iteration ends in an evaluation."""
        last = self.step == self.settings.iterations
        return last or self.step > 0 and self.step % self.settings.eval_every == 0

    def _evaluate(self, log: Log | None) -> None:
        split = "test" if self.step == self.settings.iterations or not self.settings.holdout else "val"
        self.world.share_statistics(self.model)
        with self._autocast():
            self.last = last = evaluate(self.model, self.source.evaluation(split), self.world)
        self.schedule.evaluated(last.error)
        self.evaluated = self.step
        if log is not None:
            log.eval(step=self.step, split=split, loss=last.loss, error=last.error)
            line = f"iteration {self.step}: {split} error {last.error:.2f} %, loss {last.loss:.3f}"
            tqdm.write(f"{line}, after {self.seconds:.0f} s of training", file=sys.stderr)
        self._save()

    def _autocast(self) -> contextlib.AbstractContextManager:
        dtype = DTYPES[self.settings.dtype]
        return torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32)

    def _warms_up(self) -> bool:
        if self.settings.warm_up is not None:
            return self.settings.warm_up
        depth = sum(isinstance(m, nn.Conv2d) for m in self.model.modules())
        return depth >= (RECIPES[self.settings.recipe].warm_up_depth or math.inf)

    def _open(self, resume: bool) -> None:
        """Make the folder, or restore what it holds."""
        path = self.out / checkpoint.NAME
        if not path.exists():
            self.out.mkdir(parents=True, exist_ok=True)
            return
        if not resume:
            raise FileExistsError(f"{self.out} holds a run already; --resume continues it, --out names another folder")
        content = checkpoint.read(path)
        config = asdict(self.settings)
        for key, value in content["config"].items():
            if config[key] != value:
                raise ValueError(f"{key} is {config[key]!r}, and {value!r} in {path}: a resumed run keeps its settings")
        self.model.load_state_dict(content["state_dict"])
        self.optimizer.load_state_dict(content["optimizer"])
        self.schedule.load_state_dict(content["schedule"])
        self.scaler.load_state_dict(content["scaler"])
        self.step, self.seconds = content["step"], content["seconds"]
        self.evaluated = content.get("evaluated", self.step)
        self.last = content["evaluation"] and Evaluation(*content["evaluation"])
        torch.set_rng_state(content["rng"]["cpu"])
        if self.device.type == "cuda" and content["rng"]["cuda"] is not None:
            torch.cuda.set_rng_state(content["rng"]["cuda"], self.device)

    def _state(self) -> dict[str, Any]:
        on_gpu = self.device.type == "cuda"
        return {
            "model": self.settings.model,
            "model_kwargs": self.model_kwargs,
            "state_dict": self.model.state_dict(),
            "mean": self.source.mean,
            "std": self.source.std,
            "classes": list(self.source.classes),
            "config": asdict(self.settings),
            "step": self.step,
            "seconds": self.seconds,
            "evaluation": self.last and tuple(self.last),
            "evaluated": self.evaluated,
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict(),
            "rng": {
                "cpu": torch.get_rng_state(),
                "cuda": torch.cuda.get_rng_state(self.device) if on_gpu else None,
            },
        }

    def _save(self) -> None:
        if self.world.rank > 0:
            return
        try:
            checkpoint.save(self.out, self._state())
        except FloatingPointError as error:
            raise FloatingPointError(f"{error}; {self._last_good()}") from None

    def _last_good(self) -> str:
        path = self.out / checkpoint.NAME
        return (
            f"the last good checkpoint is {path} (iteration {checkpoint.read(path)['step']})"
            if path.exists()
            else "there is no checkpoint yet"
        )
