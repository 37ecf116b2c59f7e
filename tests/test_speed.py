"""Speed is earned: a layer's first use times eager and every trusted backend, and the fastest serves."""

import json

import pytest
import torch
from torch import nn

import resnet_fused
from resnet_fused import explain, ops
from resnet_fused.dispatch import numerics, registry, speed, store, trust
from resnet_fused.ops.batch_norm_act.training import TrainingCall

BN = [torch.ones(8), torch.zeros(8), torch.zeros(8), torch.ones(8)]


def image(*shape):
    return torch.randn(shape).contiguous(memory_format=torch.channels_last)


@pytest.fixture
def clock(tmp_path, monkeypatch):
    """What measuring finds, by backend, and how often it was asked; `auto` fuses on the CPU, as on a GPU."""
    monkeypatch.setattr(store, "cache_dir", lambda: tmp_path)
    monkeypatch.setattr(registry, "_AUTO_DEVICES", ("cpu",))
    monkeypatch.setattr(speed, "_TIMED_DEVICES", ("cpu",))
    monkeypatch.setenv("RESNET_FUSED_CALIBRATE", "auto")
    trust.forget(), speed.forget()

    class Clock(dict):
        asked = ()

    found = Clock(eager=2.0, triton=1.0)

    def measure(launches, device):
        for launch in launches.values():
            launch(), launch()
        found.asked += (tuple(launches),)
        return {name: found[name] for name in launches}

    monkeypatch.setattr(speed, "measure", measure)
    yield found
    trust.forget(), speed.forget()


def conv(x=None, **kwargs):
    torch.manual_seed(0)
    x = image(2, 8, 8, 8) if x is None else x
    return ops.conv_bn_act(x, torch.randn(8, 8, 3, 3), *BN, padding=1, **kwargs)


def train(x=None, **kwargs):
    torch.manual_seed(0)
    x = (image(2, 8, 8, 8) if x is None else x).requires_grad_()
    bn = [v.clone().requires_grad_(i < 2) for i, v in enumerate(BN)]
    y = ops.batch_norm_act(x, *bn, **kwargs)
    (y if isinstance(y, torch.Tensor) else y[0]).square().sum().backward()
    return [y.detach() if isinstance(y, torch.Tensor) else y[0].detach(), x.grad, *(v.grad for v in bn[:2]), *bn[2:]]


def ran(call):
    """The backends that serve."""
    found = []
    registry.listener = lambda op, choice, call: found.append(choice)
    try:
        with torch.set_grad_enabled(call is train):
            call()
    finally:
        registry.listener = None
    return found


@pytest.mark.parametrize("call", [conv, train])
@pytest.mark.parametrize("fastest", ["eager", "triton"])
def test_the_fastest_serves_and_is_timed_once(clock, call, fastest):
    clock[fastest] = 0.5
    choices = [ran(call)[0] for _ in range(3)]
    assert {c.backend for c in choices} == {fastest} and clock.asked == (("eager", "triton"),)
    if fastest == "eager":
        assert ("triton", "1.0 us, eager 0.5 us") in choices[-1].rejected
    else:
        assert choices[-1].gain == 4.0
    speed.forget()  # another process reads what was kept
    assert ran(call)[0].backend == fastest and len(clock.asked) == 1


@pytest.mark.parametrize(
    "refused, told",
    [("wrong by 7", "wrong by 7"), (trust.Passing("no memory"), "it was not timed with the others")],
    ids=["wrong", "passing"],
)
def test_a_backend_that_was_not_timed_says_why_once(clock, monkeypatch, refused, told):
    asked = []
    monkeypatch.setattr(speed, "times", lambda device, layer_class: {"eager": 0.5})
    monkeypatch.setattr(trust, "refused", lambda *args: asked.append(args) or refused)
    choices = [ran(conv)[0] for _ in range(3)]
    assert all(c.backend == "eager" and ("triton", told) in c.rejected for c in choices)
    assert len(asked) <= 2 and not clock.asked  # by the first call alone: the plan was kept


