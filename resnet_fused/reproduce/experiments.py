"""Which networks a figure or table of the papers compares, how they are trained and looked at, and what was published.

`fig1` to `table6` are those of He et al., "Deep Residual Learning for Image Recognition",
https://arxiv.org/abs/1512.03385; `v2-...` those of "Identity Mappings in Deep Residual Networks",
https://arxiv.org/abs/1603.05027. Errors are in percent.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Error = dict[str, float]  # "top1" and "top5"


@dataclass(frozen=True)
class Family:
    """Networks that differ in depth alone."""

    label: str  # of a depth
    model: str  # of a depth
    depths: tuple[int, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)

    def network(self, depth: int) -> "Network":
        return Network(self.label.format(depth), self, depth, self.model.format(depth), self.kwargs)


@dataclass(frozen=True)
class Network:
    """One line of a figure or row of a table."""

    label: str
    family: Family
    depth: int
    model: str
    kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Experiment:
    """A figure or table.

    Attributes:
        figure: what is drawn: training error beside test error ("splits"), both in one of several panels, the test
            error over the training loss ("loss"), or the layers' responses; None: nothing, a table.
        panels: title, families and depths of each; no depths: all.
        twins: a depth is taken only where every family has it.
        look: how the trained networks are looked at: by the evaluations of the training ("curves"), by ten crops,
            several scales, their ensemble, a crop of 320, or the responses of their layers.
        paper: the published errors by label.
        note: what differs from the paper.
    """

    title: str
    recipe: Literal["cifar", "imagenet", "none"]
    families: tuple[Family, ...]
    depths: tuple[int, ...]  # by default
    figure: Literal["splits", "panels", "loss", "responses"] | None = None
    panels: tuple[tuple[str, tuple[Family, ...], tuple[int, ...]], ...] = ()
    twins: bool = False
    look: Literal["curves", "ten crops", "scales", "ensemble", "crop 320", "responses", "architecture"] = "curves"
    paper: dict[str, Error] = field(default_factory=dict)
    note: str = ""

    def networks(self, depths: Sequence[int] | None = None) -> tuple[list[Network], list[str]]:
        """The networks of these depths, and a line for each depth that is skipped.

        Raises:
            ValueError: a depth that no family has, or none of which anything is left.
        """
        known = sorted({depth for family in self.families for depth in family.depths})
        chosen = list(dict.fromkeys(self.depths if depths is None else depths))
        if unknown := [depth for depth in chosen if depth not in known]:
            raise ValueError(f"--depths must be out of {', '.join(map(str, known))} for {self.title}, got {unknown[0]}")
        skipped = {
            depth: f"depth {depth} is skipped: there is no {family.label.format(depth)} to compare with"
            for depth in (chosen if self.twins else ())
            for family in self.families
            if depth not in family.depths
        }
        if chosen and not set(chosen) - set(skipped):
            raise ValueError(f"--depths leave nothing of {self.title}: {'; '.join(skipped.values())}")
        found = [f.network(d) for f in self.families for d in chosen if d in f.depths and d not in skipped]
        return found, list(skipped.values())


def _top1(errors: dict[str, float]) -> dict[str, Error]:
    return {label: {"top1": error} for label, error in errors.items()}


def _top5(errors: dict[str, tuple[float, float]]) -> dict[str, Error]:
    return {label: {"top1": top1, "top5": top5} for label, (top1, top5) in errors.items()}


_PLAIN = Family("plain-{}", "cifar_plain{}", (20, 32, 44, 56, 110))
_PLAIN_TO_56 = Family("plain-{}", "cifar_plain{}", (20, 32, 44, 56))  # figure 7 has no plain-110
_RESNET = Family("ResNet-{}", "cifar_resnet{}", (20, 32, 44, 56, 110, 1202))
_ORIGINAL = Family("ResNet-{}, original", "cifar_resnet{}", (110, 164, 1001))
_PREACT = Family("ResNet-{}, pre-activation", "cifar_preact_resnet{}", (110, 164, 1001))
_V1 = {"stride_in_1x1": True}
_BIG_PLAIN = Family("plain-{}", "plain{}", (18, 34))
_BIG_A = Family("ResNet-{}", "resnet{}", (18, 34, 50, 101, 152), {"shortcut": "A"})  # figure 4 and table 2
_OPTIONS = tuple(Family(f"ResNet-{{}} {o}", "resnet{}", (34,), {"shortcut": o}) for o in ("A", "B", "C"))
_BOTTLENECKS = Family("ResNet-{}", "resnet{}", (50, 101, 152), _V1)
_TABLE1 = Family("ResNet-{}", "resnet{}", (18, 34))
_BIG_ORIGINAL = Family("ResNet-{}, original", "resnet{}", (152,), _V1)
_BIG_PREACT = Family("ResNet-{}, pre-activation", "preact_resnet{}", (152, 200), _V1)

_CIFAR = {"ResNet-20": 8.75, "ResNet-32": 7.51, "ResNet-44": 7.17, "ResNet-56": 6.97, "ResNet-110": 6.43}
_CIFAR |= {"ResNet-1202": 7.93}
_V2_CIFAR = {"ResNet-110, original": 6.61, "ResNet-164, original": 5.93, "ResNet-1001, original": 7.61}
_V2_CIFAR |= {"ResNet-110, pre-activation": 6.37, "ResNet-164, pre-activation": 5.46}
_V2_CIFAR |= {"ResNet-1001, pre-activation": 4.92}

EXPERIMENTS = {
    "fig1": Experiment(
        "figure 1: deeper plain networks train worse, CIFAR-10", "cifar", (_PLAIN,), (20, 56), figure="splits"
    ),
    "fig4": Experiment(
        "figure 4: plain networks and ResNets while they train, ImageNet",
        "imagenet",
        (_BIG_PLAIN, _BIG_A),
        (18, 34),
        figure="panels",
        panels=(("plain", (_BIG_PLAIN,), ()), ("ResNet", (_BIG_A,), ())),
        twins=True,
        note="evaluated on the centre crop",
    ),
    "fig6": Experiment(
        "figure 6: plain networks and ResNets while they train, CIFAR-10",
        "cifar",
        (_PLAIN, _RESNET),
        (20, 32, 44, 56, 110, 1202),
        figure="panels",
        panels=(
            ("plain", (_PLAIN,), ()),
            ("ResNet", (_RESNET,), (20, 32, 44, 56, 110)),
            ("ResNet-110 and ResNet-1202", (_RESNET,), (110, 1202)),
        ),
        paper=_top1(_CIFAR),
    ),
    "fig7": Experiment(
        "figure 7: standard deviation of the layers' responses, CIFAR-10",
        "cifar",
        (_PLAIN_TO_56, _RESNET),
        (20, 56, 110),
        look="responses",
        figure="responses",
        note="after BN and before the nonlinearity",
    ),
    "table1": Experiment(
        "table 1: architectures for ImageNet",
        "none",
        (_TABLE1, _BOTTLENECKS),
        (18, 34, 50, 101, 152),
        look="architecture",
    ),
    "table2": Experiment(
        "table 2: top-1 error of plain networks and ResNets, ImageNet, 10 crops",
        "imagenet",
        (_BIG_PLAIN, _BIG_A),
        (18, 34),
        twins=True,
        look="ten crops",
        paper=_top1({"plain-18": 27.94, "plain-34": 28.54, "ResNet-18": 27.88, "ResNet-34": 25.03}),
    ),
    "table3": Experiment(
        "table 3: errors on ImageNet, 10 crops",
        "imagenet",
        (_BIG_PLAIN, *_OPTIONS, _BOTTLENECKS),
        (34, 50, 101, 152),
        look="ten crops",
        paper=_top5(
            {
                "plain-34": (28.54, 10.02),
                "ResNet-34 A": (25.03, 7.76),
                "ResNet-34 B": (24.52, 7.46),
                "ResNet-34 C": (24.19, 7.40),
                "ResNet-50": (22.85, 6.71),
                "ResNet-101": (21.75, 6.05),
                "ResNet-152": (21.43, 5.71),
            }
        ),
    ),
    "table4": Experiment(
        "table 4: errors of single models on ImageNet, several scales",
        "imagenet",
        (*_OPTIONS[1:], _BOTTLENECKS),
        (34, 50, 101, 152),
        look="scales",
        paper=_top5(
            {
                "ResNet-34 B": (21.84, 5.71),
                "ResNet-34 C": (21.53, 5.60),
                "ResNet-50": (20.74, 5.25),
                "ResNet-101": (19.87, 4.60),
                "ResNet-152": (19.38, 4.49),
            }
        ),
    ),
    "table5": Experiment(
        "table 5: error of an ensemble on ImageNet, several scales",
        "imagenet",
        (*_OPTIONS[1:], _BOTTLENECKS),
        (34, 50, 101, 152),
        look="ensemble",
        paper={"ensemble": {"top5": 3.57}},
        note="the paper's ensemble is of six models, two of them ResNet-152, on the test set; this one on the "
        "validation set",
    ),
    "table6": Experiment(
        "table 6: test error of ResNets, CIFAR-10",
        "cifar",
        (_RESNET,),
        (20, 32, 44, 56, 110, 1202),
        paper=_top1(_CIFAR),
        note="the paper's ResNet-110 is the best of five runs, whose mean is 6.61",
    ),
    "v2-fig1": Experiment(
        "figure 1 of v2: original and pre-activation units while they train, CIFAR-10",
        "cifar",
        (_ORIGINAL, _PREACT),
        (1001,),
        figure="loss",
        twins=True,
        paper=_top1(_V2_CIFAR),
        note="the paper has medians of five runs",
    ),
    "v2-fig6": Experiment(
        "figure 6 of v2, right: original and pre-activation units while they train, CIFAR-10",
        "cifar",
        (_ORIGINAL, _PREACT),
        (164,),
        figure="loss",
        twins=True,
        paper=_top1(_V2_CIFAR),
        note="the paper has medians of five runs",
    ),
    "v2-table3": Experiment(
        "table 3 of v2: test error of original and pre-activation units, CIFAR-10",
        "cifar",
        (_ORIGINAL, _PREACT),
        (110, 164, 1001),
        twins=True,
        paper=_top1(_V2_CIFAR),
        note="the paper has medians of five runs",
    ),
    "v2-table5": Experiment(
        "table 5 of v2: errors on ImageNet, a crop of 320",
        "imagenet",
        (_BIG_ORIGINAL, _BIG_PREACT),
        (152, 200),
        look="crop 320",
        paper=_top5(
            {
                "ResNet-152, original": (21.3, 5.5),
                "ResNet-152, pre-activation": (21.1, 5.5),
                "ResNet-200, pre-activation": (20.7, 5.3),
            }
        ),
        note="by the schedule of the first paper; there is no original ResNet-200 here",
    ),
}
