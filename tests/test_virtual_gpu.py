"""The virtual GPU's own runtime: streams, devices, captures, errors and memory behave as a GPU's."""

import pytest
import torch
import triton
import triton.language as tl
import virtual_gpu

import resnet_fused
from resnet_fused import testing
from resnet_fused.dispatch import registry
from resnet_fused.testing import CASES, make_inputs

pytestmark = pytest.mark.virtual_gpu


@pytest.fixture(autouse=True)
def _sound_device():
    yield
    virtual_gpu.forget_errors()


@triton.jit
def copy_kernel(x, y, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i, i < n), i < n)


def copy(x, y, n):
    copy_kernel[(1,)](x, y, n, BLOCK=128)


def test_a_kernel_runs_and_is_counted():
    x, y = torch.randn(100, device="cuda"), torch.empty(100, device="cuda")
    before = virtual_gpu.launches()
    copy(x, y, 100)
    assert torch.equal(x, y) and virtual_gpu.launches() == before + 1


def test_an_access_outside_is_always_told():
    for _ in range(8):
        x, y = torch.randn(100, device="cuda"), torch.empty(128, device="cuda")
        with pytest.raises(RuntimeError, match="outside the allocations"):
            copy(x, y, 128)
            y.cpu()


def test_memory_of_another_device_is_refused():
    x, y = torch.randn(100, device="cuda:1"), torch.empty(100, device="cuda:1")
    with pytest.raises(RuntimeError, match="device 1"):
        copy(x, y, 100)
        torch.cuda.synchronize()


def test_work_of_another_stream_is_not_waited_for():
    stream = torch.cuda.Stream()
    missed = 0
    for _ in range(16):
        x, y = torch.randn(100, device="cuda"), torch.full((100,), float("nan"), device="cuda")
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            copy(x, y, 100)
        missed += not torch.equal(x, y)
        torch.cuda.synchronize()
        assert torch.equal(x, y)
    assert 0 < missed < 16  # a device is fast or slow


def test_a_capture_runs_nothing_until_its_replay_and_ends_for_its_events():
    x, y = torch.randn(100, device="cuda"), torch.zeros(100, device="cuda")
    copy(x, y, 100)
    y.zero_()
    graph, other, event = torch.cuda.CUDAGraph(), torch.cuda.Stream(), torch.cuda.Event()
    with torch.cuda.graph(graph):
        copy(x, y, 100)
        y += 1
        event.record()
    assert not y.any()
    graph.replay()
    assert torch.equal(y, x + 1)
    with torch.cuda.stream(other):
        event.wait()
        assert not torch.cuda.is_current_stream_capturing()


def test_a_synchronisation_breaks_a_capture():
    x = torch.randn(3, device="cuda")
    with pytest.raises(RuntimeError), torch.cuda.graph(torch.cuda.CUDAGraph()):
        x.sum().item()


def test_a_seed_gives_the_same_numbers_again():
    generator = torch.Generator("cuda")
    draws = [torch.randn(5, device="cuda", generator=generator.manual_seed(s)) for s in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    assert not torch.equal(torch.randn(5, device="cuda", generator=generator), draws[2])


@pytest.mark.parametrize("backend", ["auto", "cuda", "triton"])
@pytest.mark.parametrize("case", [c for c in CASES if not c.large and c.id != "conv-empty"], ids=lambda c: c.id)
def test_no_backend_writes_its_inputs(case, backend):
    if backend != "auto" and (
        reason := registry.unavailable(backend, torch.device("cuda", 0))
        or (None if registry.serves(backend, case.op) else f"{backend} has no {case.op}")
    ):
        pytest.skip(reason)
    args, kwargs = make_inputs(case, dtype=torch.float16, device="cuda")
    testing.map_tensors((args, kwargs), lambda t: virtual_gpu.read_only(t.data_ptr()) if t.numel() else None)
    with torch.no_grad(), resnet_fused.backend(backend):
        testing.OPS[case.op](*args, **kwargs)
    torch.cuda.synchronize()