def test_in_a_capture_a_backend_that_was_not_timed_is_not_warned_of(clock, monkeypatch, recwarn):
    monkeypatch.setattr(speed, "times", lambda device, layer_class: {"eager": 0.5})
    monkeypatch.setattr(trust, "capturing", lambda device: True)
    assert ("triton", "it was not timed with the others") in ran(conv)[0].rejected
    assert not recwarn.list


@pytest.mark.parametrize("call", [conv, train])
def test_where_eager_wins_the_bits_are_eagers(clock, call):
    clock["eager"] = 0.5
    with torch.set_grad_enabled(call is train):
        for _ in range(2):
            ours = call()
            with resnet_fused.backend("eager"):
                expected = call()
            torch.testing.assert_close(ours, expected, rtol=0, atol=0)


R = image(2, 8, 8, 8)


@pytest.mark.parametrize("extra", [{}, {"residual": R}, {"residual": R, "residual_bn": BN}, {"pre_add": R}])
def test_timing_leaves_arguments_and_running_statistics_alone(clock, extra):
    def once():
        bn2 = {"residual_bn": [v.clone() for v in BN]} if "residual_bn" in extra else {}
        return train(**extra | bn2), bn2

    with resnet_fused.backend("triton"):
        expected = once()
    assert not clock.asked
    torch.testing.assert_close(once(), expected, rtol=0, atol=0)
    assert clock.asked == (("eager", "triton"),)


def test_image_sizes_are_few_classes(clock):
    with torch.no_grad():
        for size in (33, 34, 39, 45):
            conv(image(1, 8, size, size))
    assert len(clock.asked) == 1  # 1,089 to 2,025 rows
    with torch.no_grad():
        conv(image(1, 8, 46, 46))
    assert len(clock.asked) == 2


@pytest.mark.parametrize("call", [conv, train])
def test_nothing_is_timed_where_it_must_not_be(clock, monkeypatch, call):
    monkeypatch.setenv("RESNET_FUSED_CALIBRATE", "off")
    assert ran(call)[0].backend == "triton"
    speed.forget()
    monkeypatch.setenv("RESNET_FUSED_CALIBRATE", "auto")
    torch.use_deterministic_algorithms(True)
    try:
        assert ran(call)[0].backend == "triton"
    finally:
        torch.use_deterministic_algorithms(False)
    speed.forget()
    monkeypatch.setattr(trust, "capturing", lambda device: True)
    ran(call)
    with resnet_fused.backend("triton"):
        ran(call)
    assert not clock.asked


@pytest.mark.parametrize("call", [conv, train])
@pytest.mark.parametrize("warn_only", [False, True])
def test_determinism_is_looked_at_in_every_call(clock, call, warn_only):
    clock["eager"] = 0.5
    assert ran(call)[0].backend == "eager"
    torch.use_deterministic_algorithms(True, warn_only=warn_only)
    try:
        assert ran(call)[0].backend == "triton"
    finally:
        torch.use_deterministic_algorithms(False)
    assert ran(call)[0].backend == "eager" and len(clock.asked) == 1


def test_a_backend_that_was_not_timed_with_the_others_is_timed(clock):
    with torch.no_grad():
        conv()
    path = next(store.cache_dir().glob("times-*.json"))
    content = json.loads(path.read_text())
    content["entries"] = dict.fromkeys(content["entries"], {"eager": 0.5, "cuda": 1.0})
    path.write_text(json.dumps(content))
    speed.forget()
    assert ran(conv)[0].backend == "triton" and len(clock.asked) == 2


def test_what_changes_the_ranking_is_a_class_of_its_own(clock, monkeypatch):
    with torch.no_grad():
        conv()
        monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
        speed.forget()
        conv()
        conv(torch.randn(2, 8, 8, 8))
    assert len(clock.asked) == 3


def test_full_leaves_out_what_can_not_be_timed(clock, monkeypatch):
    def timer(launch):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setenv("RESNET_FUSED_CALIBRATE", "full")
    monkeypatch.setattr(speed, "cuda_timer", timer)
    assert ran(conv)[0].backend == "triton"


def test_a_wrong_mode_is_named(clock, monkeypatch):
    monkeypatch.setenv("RESNET_FUSED_CALIBRATE", "fast")
    with (
        torch.no_grad(),
        pytest.raises(ValueError, match="RESNET_FUSED_CALIBRATE must be one of auto, off, full; got 'fast'"),
    ):
        conv()


