"""deploy: a snapshot that gives the model's numbers, holds its own tensors, and refuses what it can't be made of."""

import copy
import functools
import pickle
import subprocess
import sys
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import resnet_fused
from resnet_fused import cli, export
from resnet_fused.deploy import engines
from resnet_fused.dispatch import speed, store, trust

deploy = functools.partial(resnet_fused.deploy, engine="pytorch")  # the others take seconds

X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def drawn(model):
    """In eval mode, with statistics that matter."""
    torch.manual_seed(0)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_(0, 0.1), m.running_var.uniform_(0.5, 1.5)
            nn.init.uniform_(m.weight, 0.5, 1.5), nn.init.normal_(m.bias)
    return model.eval()


class Odd(nn.Module):
    """What a rewriting may get wrong."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, groups=4, bias=False)
        self.bn, self.shared = nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1)
        self.up, self.dilated = nn.ConvTranspose2d(8, 8, 2, 2), nn.Conv2d(8, 8, 3, dilation=2, padding=2)
        self.same, self.fc = nn.Conv2d(8, 8, 3, padding="same"), nn.Linear(8, 5, bias=False)

    def forward(self, x):
        a = self.a(x)
        twice = self.bn(self.b(a)) + a  # a convolution's result that two read
        x = F.relu(self.shared(F.relu(twice)) + self.shared(a))  # two convolutions, one module
        x = x + self.dilated(x).mean((2, 3), keepdim=True)  # an addend of another shape
        x = torch.add(self.dilated(x), x, alpha=2)
        x = F.relu(1 + self.same(x)) + self.up(x)[:, :, ::2, ::2]
        x = torch.cat([x, self.bn(x)], 2)  # a BN without a convolution
        return self.fc(x.permute(0, 2, 3, 1)).flatten(1), x.amax((1, 2, 3))


class Structured(nn.Module):
    """Results in a structure, computed weights, an addend that is the other one, or of one image."""

    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3)), nn.Linear(4, 2)
        self.plain, self.position = nn.Conv2d(3, 4, 3), nn.Parameter(torch.randn(1, 4, 30, 30))

    def forward(self, x):
        y, z = self.conv(x), self.plain(x)
        return {
            "a": [F.relu(z + z)],
            "b": (self.plain(x) + self.position, F.linear(y.mean((2, 3)), self.fc.weight.abs())),
        }


MODELS = {
    "resnet18": resnet_fused.resnet18,
    "resnext50_32x4d": resnet_fused.resnext50_32x4d,
    "cifar_resnet20": resnet_fused.cifar_resnet20,
    "preact_resnet18": resnet_fused.preact_resnet18,
    "odd": Odd,
    "structured": Structured,
}


@pytest.mark.parametrize("name", MODELS)
def test_the_numbers_are_the_models_for_any_batch(name):
    model = drawn(MODELS[name]())
    with torch.no_grad():
        for example in (X, X[:1]):
            served = deploy(model, example)
            for x in (X, X[:1], torch.cat([X, X, X])):
                torch.testing.assert_close(served(x), model(x), rtol=1e-4, atol=1e-4)


def test_convolutions_take_bn_add_and_relu_with_them():
    graph = deploy(drawn(resnet_fused.resnet18()), X)._run.graph
    names = [n.target.name() for n in graph.nodes if n.op == "call_function"]
    assert names.count("mkldnn::_convolution_pointwise") == 12
    assert names.count("mkldnn::_convolution_pointwise_.binary") == 7  # into the addend
    assert (
        names.count("mkldnn::_convolution_pointwise.binary") == 1
    )  # the pooled one's, which the next convolution made
    assert set(names) <= {
        *("mkldnn::_convolution_pointwise", "mkldnn::_convolution_pointwise.binary", "mkldnn::_linear_pointwise"),
        "mkldnn::_convolution_pointwise_.binary",
        *("aten::max_pool2d", "aten::adaptive_avg_pool2d", "aten::reshape", "aten::sym_size.int"),
    }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype):
    model = drawn(resnet_fused.resnet18())
    with torch.no_grad():
        exact = model.double()(X.double())
        model = model.to(dtype)
        y, eager = (f(X.to(dtype)).double() for f in (deploy(model, X.to(dtype)), model))
    own = (eager - exact).abs().max() if dtype != torch.float64 else 1e-12  # the oracle is its eager self
    assert (y - exact).abs().max() <= 2 * own + torch.finfo(dtype).eps * exact.abs().max()


def test_it_is_a_snapshot_without_parameters():
    model = drawn(resnet_fused.resnet18())
    served = deploy(model, X)
    before = served(X)
    assert not list(served._run.parameters())
    with torch.no_grad():
        for t in (*model.parameters(), *model.buffers()):
            t.zero_()
    assert torch.equal(served(X), before) and before.any()


def test_a_model_of_somebody_else_and_a_fused_one():
    torchvision = pytest.importorskip("torchvision")
    model = drawn(torchvision.models.resnet18())
    with torch.no_grad():
        torch.testing.assert_close(deploy(model, X)(X), model(X), rtol=1e-4, atol=1e-4)


def test_what_can_not_be_deployed_is_named():
    model = drawn(resnet_fused.cifar_resnet20())
    for wrong, message in (
        (resnet_fused.cifar_resnet20(), "train mode"),
        (torch.compile(model), "compiled"),
        (nn.DataParallel(model), "wrapped in DataParallel; deploy its `module`"),
        (torch.jit.trace(nn.Linear(3, 3).eval(), torch.ones(1, 3)), "scripted"),
        (drawn(resnet_fused.cifar_resnet20().half()), "dtype torch.float16, got torch.float32"),
        (resnet_fused.cifar_resnet20().eval().to("meta"), "one device, the CPU or a CUDA device; got cpu, meta"),
    ):
        with pytest.raises(ValueError, match=message):
            deploy(wrong, X)

    broken = drawn(resnet_fused.cifar_resnet20())
    broken.layer1[0].conv1.weight.data[0] = float("nan")
    for function in (lambda m, x: deploy(m, x), lambda m, x: export(m, x, "m.onnx")):
        with pytest.raises(ValueError, match="model's layer1.0.conv1.weight is not finite"):
            function(broken, X)
        with pytest.raises(ValueError, match="example must be a tensor .*, got list"):
            function(model, [X])
        with pytest.raises(ValueError, match="model must be an nn.Module, got str"):
            function("resnet18", X)

    class Fixed(nn.Module):
        def forward(self, x):
            return x.reshape(int(x.shape[0]) * 2, -1)

    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("n", torch.zeros(()))

        def forward(self, x):
            self.n.add_(1)
            return x + self.n

    with pytest.raises(ValueError, match="model fixes the number of images"):
        deploy(Fixed().eval(), X)
    with pytest.raises(ValueError, match="model writes n in eval mode"):
        deploy(Counting().eval(), X)

    class Strided(nn.Module):
        def forward(self, x):
            return x.as_strided((2, 3), (3, 1))

    with pytest.raises(ValueError, match="as_strided"):
        deploy(Strided().eval(), X)


def test_a_snapshot_says_what_it_takes_and_that_it_stays_here():
    served = deploy(drawn(resnet_fused.cifar_resnet20()), X)
    for wrong, got in ((X.double(), "torch.float64"), (X[0], r"\(3, 32, 32\)"), ([X], "list"), (X.to("meta"), "meta")):
        with pytest.raises(
            ValueError, match=f"x must be a tensor of 4 dimensions, torch.float32, on cpu .*; got .*{got}"
        ):
            served(wrong)
    for function in (copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="can't be saved or copied; export the model"):
            function(served)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["cifar_resnet20", "odd", "bytes"])
def test_on_a_gpu_it_is_a_graph_of_fused_convolutions(name, monkeypatch, tmp_path):
    monkeypatch.setattr(store, "cache_dir", lambda: tmp_path)
    trust.forget(), speed.forget()
    torch.backends.cudnn.allow_tf32 = False  # the one setting of it that torch.export takes
    model, x = drawn(MODELS["cifar_resnet20" if name == "bytes" else name]()).cuda(), X[:, :, :8, :8].cuda()
    if name == "bytes":
        model.set_input_normalization(0.5, 0.25)
        x = (60 * x + 128).clamp(0, 255).byte()
    served = deploy(model, x)
    with torch.no_grad():
        torch.testing.assert_close(served(x), model(x), rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(served(x[:1]), model(x[:1]), rtol=1e-3, atol=1e-3)
    served.capture(x[:1])
    torch.backends.cudnn.allow_tf32 = True
    assert name == "odd" or len(served._run._captured) == 2
    trust.forget(), speed.forget()


@pytest.mark.parametrize("name", engines.ENGINES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_another_engine_gives_the_models_numbers_for_any_batch(name, dtype):
    pytest.importorskip(name, reason='needs pip install ".[peers]"')
    model, x = drawn(resnet_fused.cifar_resnet20()).to(dtype), X.to(dtype)
    if name == "onnxruntime" and dtype == torch.bfloat16:
        with pytest.raises(resnet_fused.BackendUnavailable, match="have no torch.bfloat16"):
            resnet_fused.deploy(model, x, engine=name)
        return
    served = resnet_fused.deploy(model, x, engine=name)
    assert served.engine == name
    with torch.no_grad():
        for given in (x, x[:1], x[:0], torch.cat([x, x, x]), x.contiguous(memory_format=torch.channels_last)):
            y, expected = served(given), model(given)
            assert y.dtype == dtype
            torch.testing.assert_close(y, expected, rtol=0, atol=64 * torch.finfo(dtype).eps ** 0.75)
    with pytest.raises(ValueError, match=rf"of the example's size \(3, 32, 32\), got \(3, 48, 48\): {name} serves one"):
        served(F.pad(x, (8, 8, 8, 8)))
    with pytest.raises(ValueError, match=rf"the example's 3 channels, got \({len(x)}, 1, 32, 32\)$"):
        served(x[:, :1])


@pytest.mark.parametrize("engine", ["pytorch", *engines.ENGINES])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_images_of_bytes(engine, dtype):
    if engine != "pytorch":
        pytest.importorskip(engine, reason='needs pip install ".[peers]"')
    model, images = drawn(resnet_fused.cifar_resnet20()).to(dtype), (60 * X + 128).clamp(0, 255).byte()
    for plain in (model, nn.Sequential(nn.Conv2d(3, 4, 1)).to(dtype).eval()):
        with pytest.raises(ValueError, match="example is of torch.uint8, which model does not take: "):
            deploy(plain, images)
    model.set_input_normalization((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    model = nn.Sequential(model, nn.Flatten()).eval()
    if engine == "onnxruntime" and dtype == torch.bfloat16:
        with pytest.raises(resnet_fused.BackendUnavailable, match="have no torch.bfloat16"):
            resnet_fused.deploy(model, images, engine=engine)
        return
    served = resnet_fused.deploy(model, images, engine=engine)
    with torch.no_grad():
        for given in (images, images[:1]):
            y, expected = served(given), model(given)
            assert y.dtype == dtype
            torch.testing.assert_close(y, expected, rtol=0, atol=1e-4 if dtype == torch.float32 else 0.8)
    with pytest.raises(ValueError, match="torch.uint8, on cpu as the example"):
        served(X)
    deploy(model, X.to(dtype))  # floating-point images are normalised already


TWO_AND_CTRL_C = """
import os, resnet_fused, signal, time, torch
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
model, x = resnet_fused.cifar_resnet20().eval(), torch.zeros(1, 3, 32, 32)
first, second = (resnet_fused.deploy(model, x, engine="openvino") for _ in range(2))
del first
del second
try:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(10)
except KeyboardInterrupt:
    print("interrupted")
