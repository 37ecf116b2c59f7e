"""From an operator's call to its result: the plan that was made for calls like it, or a new one."""

import contextlib
import warnings
from functools import partial
from typing import Any

import torch

from . import numerics, plans, registry, replay, speed, trust
from .plans import Plan


def serve(call: Any) -> Any:
    """The registered operator: eager's result where no other backend may serve."""
    key = call.key(), registry.get_backend()
    plan = plans.kept.get(key)
    if plan is None:
        result, plan, lasting = first(call)
        if lasting:
            plans.keep(plans.kept, key, plan)
        if registry.listener is not None:
            registry.listener(call.name, plan.choice, call)
        return result
    if registry.listener is not None:
        registry.listener(call.name, plan.choice, call)
    return plan.run(call)


def first(call: Any, preferred: str | None = None) -> tuple[Any, Plan, bool]:
    """The first call of a kind: its result, what served it, and whether that may be kept.

    Where a backend that nobody forced can't launch, the next one serves.
    """
    failed: dict[str, str] = {}
    while True:
        plan = decide(call, preferred, failed)
        name = plan.choice.backend
        last = name in (registry.PLAIN, registry.get_backend())
        before = [] if last else [t.clone() for t in call.written()]
        try:
            result = plan.run(call)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            if last:
                raise
            for t, value in zip(call.written(), before, strict=True):
                t.copy_(value)
            failed[name] = trust.failed(f"{call.name}/{name}", error)
            continue
        passing = any(isinstance(reason, trust.Passing) for _, reason in plan.choice.rejected)
        return result, plan, not passing and not trust.capturing(call[0].device)  # a capture puts checks off


def decide(call: Any, preferred: str | None = None, failed: dict[str, str] | None = None) -> Plan:
    """The first backend that can serve, is right on this device and, where that was timed, is the fastest.

    preferred: a backend to try before all others.
    failed: backends that can't launch, and why.
    """
    device, config, times = call[0].device, None, timed(call)
    tuned = _tuned(call)
    if preferred is None:
        preferred = tuned["backend"] if tuned is not None else min(times, key=lambda name: times[name], default=None)

    def against(name: str) -> str | None:
        nonlocal config
        if failed and name in failed:
            return failed[name]
        if tuned is not None and tuned["backend"] == registry.PLAIN:
            return "eager was the fastest when this shape was tuned"
        if tuned is None and times and name not in times:
            return _untimed(name, call)
        if tuned is None and times and times[name] > times[registry.PLAIN]:
            return slower(name, times)
        config, reason = _configured(name, call, tuned)
        return reason

    choice = registry.choose(call.name, device, against, call.order(), preferred)
    config = None if choice.backend == registry.PLAIN else config
    split = registry.splits(choice.backend, call)
    if split is not None:
        choice = choice._replace(rejected=(*choice.rejected, (f"{choice.backend} in one kernel", split)))
    if tuned is None and choice.backend in times:
        choice = choice._replace(gain=times[registry.PLAIN] / times[choice.backend])
    return Plan(choice, registry.implementation(choice.backend, call.op).plan(call, config), config)


def slower(name: str, times: dict[str, float]) -> str:
    """Why eager serves, from `timed`."""
    return f"{times[name]:.1f} us, eager {times[registry.PLAIN]:.1f} us"


def _untimed(name: str, call: Any) -> str:
    """Why a backend was not timed where others were; never a reason that passes: the plan lasts."""
    reason = None if trust.capturing(call[0].device) else _configured(name, call)[1]
    return "it was not timed with the others" if reason is None or isinstance(reason, trust.Passing) else reason


def _tuned(call: Any) -> dict[str, Any] | None:
    """The winner among a problem's configurations."""
    device, problem = call[0].device, call.problem()
    if problem is None:
        return None
    found = speed.lookup(device, problem)
    if found is None and speed.calibrates(device) and speed.mode() == "full" and not trust.capturing(device):
        found = fastest(call, speed.cuda_timer)
        speed.remember(device, problem, found)
    return found


def _configured(name: str, call: Any, tuned: dict[str, Any] | None = None) -> tuple[Any, str | None]:
    """The configuration with which a backend that is there serves a call, and why it can't, or None."""
    reason = registry.unsupported(name, call)
    if reason is None and name not in (registry.get_backend(), *registry.SPLITS_IN_AUTO):
        reason = registry.splits(name, call)
    if reason is not None:
        return None, reason
    configs = registry.implementation(name, call.op).configs(call)
    config = configs[0]
    if tuned is not None and tuned["backend"] == name and tuned["config"] in configs:
        config = tuned["config"]  # no other: the file may hold anything
    return config, untrusted(name, call, config)


