"""What a user runs on a CUDA device, from end to end: models through `auto`, programs, processes, compiled graphs."""

import copy
import json

import pytest
import torch
import torch.distributed as dist
from conftest import VIRTUAL
from PIL import Image
from test_distributed import free_port
from test_papers import assert_step_within
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import resnet_fused
from resnet_fused.cli import main
from resnet_fused.evaluation.networks import Network
from resnet_fused.evaluation.views import center
from resnet_fused.train.augment import RESIZE

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("error:.*is disabled on this device")]
SIZE = 64 if VIRTUAL else 224
DEVICE = torch.device("cuda")


@pytest.fixture(autouse=True)
def _precision():
    set_precision("ieee")


def set_precision(value: str) -> None:
    torch.backends.cuda.matmul.fp32_precision = value
    torch.backends.cudnn.conv.fp32_precision = torch.backends.cudnn.rnn.fp32_precision = value


def spread(model: nn.Module) -> nn.Module:
    """Running statistics unlike a fresh BN's."""
    for i, bn in enumerate(m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        torch.manual_seed(i)
        bn.running_mean.normal_(0, 0.1), bn.running_var.uniform_(0.5, 1.5)
    return model


def test_resnet50_in_eval_mode_runs_fused_and_right():
    torch.manual_seed(0)
    model = spread(resnet_fused.resnet50(num_classes=10)).to(DEVICE).half().eval()
    x = torch.randn(2, 3, SIZE, SIZE, device=DEVICE, dtype=torch.float16)
    with torch.no_grad():
        y = model(x)
        assert not any("eager" in name for row in resnet_fused.explain(model, x) for name in row.ran)
        with resnet_fused.backend("eager"):
            plain = model(x)
            exact = copy.deepcopy(model).double()(x.double())
    assert (y - exact).abs().max() <= 2 * (plain - exact).abs().max() + 1e-3 * exact.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_train_step_of_resnet18_runs_fused_and_right(dtype):
    torch.manual_seed(0)
    model = resnet_fused.resnet18(num_classes=10, zero_init_residual=True).to(DEVICE).train()
    x, target = torch.randn(8, 3, 32, 32, device=DEVICE), torch.arange(8, device=DEVICE)

    def step(model, x, dtype=dtype):
        with torch.autocast("cuda", dtype, enabled=dtype == torch.float16):
            loss = nn.functional.cross_entropy(model(x), target)
        loss.backward()
        found = {"loss": loss, **{name: p.grad for name, p in model.named_parameters()}}
        return found | {name: b for name, b in model.named_buffers() if b.is_floating_point()}

    twins = [copy.deepcopy(model) for _ in range(2)]
    ours = step(model, x)
    with resnet_fused.backend("eager"):
        plain = step(twins[0], x)
        exact = step(twins[1].double(), x.double(), torch.float64)
    assert_step_within(ours, plain, exact, dtype)
    assert not any("eager" in name for row in resnet_fused.explain(model, x) for name in row.ran)


def test_predict_and_bench(tmp_path, capsys, monkeypatch):
    set_precision("tf32")  # what users run, and what is quick to emulate
    monkeypatch.setattr(Network, "views", lambda _: center(RESIZE, SIZE))
    photo, weights = tmp_path / "photo.jpg", tmp_path / "resnet18.pth"
    Image.effect_noise((300, 200), 50).convert("RGB").save(photo)
    torch.manual_seed(0)
    torch.save(resnet_fused.resnet18().state_dict(), weights)
    predict = ["predict", "--model", "resnet18", "--weights", str(weights), "--json", str(photo)]
    found = []
    for device in ("cuda", "cpu"):
        assert main([*predict, "--device", device]) == 0
        found.append(json.loads(capsys.readouterr().out))
    on_gpu, on_cpu = ([row["class"] for row in result["images"][0]["top"]] for result in found)
    assert on_gpu == on_cpu

    arguments = ["bench", "--device", "cuda", "--model", "resnet18", "--batch", "2", "--rounds", "2"]
    arguments += ["--image-size", str(SIZE), "--dtype", "float16", "--variants", "torchvision-nhwc,resnet_fused"]
    assert main(arguments) == 0
    assert "resnet_fused" in capsys.readouterr().out


def test_ddp_over_one_process_follows_the_bare_model(monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    dist.init_process_group("gloo", rank=0, world_size=1)
    try:
        torch.manual_seed(0)
        bare = resnet_fused.ResNet(resnet_fused.BasicBlock, [1, 1, 1, 1], num_classes=5).to(DEVICE).train()
        wrapped = DistributedDataParallel(copy.deepcopy(bare), device_ids=[0])
        x = torch.randn(4, 3, 33, 33, device=DEVICE)
        for model in (bare, wrapped):
            model(x).square().sum().backward()
        for p, q in zip(bare.parameters(), wrapped.module.parameters(), strict=True):
            assert torch.equal(p.grad, q.grad)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("backend", ["auto", "triton"])
@pytest.mark.parametrize("training", [False, True])
def test_a_compiled_model_follows_the_plain_one(training, backend):
    """In `auto` the fused operators are compiled without gradients, what needs them is PyTorch's own."""
    torch.manual_seed(0)
    model = resnet_fused.ResNet(resnet_fused.BasicBlock, [1, 1, 1, 1], num_classes=5).to(DEVICE).train(training)
    model.requires_grad_(training or backend != "auto")
    x = torch.randn(4, 3, 33, 33, device=DEVICE)
    compiled = torch.compile(copy.deepcopy(model), backend="aot_eager", fullgraph=True)
    results = []
    plainly = "eager" if training and backend == "auto" else backend
    for name, forward in ((plainly, model), (backend, compiled)):
        with resnet_fused.backend(name):
            y = forward(x)
        if y.requires_grad:
            y.square().sum().backward()
        results.append([y, *(p.grad for p in forward.parameters() if p.grad is not None)])
    for ours, other in zip(*results, strict=True):
        torch.testing.assert_close(ours, other)


def test_an_exported_model_gives_the_same_numbers():
    torch.backends.cudnn.allow_tf32 = False  # the one setting of it that torch.export takes
    torch.manual_seed(0)
    model = spread(resnet_fused.ResNet(resnet_fused.BasicBlock, [1, 1, 1, 1], num_classes=5)).to(DEVICE).eval()
    x = torch.randn(2, 3, 33, 33, device=DEVICE)
    with torch.no_grad():
        torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), model(x))
