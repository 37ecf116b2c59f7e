"""Fused models in trainers and adapters: three steps each, with the losses of the model as it was."""

import copy

import pytest
import torch
import torch.nn.functional as F
import torchvision
import zoo

import resnet_fused

X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
MISSING = 'needs pip install ".[frameworks]"'
TARGET = torch.tensor([0, 1])


def net():
    torch.manual_seed(0)
    return torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=4)


def both(run):
    """The same run of the model and of the model fused, whose chains really run."""
    expected = run(net())
    with zoo.rewritten():
        found = run(resnet_fused.fuse(net()))
    assert found == expected and len(set(expected)) == 3  # the steps moved it; three say nothing of learning


def test_lightning(tmp_path):
    lightning = pytest.importorskip("lightning", reason=MISSING)

    class Module(lightning.LightningModule):
        def __init__(self, model):
            super().__init__()
            self.model, self.losses = model, []

        def training_step(self, batch):
            loss = F.cross_entropy(self.model(batch[0]), batch[1])
            self.losses.append(loss.item())
            return loss

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.05)

    def run(model):
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        trainer = lightning.Trainer(
            max_epochs=3, accelerator="cpu", enable_checkpointing=False, default_root_dir=tmp_path, **quiet
        )
        module = Module(model)
        data = torch.utils.data.TensorDataset(X, TARGET)
        trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=2))
        return module.losses

    both(run)


def test_accelerate():
    accelerate = pytest.importorskip("accelerate", reason=MISSING)

    def run(model):
        accelerator = accelerate.Accelerator(cpu=True)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        model, optimizer = accelerator.prepare(model, optimizer)
        losses = []
        for _ in range(3):
            loss = F.cross_entropy(model(X), TARGET)
            optimizer.zero_grad()
            accelerator.backward(loss)
            optimizer.step()
            losses.append(loss.item())
        return losses

    both(run)


def test_lora_on_a_fused_model():
    peft = pytest.importorskip("peft", reason=MISSING)
    config = peft.LoraConfig(r=2, target_modules=["conv1", "conv2"], modules_to_save=["fc"])

    def run(model):
        torch.manual_seed(1)
        model = peft.get_peft_model(model, config)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
        losses = []
        for _ in range(3):
            loss = F.cross_entropy(model(X), TARGET)
            optimizer.zero_grad(), loss.backward(), optimizer.step()
            losses.append(loss.item())
        merged = copy.deepcopy(model.double()).merge_and_unload().eval()
        torch.testing.assert_close(merged(X.double()), model.eval()(X.double()))
        return losses

    both(run)


def test_lora_before_fusing():
    peft = pytest.importorskip("peft", reason=MISSING)
    torch.manual_seed(1)
    adapted = peft.get_peft_model(net(), peft.LoraConfig(r=2, target_modules=["conv2"], modules_to_save=["fc"])).eval()
    expected = adapted(X)
    fused, report = resnet_fused.fuse(adapted, report=True)
    with zoo.rewritten():
        assert torch.equal(fused(X), expected)
    assert {"layer1.0.bn2": "BatchNorm2d + add + ReLU"}.items() <= {
        c.layer[17:]: c.modules for c in report.fused
    }.items()
