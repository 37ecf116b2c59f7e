"""The training loop: a run that stops at any moment goes on from its last checkpoint with the same numbers."""

import contextlib
import math
import shlex
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from ..dispatch import registry
from ..layers import Recompute
from . import augment, checkpoint, initial
from .average import Average
from .batches import make_source, seed_of
from .distributed import World, join
from .evaluate import Evaluation, evaluate
from .interrupt import Interrupted, Signals, signals
from .logs import Log
from .recipes import DTYPES, RECIPES, Settings
from .schedule import Schedule, make_optimizer


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
        resume: go on from the folder's checkpoint where there is one; `settings.iterations` may have grown.
        backend, compile, recompute, workers: how the numbers are computed and the samples read.

    Raises:
        ValueError: settings that don't fit each other, the data, or the run that is resumed.
        FileExistsError: the folder holds a run and `resume` is false.
        FileNotFoundError, FetchError: the data or the weights to start from are not there.
        FloatingPointError: the loss or a weight is not finite any more.
        OSError: the disk is full or not writable.
        Interrupted: SIGINT or SIGTERM came; what was done is saved.
    """
    with join(torch.device(device)) as (world, own_device), registry.backend(backend):
        return _Run(settings, out, world, own_device, workers, compile, recompute, resume)()


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
        resume: bool = False,
    ) -> None:
        self.settings, self.out, self.world, self.device = settings, out, world, device
        before = self._before(resume)
        start = None
        if before is None:
            start = initial.read(settings, progress=world.rank == 0)
        else:
            settings.resume(before["config"], before["step"])
        kept = (before["mean"], before["std"]) if before else start and start.normalization
        self.source = make_source(settings, world, device, workers, kept)
        settings.complete(self.source.count)
        torch.backends.cudnn.benchmark = device.type == "cuda"
        torch.manual_seed(settings.seed)
        classes = list(self.source.classes)
        self.model_kwargs = before["model_kwargs"] if before else initial.model_kwargs(settings, start, len(classes))
        self.model, line = initial.make_model(settings, self.model_kwargs, start, classes)
        if line and world.rank == 0:
            print(line, file=sys.stderr)
        self.model.set_recompute(recompute)
        self.model.to(device)
        if self.model.channels_last:
            self.model.to(memory_format=torch.channels_last)  # as the images lie
        self.forward: Callable[[Tensor], Tensor] = world.wrap(self.model)
        if compile:
            self.forward = torch.compile(self.forward)
        self.average = Average(self.model, settings.ema) if settings.ema else None
        self.mix = augment.Mix(settings.mixup, settings.cutmix, self.model.fc.out_features)
        self.optimizer = make_optimizer(settings, self.model)
        self.scaler = torch.amp.GradScaler(device.type, enabled=settings.dtype == "fp16")
        self.schedule = Schedule.of(settings, self.optimizer, self._warms_up())
        self.step, self.seconds, self.lr = 0, 0.0, settings.lr
        self.last: Evaluation | None = None
        self.evaluated = 0  # the iteration of the last evaluation
        self.window: list[Tensor] = []  # [2] each: loss and error of an iteration
        if before:
            self._restore(before)

    def __call__(self) -> Evaluation:
        self.out.mkdir(parents=True, exist_ok=True)
        if self.evaluated < self.settings.iterations:
            with signals(patient=self.world.size > 1) as came:
                self._iterate_all(came)
        assert self.last is not None  # the last iteration evaluates
        return self.last

    def _before(self, resume: bool) -> dict[str, Any] | None:
        """The checkpoint that the run goes on from."""
        path = self.out / checkpoint.NAME
        if not path.exists():
            return None
        if not resume:
            raise FileExistsError(f"{self.out} holds a run already; --resume continues it, --out names another folder")
        return checkpoint.read(path)

    def _iterate_all(self, came: Signals) -> None:
        settings = self.settings
        log = Log(self.out, self.step, self.evaluated) if self.world.rank == 0 else None
        if self.world.rank == 0:
            what = f"{settings.model} on {settings.data}, {self.device}"
            print(f"{what}: iterations {self.step + 1} to {settings.iterations}", file=sys.stderr)
        quiet = None if self.world.rank == 0 else True  # None: where there is no terminal
        bar = tqdm(total=settings.iterations, initial=self.step, desc=settings.model, unit="it", disable=quiet)
        with bar, contextlib.closing(log) if log else contextlib.nullcontext():
            if self._evaluates() and self.evaluated < self.step:  # it stopped there
                self._evaluate(log, came)
            started = time.perf_counter()
            for x, labels in self.source.train(self.step, settings.iterations):
                self._iterate(x, labels)
                bar.update()
                evaluates = self._evaluates()
                saves = evaluates or self.step % settings.save_every == 0
                flushes = saves or self.step % settings.log_every == 0
                if flushes:
                    self._flush(log, bar, started)
                if saves:  # before an evaluation too: whatever stops that, the training is kept
                    self._save()
                if evaluates:
                    self._evaluate(log, came)
                if self.step < settings.iterations and (signum := self._stopped_by(came, flushes)):
                    self.seconds += time.perf_counter() - started if self.window else 0
                    self._save()
                    raise self._interrupted(signum)
                if not self.window:
                    started = time.perf_counter()

    def _stopped_by(self, came: Signals, flushed: bool) -> int | None:
        """The signal that came; several processes agree on it where they meet anyway."""
        if self.world.size > 1:
            return self.world.largest(came.received or 0, self.device) or None if flushed else None
        return came.received

    def _interrupted(self, signum: int) -> Interrupted:
        name, again = signal.Signals(signum).name, f"resnet-fused train --out {shlex.quote(str(self.out))} --resume"
        return Interrupted(signum, f"{name} after iteration {self.step}, which is saved; to go on: {again}")

    def _iterate(self, x: Tensor, labels: Tensor) -> None:
        x, labels = self.mix(x, labels, seed_of(self.settings.seed, "mix", self.step, self.world.rank))
        with self._autocast():
            logits = self.forward(x)
            loss = F.cross_entropy(logits, labels, label_smoothing=self.settings.label_smoothing)
        self.scaler.scale(loss).backward()
        self.world.average(self.model)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        if self.average:
            self.average.update(self.model)
        self.step += 1
        self.lr = self.schedule.lr
        self.schedule.iterated(self.step)
        most = labels if labels.ndim == 1 else labels.argmax(1)  # of mixed images
        wrong = (logits.argmax(1) != most).float().mean()
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

    def _evaluate(self, log: Log | None, came: Signals) -> None:
        split = "test" if self.step == self.settings.iterations or not self.settings.holdout else "val"
        self.world.share_statistics(self.model)
        model: nn.Module = self.model
        if self.average:
            self.world.share_statistics(model := self.average.model)
        try:
            with self._autocast():
                self.last = last = evaluate(model, came.guard(self.source.evaluation(split)), self.world)
        except Interrupted as error:
            raise self._interrupted(error.signum) from None
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

    def _restore(self, content: dict[str, Any]) -> None:
        self.model.load_state_dict(content["trained_state_dict"] or content["state_dict"])
        if self.average:
            self.average.load_state_dict(content["state_dict"], content["averaged"])
        self.optimizer.load_state_dict(content["optimizer"])
        self.schedule.load_state_dict(content["schedule"])
        self.scaler.load_state_dict(content["scaler"])
        self.step, self.seconds = content["step"], content["seconds"]
        self.window = list(content["window"].to(self.device))
        self.evaluated = content["evaluated"]
        self.last = content["evaluation"] and Evaluation(*content["evaluation"])
        torch.set_rng_state(content["rng"]["cpu"])
        if self.device.type == "cuda" and content["rng"]["cuda"] is not None:
            torch.cuda.set_rng_state(content["rng"]["cuda"], self.device)

    def _state(self) -> dict[str, Any]:
        average, own = self.average, self.model.state_dict()
        return {
            "model": self.settings.model,
            "model_kwargs": self.model_kwargs,
            "state_dict": average.model.state_dict() if average else own,
            "trained_state_dict": own if average else None,
            "averaged": average.count if average else 0,
            "mean": self.source.mean,
            "std": self.source.std,
            "resize": self.source.resize,
            "crop": self.source.crop,
            "classes": list(self.source.classes),
            "config": asdict(self.settings),
            "step": self.step,
            "seconds": self.seconds,
            "evaluation": self.last and tuple(self.last),
            "evaluated": self.evaluated,
            "window": torch.stack(self.window).cpu() if self.window else torch.zeros(0, 2),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict(),
            "rng": {
                "cpu": torch.get_rng_state(),
                "cuda": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
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
        if not path.exists():
            return "there is no checkpoint yet"
        return f"the last good checkpoint is {path} (iteration {checkpoint.read(path)['step']})"
