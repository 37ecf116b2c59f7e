"""Where the convolutions' weights lie: contiguous as torchvision's, in channels_last on a device that fuses."""

import copy
import pickle
import socket
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parameters_to_vector, prune, vector_to_parameters
from torchvision.models._utils import IntermediateLayerGetter

import resnet_fused
from resnet_fused.dispatch import registry
from resnet_fused.models import PreActBottleneck, PreActResNet

LAST = torch.channels_last
X = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
TARGET = torch.tensor([0, 1])


pytestmark = pytest.mark.usefixtures("one_thread")


def ours(**kwargs):
    torch.manual_seed(0)
    return resnet_fused.ResNet(resnet_fused.Bottleneck, [1, 1, 1, 1], num_classes=3, **kwargs)


def theirs():
    torch.manual_seed(0)
    return torchvision.models.ResNet(torchvision.models.resnet.Bottleneck, [1, 1, 1, 1], num_classes=3)


def weights(model):
    return [m.weight for m in model.modules() if isinstance(m, nn.Conv2d)]


def lie(tensors, last):
    """Whether all have exactly the strides of that layout, of sides of 1 too."""
    layout = LAST if last else torch.contiguous_format
    return all(t.stride() == torch.empty_like(t, memory_format=layout).stride() for t in tensors)


def step(model, device="cpu"):
    F.cross_entropy(model(X.to(device)), TARGET.to(device)).backward()
    return [w.grad for w in weights(model)]


# what wants contiguous weights, on the CPU


def test_vectors_and_views():
    model, other = ours(), theirs()
    vector = parameters_to_vector(model.parameters())
    assert torch.equal(vector, parameters_to_vector(other.parameters()))
    assert all(w.view(-1).data_ptr() == w.data_ptr() for w in weights(model))
    step(model)
    assert all(w.grad.view(-1).numel() for w in weights(model)) and lie(weights(model), False)
    vector_to_parameters(2 * vector, model.parameters())
    assert torch.equal(parameters_to_vector(model.parameters()), 2 * vector)


def test_pruning():
    pruned = []
    for model in (ours(), theirs()):
        model = model.eval()
        where = [(m, "weight") for m in model.modules() if isinstance(m, nn.Conv2d)]
        prune.global_unstructured(where, prune.L1Unstructured, amount=0.5)
        prune.ln_structured(model.fc, "weight", 1, n=1, dim=1)
        pruned.append(model(X))
    assert torch.equal(*pruned)


def test_safetensors(tmp_path):
    model = ours()
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    found = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(found[k], t) for k, t in model.state_dict().items())


def test_lbfgs():
    losses = []
    for model in (ours(), theirs()):
        model = model.eval()  # the same function in every closure
        optimizer = torch.optim.LBFGS(model.parameters(), lr=0.01, max_iter=2)

        def closure(model=model, optimizer=optimizer):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(X), TARGET)
            loss.backward()
            return loss

        losses.append([optimizer.step(closure).item() for _ in range(2)])
    assert losses[0] == losses[1] and losses[0][1] < losses[0][0]


