"""From an operator's call to its result: the plan that was made for calls like it, or a new one."""

import warnings
from functools import partial
from typing import Any

from . import numerics, plans, registry, speed, trust
from .plans import Plan


def serve(call: Any) -> Any:
    """The registered operator: eager's result where no other backend may serve."""
    key = call.key(), registry.get_backend()
    plan = plans.kept.get(key)
    if plan is None:
        plan = _decide(call)
        if not trust.capturing(call[0].device):  # a capture puts checks off
            plans.keep(plans.kept, key, plan)
    if registry.listener is not None:
        registry.listener(call.name, plan.choice, call)
    return plan.run(call)


def _decide(call: Any) -> Plan:
    """The first backend that can serve, is right on this device and, where that was timed, is the fastest."""
    device, config = call[0].device, None
    problem = call.problem()
    tuned = speed.lookup(device, problem) if problem is not None else None

    def serves(name: str) -> str | None:
        nonlocal config
        reason = registry.unsupported(name, call)
        if reason is None and name not in (registry.get_backend(), *registry.SPLITS_IN_AUTO):
            reason = registry.splits(name, call)
        if reason is None:
            configs = registry.implementation(name, call.op).configs(call)
            config = configs[0]
            if tuned is not None and tuned["backend"] == name and tuned["config"] in configs:
                config = tuned["config"]  # no other: the file may hold anything
            reason = refused(name, call, config)
        return reason

    first = None if tuned is None else tuned["backend"]
    choice = registry.choose(call.name, device, serves, call.order(), first)
    config = None if choice.backend == registry.PLAIN else config
    split = registry.splits(choice.backend, call)
    if split is not None:
        choice = choice._replace(rejected=(*choice.rejected, (f"{choice.backend} in one kernel", split)))
    return Plan(choice, registry.implementation(choice.backend, call.op).plan(call, config), config)


def refused(name: str, call: Any, config: Any) -> str | None:
    """Why the kernel class that would serve the call failed its check on this device, or None."""
    kernel = registry.implementation(name, call.op).kernel_class(call, config)
    if kernel is None or call[0].numel() == 0:
        return None
    return trust.refused(f"{call.name}/{name}/{kernel}", call[0].device, lambda: compare(name, call, config))


def compare(name: str, call: Any, config: Any) -> str | None:
    """What is wrong with a backend's numbers on random inputs like these, or None."""
    call = call.drawn()
    limits = list(numerics.call_limits(call))
    results = registry.implementation(name, call.op).plan(call, config)(call)
    return numerics.wrong((*numerics.as_tuple(results), *call.written()), limits)


def fastest(call: Any, timer: speed.Timer) -> dict[str, Any]:
    """Every verified candidate for a call is timed: the winner, for `speed.remember`."""
    times: list[tuple[float, str, Any]] = []
    for backend in registry.candidates(call[0].device, call.order()):
        if registry.unavailable(backend, call[0].device) or registry.unsupported(backend, call):
            continue
        implementation = registry.implementation(backend, call.op)
        for config in implementation.configs(call):
            with warnings.catch_warnings():  # a candidate that does not fit this device is no news here
                warnings.simplefilter("ignore")
                wrong = refused(backend, call, config)
            if wrong is None:
                run = implementation.plan(call, config)
                times.append((timer(partial(run, call)), backend, config))
    if not times:
        return {"backend": None, "config": None, "ms": None, "candidates": 0}
    ms, backend, config = min(times, key=lambda t: t[0])
    return {"backend": backend, "config": config, "ms": ms, "candidates": len(times)}