def test_full_times_every_configuration(clock, monkeypatch):
    monkeypatch.setenv("RESNET_FUSED_CALIBRATE", "full")
    timed = []
    monkeypatch.setattr(speed, "cuda_timer", lambda launch: timed.append(launch()) or 1000.0 - len(timed))
    (choice,) = ran(conv)
    triton = registry.implementation("triton", "conv_bn_act")
    assert choice.backend == "triton" and len(timed) > 2
    (entry,) = json.loads(next(store.cache_dir().glob("tuned-*.json")).read_text())["entries"].values()
    assert entry["backend"] == "triton" and entry["candidates"] == len(timed)
    before = len(timed)
    assert ran(conv)[0].backend == "triton" and len(timed) == before and triton


@pytest.mark.parametrize("call", [conv, train])
def test_no_memory_to_time_leaves_the_table_and_keeps_nothing(clock, monkeypatch, call):
    def measure(launches, device):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(speed, "measure", measure)
    assert ran(call)[0].backend == "triton"
    assert not list(store.cache_dir().glob("times-*.json"))


@pytest.mark.parametrize(
    "entry", [3, {}, {"triton": 1.0}, {"eager": "1", "triton": 2.0}, {"eager": 1.0, "triton": 0.0}]
)
def test_kept_times_are_not_trusted_blindly(clock, entry):
    with torch.no_grad():
        conv()
    path = next(store.cache_dir().glob("times-*.json"))
    content = json.loads(path.read_text())
    content["entries"] = dict.fromkeys(content["entries"], entry)
    path.write_text(json.dumps(content))
    speed.forget()
    assert ran(conv)[0].backend == "triton"


def test_a_refused_kernel_is_not_timed(clock, monkeypatch):
    monkeypatch.setattr(numerics, "wrong", lambda *args: "off by 1")
    with pytest.warns(UserWarning, match="is disabled on this device: off by 1"):
        assert ran(conv)[0].backend == "eager"
    assert not clock.asked


def test_explain_shows_both(clock):
    block = resnet_fused.resnet18().layer1[0].eval()
    model = nn.Sequential(block)
    x = image(1, 64, 8, 8)
    with torch.no_grad():
        assert explain(model, x)[0].ran == ["conv_bn_act: triton (2.00x eager)"]
        clock["eager"] = 0.5
        path = next(store.cache_dir().glob("times-*.json"))
        path.unlink()
        speed.forget()
        row = explain(model, x)[0]
    assert row.ran == ["conv_bn_act: eager"] and "conv_bn_act on triton: 1.0 us, eager 0.5 us" in row.why


@pytest.mark.gpu
def test_copies_in_turn_are_larger_than_the_cache():
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    vectors = [v.cuda() for v in BN]
    x = image(1, 8, 64, 64).cuda()
    calls = speed.rotated(TrainingCall(x, *vectors, 0.1, 1e-5, None, *[None] * 4, False, None, True, False))
    copies = [next(calls) for _ in range(16)]
    different = {c.x.data_ptr() for c in copies} - {x.data_ptr()}
    assert len(different) == min(8, -(-2 * cache // (x.numel() * 4 + 4 * 8 * 4)))
    assert all(c.running_mean.data_ptr() != vectors[2].data_ptr() for c in copies)


@pytest.mark.gpu
def test_a_gpus_events_are_the_clock(monkeypatch, tmp_path):
    monkeypatch.setattr(store, "cache_dir", lambda: tmp_path)
    monkeypatch.setenv("RESNET_FUSED_CALIBRATE", "auto")
    trust.forget(), speed.forget()
    block = resnet_fused.resnet18().layer1[0].cuda().eval()
    x = image(1, 64, 8, 8).cuda()
    with torch.no_grad():
        y = block(x)
        times = [e for p in tmp_path.glob("times-*.json") for e in json.loads(p.read_text())["entries"].values()]
        assert times and all(len(e) > 1 and all(t >= 0 for t in e.values()) for e in times)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = block(x)
        graph.replay()
    torch.testing.assert_close(captured, y)
    block.train()
    block(x.requires_grad_()).sum().backward()
    speed.forget()
