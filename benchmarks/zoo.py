"""Verify `fuse` on models that nobody here wrote, and print the table of what it finds in them.

    python benchmarks/zoo.py                        # all; some ten minutes on two cores of a machine without a GPU
    python benchmarks/zoo.py resnet50 timm/dla34    # these
    python benchmarks/zoo.py --table ZOO.md         # write the table there

On the CPU a fused model runs its own forwards; here the rewritten ones run, on PyTorch's operators. Outputs, gradients
and running statistics of a train step and the outputs in eval mode have to be the original's to the bit.
"""

import argparse
import contextlib
import copy
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import resnet_fused
from resnet_fused.fuse import forward

TORCHVISION = (  # every classification model of torchvision's with BN, the large ones of a family by the same code
    *("resnet18", "resnet34", "resnet50", "resnet101", "resnet152"),
    *("resnext50_32x4d", "resnext101_32x8d", "resnext101_64x4d", "wide_resnet50_2", "wide_resnet101_2"),
    *("densenet121", "densenet161", "densenet169", "densenet201", "googlenet", "inception_v3"),
    *("efficientnet_b0", "efficientnet_b1", "efficientnet_b2", "efficientnet_b3", "efficientnet_b4"),
    *("efficientnet_b5", "efficientnet_b6", "efficientnet_b7"),
    *("efficientnet_v2_s", "efficientnet_v2_m", "efficientnet_v2_l", "maxvit_t"),
    *("mnasnet0_5", "mnasnet0_75", "mnasnet1_0", "mnasnet1_3"),
    *("mobilenet_v2", "mobilenet_v3_small", "mobilenet_v3_large"),
    *("regnet_x_400mf", "regnet_x_800mf", "regnet_x_1_6gf", "regnet_x_3_2gf", "regnet_x_8gf", "regnet_x_16gf"),
    *("regnet_x_32gf", "regnet_y_400mf", "regnet_y_800mf", "regnet_y_1_6gf", "regnet_y_3_2gf", "regnet_y_8gf"),
    *("regnet_y_16gf", "regnet_y_32gf", "regnet_y_128gf"),
    *("shufflenet_v2_x0_5", "shufflenet_v2_x1_0", "shufflenet_v2_x1_5", "shufflenet_v2_x2_0"),
    *("vgg11_bn", "vgg13_bn", "vgg16_bn", "vgg19_bn"),
)
DETECTION = ("fasterrcnn_resnet50_fpn", "fasterrcnn_resnet50_fpn_v2", "retinanet_resnet50_fpn", "maskrcnn_resnet50_fpn")
SEGMENTATION = ("deeplabv3_resnet50", "deeplabv3_resnet101", "fcn_resnet50", "fcn_resnet101")
TIMM = {  # family: models
    "resnet": ("resnet18", "resnet50d", "resnet26t", "resnetblur50", "seresnet50", "ecaresnet26t", "resnetrs50"),
    "resnext": ("resnext26ts", "seresnext26d_32x4d"),
    "resnetv2": ("resnetv2_50",),
    "resnest": ("resnest14d",),
    "res2net": ("res2net50_14w_8s",),
    "sknet": ("skresnet18",),
    "densenet": ("densenet121", "densenetblur121d"),
    "dla": ("dla34", "dla46x_c"),
    "dpn": ("dpn48b",),
    "hrnet": ("hrnet_w18_small",),
    "regnet": ("regnetx_002", "regnety_002", "regnetz_005"),
    "repvgg": ("repvgg_a0",),
    "vgg": ("vgg11_bn",),
    "efficientnet": ("efficientnet_b0", "efficientnet_lite0", "mobilenetv2_050", "mnasnet_small", "fbnetc_100"),
    "tinynet": ("tinynet_e",),
    "mobilenetv3": ("mobilenetv3_small_050", "lcnet_050", "hardcorenas_a"),
    "ghostnet": ("ghostnet_050", "ghostnetv2_100"),
    "mixnet": ("mixnet_s",),
    "rexnet": ("rexnet_100",),
    "cspnet": ("cspresnet50", "cspdarknet53", "darknet53"),
    "vovnet": ("ese_vovnet19b_dw", "vovnet39a"),
    "selecsls": ("selecsls42b",),
    "xception": ("legacy_xception", "xception41"),
    "inception": ("inception_v3", "inception_v4", "inception_resnet_v2"),
    "senet": ("legacy_seresnet18", "legacy_seresnext26_32x4d"),
    "hgnet": ("hgnetv2_b0",),
    "byobnet": ("gernet_s", "mobileone_s0", "gcresnet33ts"),
    "repvit": ("repvit_m0_9",),
    "starnet": ("starnet_s1",),
    "visformer": ("visformer_tiny",),
    "efficientvit": ("efficientvit_b0",),
    "tresnet": ("tresnet_m",),
}
SIZES = {"inception_v3": 299, "inception_v4": 128, "inception_resnet_v2": 128, "googlenet": 64, "maxvit_t": 224}
SIZES |= {"visformer_tiny": 224, "legacy_xception": 128, "hrnet_w18_small": 64, "tresnet_m": 64}