"""


def test_a_signal_is_heard_when_two_engines_have_come_and_gone():
    pytest.importorskip("openvino", reason='needs pip install ".[peers]"')
    done = subprocess.run([sys.executable, "-c", TWO_AND_CTRL_C], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "interrupted\n"), done.stderr


def test_the_fastest_engine_serves_and_a_wrong_one_is_out(monkeypatch):
    model = drawn(resnet_fused.cifar_resnet20())
    expected = model(X)
    wrong, right = (lambda m, x: lambda x: 2 * m(x)), (lambda m, x: lambda x: m(x))
    module = sys.modules["resnet_fused.deploy"]  # the name is the function's
    monkeypatch.setattr(module, "ENGINES", {"wrong": wrong, "right": right})
    for right, engine in ((1.0, "right"), (1.98, "pytorch"), (4.0, "pytorch")):  # of 2: 1 % may be chance
        times = {"right": right, "pytorch": 2.0}
        monkeypatch.setattr(module, "_milliseconds", lambda runs, x, times=times: times)
        served = resnet_fused.deploy(model, X)
        assert served.engine == engine and "right 1.00 ms" in repr(served) or engine == "pytorch"
        assert "does not give the model's numbers" in served.candidates["wrong"]
        torch.testing.assert_close(served(X), expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="does not give the model's numbers"):
        resnet_fused.deploy(model, X, engine="wrong")
    with pytest.raises(ValueError, match="engine must be one of auto, pytorch, wrong, right; got 'tvm'"):
        resnet_fused.deploy(model, X, engine="tvm")


def test_an_addend_that_is_read_later_keeps_its_values():
    class Read(nn.Module):
        def __init__(self, when):
            super().__init__()
            self.when, self.a, self.b, self.c = when, *(nn.Conv2d(3, 3, 3, padding=1) for _ in range(3))

        def forward(self, x):
            a = self.a(x)
            seen = a.flatten(1)
            b = F.relu(self.c(self.b(a)) + a)
            if self.when == "output":
                return b, a
            return {"later": lambda: b + a.mean(), "view": lambda: b.flatten(1) * seen, "never": lambda: b}[self.when]()

    for when in ("later", "view", "output", "never"):
        model = drawn(Read(when))
        served = deploy(model, X)
        in_place = "mkldnn::_convolution_pointwise_.binary" in [
            n.target.name() for n in served._run.graph.nodes if n.op == "call_function"
        ]
        assert in_place == (when == "never")
        torch.testing.assert_close(served(X), model(X), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(served(X), model(X), rtol=1e-4, atol=1e-4)


def onnx_of(path):
    ort = pytest.importorskip("onnxruntime")
    session = ort.InferenceSession(str(path))
    (name,) = (i.name for i in session.get_inputs())
    return lambda x: torch.from_numpy(session.run(None, {name: x.numpy()})[0])


LOADERS = {
    "model.onnx": onnx_of,
    "model.pt2": lambda path: torch.export.load(path).module(),
    "model.aoti.pt2": lambda path: torch._inductor.aoti_load_package(str(path)),
}


@pytest.mark.parametrize("name", LOADERS)
def test_a_file_gives_the_models_numbers_without_this_package(name, tmp_path):
    if name.endswith("onnx"):
        pytest.importorskip("onnxscript")
    model = drawn(resnet_fused.cifar_resnet20())
    with resnet_fused.backend("triton"), torch.no_grad():  # whatever is forced
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="(No complete tensor|Expect archive)")
            run = LOADERS[name](export(model, X, tmp_path / name))
    with torch.no_grad():
        for x in (X, X[:1], torch.cat([X, X])):
            torch.testing.assert_close(run(x), model(x), rtol=1e-4, atol=1e-4)
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_a_file_that_takes_bytes(tmp_path):
    model, images = drawn(resnet_fused.cifar_resnet20()), (60 * X + 128).clamp(0, 255).byte()
    model.set_input_normalization((0.485, 0.456, 0.406), 0.25)
    run = torch.export.load(export(model, images, tmp_path / "model.pt2")).module()
    torch.testing.assert_close(run(images[:1]), model(images[:1]), rtol=1e-4, atol=1e-4)


def test_safetensors_load_where_the_weights_came_from(tmp_path):
    model = drawn(resnet_fused.resnet18())
    path = export(model, X, tmp_path / "w.safetensors")
    torch.testing.assert_close(dict(resnet_fused.resnet18(weights=str(path)).state_dict()), dict(model.state_dict()))


def test_what_can_not_be_exported_is_named_and_nothing_is_written(tmp_path):
    model = drawn(resnet_fused.cifar_resnet20())
    for wrong, path, message in (
        (model, tmp_path / "m.pth", r"must end in one of .onnx, .aoti.pt2, .pt2, .safetensors, got 'm.pth'"),
        (model, tmp_path / "none" / "m.pt2", "folder .* is not there"),
        (resnet_fused.cifar_resnet20(), tmp_path / "m.pt2", "train mode"),
    ):
        with pytest.raises(ValueError, match=message):
            export(wrong, X, path)
    assert not list(tmp_path.iterdir())


def test_the_command_line_exports(tmp_path, capsys):
    weights = export(drawn(resnet_fused.resnet18(num_classes=7)), X, tmp_path / "w.safetensors")
    path = tmp_path / "m.pt2"
    options = ["--model", "resnet18", "--weights", str(weights), "--size", "32"]
    assert cli.main(["export", str(path), *options]) == 0
    assert capsys.readouterr().out.strip() == str(path)
    assert torch.export.load(path).module()(X).shape == (2, 7)
    assert cli.main(["export", str(tmp_path / "m.txt"), *options]) == 2
    with pytest.raises(SystemExit, match="2"):
        cli.main(["export", str(path), "--model", "resnet18"])
    assert "required: --weights" in capsys.readouterr().err