def timed(call: Any) -> dict[str, float]:
    """Microseconds of eager and of every trusted backend for a layer of this class: those kept, or measured now.

    Empty where nothing is timed.
    """
    device, layer_class = call[0].device, call.layer_class()
    if layer_class is None or not speed.calibrates(device):
        return {}
    found = speed.times(device, layer_class)
    if trust.capturing(device) or call[0].numel() == 0:
        return found
    names, lasting = _candidates(call)
    if not names or found and set(names) <= set(found):
        return found
    try:
        found = _measured(call, names)
    except Exception:  # no memory, or a launch that fails at this shape: the table of guesses serves
        return {}
    if lasting:
        speed.keep_times(device, layer_class, found)
    return found


def measured(call: Any) -> dict[str, float]:
    """`timed`, whatever was kept; empty where no backend but eager serves."""
    names, _ = _candidates(call)
    return _measured(call, names) if names else {}


def _candidates(call: Any) -> tuple[list[str], bool]:
    """The trusted backends that serve a call, and whether these are all that ever will."""
    device = call[0].device
    there = [n for n in registry.candidates(device, call.order()) if registry.unavailable(n, device) is None]
    reasons = {name: _configured(name, call)[1] for name in there}
    lasting = not any(isinstance(reason, trust.Passing) for reason in reasons.values())
    return [name for name, reason in reasons.items() if reason is None], lasting


def _measured(call: Any, names: list[str]) -> dict[str, float]:
    with registry.heard_by(None):
        return speed.measure({name: call.trial(name) for name in (registry.PLAIN, *names)}, call[0].device)


def trial(name: str, call: Any) -> speed.Launch:
    """What is timed: a backend's plan with its default configuration, on copies of the call."""
    implementation = registry.implementation(name, call.op)
    run, calls = implementation.plan(call, implementation.configs(call)[0]), speed.rotated(call)
    return lambda: run(next(calls))


def untrusted(name: str, call: Any, config: Any) -> str | None:
    """Why the kernel class that would serve the call failed its check on this device, or None."""
    try:
        kernel = registry.implementation(name, call.op).kernel_class(call, config)
    except Exception as error:
        return trust.failed(f"{call.name}/{name}", error)
    if kernel is None or call[0].numel() == 0:
        return None
    return trust.refused(
        *(f"{call.name}/{name}/{kernel}", call[0].device, lambda: _checked(name, call, config)), registry.unfit(name)
    )


def _checked(name: str, call: Any, config: Any) -> str | None:
    wrong = compare(name, call, config)
    path = replay.keep(name, call, config, wrong) if wrong else None
    return wrong if path is None else f"{wrong} (resnet-fused doctor --replay {path})"


def compare(name: str, call: Any, config: Any) -> str | None:
    """What is wrong with a backend's numbers on random inputs like these, or None."""
    implementation = registry.implementation(name, call.op)
    drawn = call.drawn()
    if implementation.kernel_class(drawn, config) != implementation.kernel_class(call, config):
        drawn = call.drawn(whole=True)  # what is compiled depends on sizes that were cropped
    limits = list(numerics.call_limits(drawn))
    run = implementation.plan(drawn, config)
    numerics.leave_nan(limits)
    results = run(drawn)
    return numerics.wrong((*numerics.as_tuple(results), *drawn.written()), limits)


def fastest(call: Any, timer: speed.Timer) -> dict[str, Any]:
    """Every verified candidate for a call is timed: the winner, for `speed.remember`."""
    times: list[tuple[float, str, Any]] = []
    plain = (registry.PLAIN,) if registry.get_backend() == "auto" else ()
    for backend in (*plain, *registry.candidates(call[0].device, call.order())):
        if registry.unavailable(backend, call[0].device) or registry.unsupported(backend, call):
            continue
        implementation = registry.implementation(backend, call.op)
        for config in implementation.configs(call):
            with warnings.catch_warnings():  # a candidate that does not fit this device is no news here
                warnings.simplefilter("ignore")
                wrong = untrusted(backend, call, config)
            if wrong is None:
                with (
                    registry.heard_by(None),
                    contextlib.suppress(Exception),
                ):  # can't launch at this shape, or no memory
                    run = implementation.plan(call, config)
                    times.append((timer(partial(run, call)), backend, config))
    if not times:
        return {"backend": None, "config": None, "ms": None, "candidates": 0}
    ms, backend, config = min(times, key=lambda t: t[0])
    return {"backend": backend, "config": config, "ms": ms, "candidates": len(times)}