class Row(NamedTuple):
    """What was found in one model, and what was wrong, or None."""

    model: str
    found: int
    fused: int
    why: tuple[str, ...]  # the chains that are left
    wrong: str | None
    seconds: float


def names() -> list[str]:
    """Of every model; those of timm with `timm/` in front."""
    timm = [f"timm/{name}" for models in TIMM.values() for name in models]
    return [*TORCHVISION, *DETECTION, *SEGMENTATION, *timm]


def build(name: str) -> nn.Module:
    """The model of that name, its weights drawn from a seed."""
    torch.manual_seed(0)
    if name.startswith("timm/"):
        import timm

        return timm.create_model(name.removeprefix("timm/"), pretrained=False, num_classes=10)
    import torchvision

    options: dict[str, Any] = {"weights": None, "num_classes": 10}
    if name in DETECTION:
        options |= {"weights_backbone": None, "min_size": 64, "max_size": 64, "trainable_backbone_layers": 5}
    elif name in SEGMENTATION:
        options |= {"weights_backbone": None, "aux_loss": True}
    elif name in ("googlenet", "inception_v3"):
        options |= {"aux_logits": name != "googlenet", "init_weights": False}
    return torchvision.models.get_model(name, **options)


def inputs(name: str) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """The arguments of a call in train mode and in eval mode."""
    generator = torch.Generator().manual_seed(1)
    size = SIZES.get(name.removeprefix("timm/"), 64)
    images = torch.randn(2, 3, size, size, generator=generator)
    if name not in DETECTION:
        return (images,), (images,)
    target = {"boxes": torch.tensor([[4.0, 4.0, 40.0, 44.0]]), "labels": torch.tensor([1])}
    target["masks"] = torch.zeros(1, size, size, dtype=torch.uint8)
    target["masks"][0, 4:44, 4:40] = 1
    return (list(images), [dict(target) for _ in images]), (list(images),)


def results(model: nn.Module, name: str, train: tuple[Any, ...], eval_: tuple[Any, ...]) -> dict[str, Tensor]:
    """Outputs, gradients and buffers of a train step, then outputs in eval mode."""
    found: dict[str, Tensor] = {}
    torch.manual_seed(2)
    returned = model.train()(*train)
    outputs = tensors(returned)
    found["the type of what is returned"] = kinds(returned)
    found |= {f"train output {i}": t.detach() for i, t in enumerate(outputs)}
    generator = torch.Generator().manual_seed(3)
    torch.stack([(t * torch.randn(t.shape, generator=generator)).sum() for t in outputs]).sum().backward()
    found |= {f"gradient of {n}": p.grad for n, p in model.named_parameters() if p.grad is not None}
    found |= {f"buffer {n}": b.clone() for n, b in model.named_buffers()}
    with torch.no_grad():
        found |= {f"eval output {i}": t for i, t in enumerate(tensors(model.eval()(*eval_)))}
    return found