@pytest.fixture
def process():
    """A process group of this process alone."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("views", [False, True])
def test_ddp_has_nothing_to_warn_of(process, views):
    always = torch.is_warn_always_enabled()
    torch.set_warn_always(True)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(2):
                step(DistributedDataParallel(ours(), gradient_as_bucket_view=views))
    finally:
        torch.set_warn_always(always)
    assert not [str(w.message) for w in caught if "strides" in str(w.message)]


@pytest.mark.parametrize(
    "change",
    [
        copy.deepcopy,
        lambda m: pickle.loads(pickle.dumps(m)),
        lambda m: m.half(),
        lambda m: m.to(torch.bfloat16).to("cpu"),
        lambda m: m.load_state_dict(theirs().to(memory_format=LAST).state_dict()) and m,
    ],
    ids=["deepcopy", "pickle", "half", "to", "load_state_dict"],
)
def test_another_layout_is_the_users(change):
    assert lie(weights(change(ours())), False)
    if "state_dict" not in change.__code__.co_names:
        assert lie(weights(change(ours().to(memory_format=LAST))), True)


# a device that fuses: PyTorch's one without memory


@pytest.fixture
def meta_fuses(monkeypatch):
    monkeypatch.setattr(registry, "_AUTO_DEVICES", ("meta",))


MODELS = {
    "resnet": ours,
    "preact": lambda **kwargs: PreActResNet(PreActBottleneck, [1, 1, 1, 1], **kwargs),
    "features": lambda **kwargs: resnet_fused.resnet50(features_only=True, out_indices=(1, 2), **kwargs),
    "cifar": lambda **kwargs: resnet_fused.models.cifar_resnet20(**kwargs),
}


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_weights_follow_the_device(make, meta_fuses):
    model = make()
    assert lie(weights(model), False)
    assert lie(weights(model.to("meta")), True)
    assert lie(weights(nn.Sequential(make()).to("meta")), True)
    assert lie(weights(model.to_empty(device="cpu")), False)
    fixed = make(channels_last=False).to("meta")
    assert lie(weights(fixed), False) and lie(weights(fixed.to(memory_format=LAST).to_empty(device="cpu")), True)
    with torch.device("meta"):
        assert lie(weights(make()), True) and lie(weights(make(channels_last=False)), False)


def test_only_a_change_of_the_device_lays_out(meta_fuses):
    model = ours().to("meta")
    assert lie(weights(model.to(memory_format=torch.contiguous_format).half()), False)
    model = ours().to(memory_format=LAST)
    assert lie(weights(model.double()), True) and lie(weights(model.to("meta")), True)


def test_blocks_of_a_backbone_in_other_hands(meta_fuses):
    body = IntermediateLayerGetter(ours(), {"layer4": "out"}).to("meta")
    assert lie([w for n, w in body.named_parameters() if n.startswith("layer") and w.dim() == 4], True)
    frozen = IntermediateLayerGetter(ours(channels_last=False), {"layer4": "out"}).to("meta")
    assert lie(weights(frozen), False)


def test_what_is_no_plain_weight_stays(meta_fuses):
    model = ours()
    nn.utils.parametrizations.weight_norm(model.layer1[0].conv2)
    prune.l1_unstructured(model.layer2[0].conv2, "weight", amount=0.5)
    model = model.to("meta")
    assert model.layer1[0].conv2.parametrizations.weight.original1.is_contiguous()
    assert model.layer2[0].conv2.weight_orig.is_contiguous() and lie([model.layer1[0].conv1.weight], True)


def test_what_is_forced_for_a_while_changes_no_layout(meta_fuses):
    with resnet_fused.backend("eager"):
        assert lie(weights(ours().to("meta")), True)
    with resnet_fused.backend("triton"):
        assert lie(weights(ours().half()), False)


# and a GPU


@pytest.mark.gpu
class TestOnAGpu:
    def test_there_and_back(self):
        model = ours()
        parameters, state = list(model.parameters()), copy.deepcopy(model.state_dict())
        step(model)
        assert lie(weights(model.cuda()), True) and lie([w.grad for w in weights(model)], True)
        assert all(p is q for p, q in zip(parameters, model.parameters(), strict=True))
        assert all(torch.equal(t.cpu(), state[k]) for k, t in model.state_dict().items() if k.endswith("weight"))
        assert lie(weights(model.half()), True) and lie(weights(model.to("cuda", torch.float32)), True)
        assert lie(weights(copy.deepcopy(model)), True) and lie(weights(pickle.loads(pickle.dumps(model))), True)
        assert lie(weights(model.cpu()), False) and lie([w.grad for w in weights(model)], False)
        assert lie(weights(ours(channels_last=False).cuda()), False)

    def test_made_there(self):
        with torch.device("cuda"):
            assert lie(weights(ours()), True)
        with torch.device("meta"):
            model = ours()
        assert lie(weights(model), False) and lie(weights(model.to_empty(device="cuda")), True)

    def test_state_dicts(self):
        model, state = ours().cuda(), theirs().state_dict()
        model.load_state_dict(state)
        assert lie(weights(model), True)
        assert all(torch.equal(t.cpu(), state[k]) for k, t in model.state_dict().items())
        with torch.device("meta"):
            model = ours()
        model.load_state_dict(state, assign=True)
        assert lie(weights(model), False) and model.conv1.weight.data_ptr() == state["conv1.weight"].data_ptr()
        assert lie(weights(model.cuda()), True)

    def test_gradients_lie_as_the_weights_do(self):
        for layout in (torch.contiguous_format, LAST):
            model = ours().cuda()
            F.cross_entropy(model(X.cuda().contiguous(memory_format=layout)), TARGET.cuda()).backward()
            assert all(w.grad.is_contiguous(memory_format=LAST) for w in weights(model))
            assert not model.layer1[0].conv2.weight.grad.is_contiguous()

    @pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.Adam])
    def test_an_optimizer_made_before(self, make):
        """With a state that was kept on the CPU, contiguous."""
        kwargs = {"momentum": 0.9} if make is torch.optim.SGD else {}
        kept, found = None, []
        for moved in (False, True):
            model = ours(zero_init_residual=True)
            optimizer = make(model.parameters(), 1e-3, **kwargs)
            step(model), optimizer.step(), optimizer.zero_grad()
            if moved:
                kept = copy.deepcopy(optimizer.state_dict())
                model.cuda()
                optimizer.load_state_dict(kept)
            device = "cuda" if moved else "cpu"
            losses = []
            for _ in range(2):
                loss = F.cross_entropy(model(X.to(device)), TARGET.to(device))
                loss.backward(), optimizer.step(), optimizer.zero_grad()
                losses.append(loss.item())
            found.append(torch.tensor(losses))
        torch.testing.assert_close(*found, rtol=1e-3, atol=0)

    def test_functional_call_takes_any_layout(self):
        model = ours().eval()
        state = {k: t.cuda() for k, t in model.state_dict().items()}
        with torch.no_grad():
            expected = model.cuda()(X.cuda())
            found = torch.func.functional_call(model, state, (X.cuda(),))
        torch.testing.assert_close(found, expected)
