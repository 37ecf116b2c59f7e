"""The book-keeping of `graphed`: what is replayed, what is captured anew. Capture itself is a stand-in on the CPU."""

import contextlib
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

import resnet_fused
from resnet_fused.graphs import Graphed, _kind, _state

X = torch.randn(2, 3, 32, 32)


class Recorder:
    """A capture that replays by calling the model as it was, on the tensors as they lay."""

    def __init__(self):
        self.captures = self.replays = 0

    def __call__(self, model, example):
        self.captures += 1
        static, output = example.clone(), model(example)
        frozen = [(t, t.detach()) for t in (*model.parameters(), *model.buffers())]

        def replay():
            self.replays += 1
            now = [t.data for t, _ in frozen]
            for t, then in frozen:
                t.data = then
            output.copy_(model(static))
            for (t, _), data in zip(frozen, now, strict=True):
                t.data = data

        return static, output, replay


@pytest.fixture
def setup():
    torch.manual_seed(0)
    model = resnet_fused.resnet18(num_classes=5).eval()
    recorder = Recorder()
    graphed = Graphed(model, recorder)
    graphed.capture(X)
    return model, graphed, recorder


def assert_right(model, graphed, x=X):
    with torch.no_grad():
        assert torch.equal(graphed(x), model(x))


def test_replays_and_hands_out_its_own_results(setup):
    model, graphed, recorder = setup
    first, second = graphed(X), graphed(X + 1)
    with torch.no_grad():
        assert torch.equal(first, model(X)) and torch.equal(second, model(X + 1))
    assert (recorder.captures, recorder.replays) == (1, 2)


def test_a_new_shape_is_a_plain_call_and_several_are_kept(setup):
    model, graphed, recorder = setup
    larger = torch.randn(3, 3, 32, 32)
    assert_right(model, graphed, larger)
    assert (recorder.captures, recorder.replays) == (1, 0)
    graphed.capture(larger)
    for x in (larger, X, larger.contiguous(memory_format=torch.channels_last), X):
        assert_right(model, graphed, x)
    assert (recorder.captures, recorder.replays) == (2, 3)


def replace_convolution(model):
    model.layer1[0].conv1 = nn.Conv2d(64, 64, 3, padding=1, bias=False)


def replace_parameter(model):
    model.fc.weight = nn.Parameter(model.fc.weight * 2)


def swap_data(model):
    model.fc.bias.data = model.fc.bias.data + 1


CHANGES = {
    "load_state_dict(assign)": lambda m: m.load_state_dict(
        {k: v.clone() + 0.1 for k, v in m.state_dict().items()}, assign=True
    ),
    "to": lambda m: m.to(torch.float64).to(torch.float32),
    "replaced convolution": replace_convolution,
    "replaced parameter": replace_parameter,
    "swapped data": swap_data,
    "hook": lambda m: m.fc.register_forward_hook(lambda module, args, out: out + 1),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_that_a_replay_would_not_see_is_captured_anew(setup, change):
    model, graphed, recorder = setup
    CHANGES[change](model)
    for _ in range(2):
        assert_right(model, graphed)
    assert recorder.captures == 2


def test_settings_and_each_hook_are_part_of_the_state():
    model = resnet_fused.ResNet(resnet_fused.BasicBlock, [1, 1, 1, 1]).eval()
    conv, hooks = model.layer1[0].conv1, [model.fc.register_forward_hook(lambda module, args, out: out + 1)]

    def replace_hook():
        hooks[0].remove()
        model.fc.register_forward_hook(lambda module, args, out: out * 5)

    for change in (
        replace_hook,
        lambda: setattr(model.bn1, "eps", 0.5),
        *(lambda name=name: setattr(conv, name, (2, 2)) for name in ("stride", "padding", "dilation")),
        lambda: setattr(conv, "groups", 2),
        lambda: setattr(model.relu, "forward", torch.nn.functional.gelu),
        lambda: setattr(model.relu, "forward", torch.nn.functional.silu),
    ):
        before = _state(model)
        assert _state(model) == before
        change()
        assert _state(model) != before


def test_another_precision_of_convolutions_is_another_kind():
    conv, before = torch.backends.cudnn.conv, (_kind(X), torch.backends.cudnn.conv.fp32_precision)
    conv.fp32_precision = "ieee"
    try:
        assert _kind(X) != before[0]
    finally:
        conv.fp32_precision = before[1]


def test_edits_in_place_need_no_new_capture(setup):
    model, graphed, recorder = setup
    torch.manual_seed(4)
    model.load_state_dict(resnet_fused.resnet18(num_classes=5).state_dict())
    with torch.no_grad():
        model.bn1.running_mean.add_(1)
    assert_right(model, graphed)
    assert recorder.captures == 1


def test_modes_and_backends(setup):
    model, graphed, recorder = setup
    with resnet_fused.backend("triton"):
        assert_right(model, graphed)
    assert recorder.replays == 0
    for child in (model, model.layer1[0].bn1):
        child.train()
        before = model.layer1[0].bn1.running_mean.clone()
        graphed(X)  # a plain call
        assert not torch.equal(model.layer1[0].bn1.running_mean, before)
        with pytest.raises(ValueError, match="eval mode"):
            graphed.capture(X)
        model.eval()
    assert_right(model, graphed)
    assert recorder.captures == 1


def test_captures_under_inference_mode_serve_outside_it(setup):
    model, graphed, recorder = setup
    replace_parameter(model)
    with torch.inference_mode():
        graphed.capture(X[:1].clone())
        graphed(X)  # captured anew
    assert_right(model, graphed, X[:1])
    assert_right(model, graphed)
    assert (recorder.captures, recorder.replays) == (3, 4)


def test_threads_take_turns(setup):
    model, graphed, recorder = setup
    static, replay = graphed._captured[_kind(X)][0], graphed._captured[_kind(X)].replay
    busy = threading.Barrier(2, timeout=0.2)

    def slowly():
        copied = static.clone()
        with contextlib.suppress(threading.BrokenBarrierError):
            busy.wait()  # for the other thread, which must not come
        assert torch.equal(static, copied)
        replay()

    graphed._captured[_kind(X)] = graphed._captured[_kind(X)]._replace(replay=slowly)
    images = [X, X + 1]
    with ThreadPoolExecutor(2) as threads:
        found = list(threads.map(graphed, images))
    for x, y in zip(images, found, strict=True):
        with torch.no_grad():
            assert torch.equal(y, model(x))


def test_a_replay_on_another_stream_waits_for_the_last(setup, monkeypatch):
    class Stream:
        def __init__(self):
            self.waited = []

        def wait_stream(self, other):
            self.waited.append(other)

    first, second = Stream(), Stream()
    for stream, waited in ((first, []), (first, []), (second, [first]), (second, [first]), (first, [second])):
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device, stream=stream: stream)
        setup[1]._wait(torch.device("cuda", 0))
        assert stream.waited == waited


def test_the_example_has_to_be_on_a_gpu():
    with pytest.raises(ValueError, match="example must be on a CUDA device, got cpu"):
        resnet_fused.graphed(resnet_fused.resnet18().eval(), X)