def kinds(outputs: Any) -> Tensor:
    """The containers around the outputs, as characters."""
    names = [type(outputs).__name__, *(outputs if isinstance(outputs, dict) else ())]
    return torch.tensor(list(" ".join(map(str, names)).encode()))


def tensors(outputs: Any) -> list[Tensor]:
    return [t for t in tree_leaves(outputs) if isinstance(t, Tensor)]


def check(name: str, compare: Callable[[dict[str, Tensor], dict[str, Tensor]], str | None] | None = None) -> Row:
    """Fuse the model of that name and compare it with itself."""
    start = time.perf_counter()
    original = build(name)
    model, report = resnet_fused.fuse(copy.deepcopy(original), report=True)
    wrong = compared(original, model, name, compare or differs)
    why = tuple(dict.fromkeys(c.why for c in report.left))
    return Row(name, len(report), len(report.fused), why, wrong, time.perf_counter() - start)


def compared(original: nn.Module, model: nn.Module, name: str, compare: Callable[..., str | None]) -> str | None:
    expected = results(original, name, *inputs(name))
    with rewritten():
        found = results(model, name, *inputs(name))
    return compare(found, expected)


@contextlib.contextmanager
def rewritten():
    """The graphs run on the CPU, too."""
    before, forward.always = forward.always, True
    try:
        yield
    finally:
        forward.always = before


def differs(found: dict[str, Tensor], expected: dict[str, Tensor]) -> str | None:
    """What is not the same to the bit, or None."""
    if found.keys() != expected.keys():
        return f"{sorted(found.keys() ^ expected.keys())} in one of them only"
    for key, e in expected.items():
        f = found[key]
        if f.dtype != e.dtype or f.stride() != e.stride() or not torch.equal(torch.nan_to_num(f), torch.nan_to_num(e)):
            return key
    return None


def table(rows: Iterable[Row]) -> str:
    rows = list(rows)
    lines = ["| model | chains found | fused | left | why |", "| --- | --- | --- | --- | --- |"]
    for r in rows:
        why = "; ".join(r.why).replace("|", "\\|") + (f" WRONG: {r.wrong}" if r.wrong else "")
        lines.append(f"| `{r.model}` | {r.found} | {r.fused} | {r.found - r.fused} | {why} |")
    return "\n".join(lines)


def versions() -> str:
    from importlib.metadata import version

    return ", ".join(f"{name} {version(name)}" for name in ("torch", "torchvision", "timm"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", help="default: all")
    parser.add_argument("--table", type=Path, help="write the table, in Markdown, into this file")
    args = parser.parse_args()
    rows: list[Row] = []
    for name in args.models or names():
        try:
            row = check(name)
        except Exception as error:  # whatever stops one model, the others are still checked
            row = Row(name, 0, 0, (), f"{type(error).__name__}: {str(error).splitlines()[0]}", 0.0)
        rows.append(row)
        state = f"WRONG: {row.wrong}" if row.wrong else "the same bits"
        print(
            f"{name}: {row.found} chains, {row.fused} fused, {state}, {row.seconds:.0f} s", file=sys.stderr, flush=True
        )
    text = table(rows)
    print(text)
    if args.table:
        args.table.write_text(HEAD.format(versions()) + text + "\n")
    return 1 if any(r.wrong for r in rows) else 0


HEAD = """# What `fuse` finds

`python benchmarks/zoo.py --table benchmarks/ZOO.md` made this table, with {}. A chain is a BN and what stands around
it. Every model was compared with itself fused, in train and eval mode, on the CPU: outputs, gradients and running
statistics are the same bits.

"""

if __name__ == "__main__":
    sys.exit(main())
