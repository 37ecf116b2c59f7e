"""Augmentation: a batch's crops and flips on its device, and ImageNet's transforms."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms import v2

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PAD = 4


def crop_flip(x: Tensor, offsets: Tensor, flips: Tensor) -> Tensor:
    """Every image padded by `PAD` zeros, cropped to its size at its own offset, and mirrored where its flip is set.

    v2's crops and flips are the same for a whole batch.

    Args:
        x: [N, C, H, W].
        offsets: int64 [N, 2], row and column between 0 and 2 * PAD.
        flips: bool [N].

    Returns:
        [N, C, H, W] in channels_last.
    """
    n, _, h, w = x.shape
    column = torch.arange(w, device=x.device)
    rows = offsets[:, :1] + torch.arange(h, device=x.device)  # [N, H]
    columns = offsets[:, 1:] + torch.where(flips[:, None], column.flip(0), column)  # [N, W]
    image = torch.arange(n, device=x.device)[:, None, None]
    padded = F.pad(x, (PAD,) * 4).permute(0, 2, 3, 1)
    return padded[image, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


class Lighting(v2.Transform):
    """AlexNet's colour augmentation: shifts along the principal components of ImageNet's colours.

    Krizhevsky et al., 2012, section 4.1; the components are those that fb.resnet.torch publishes for colours in [0, 1].
    """

    eigenvalues = (0.2175, 0.0188, 0.0045)
    eigenvectors = ((-0.5675, 0.7192, 0.4009), (-0.5808, -0.0045, -0.8140), (-0.5836, -0.6948, 0.4203))

    def make_params(self, flat_inputs: list[Tensor]) -> dict[str, Tensor]:
        alpha = torch.randn(3) * 0.1
        return {"shift": torch.tensor(self.eigenvectors) @ (alpha * torch.tensor(self.eigenvalues))}

    def transform(self, inpt: Tensor, params: dict[str, Tensor]) -> Tensor:
        return inpt + params["shift"][:, None, None]


def imagenet_train() -> v2.Compose:
    """Short side drawn from [256, 480], a crop of 224, a flip, colours: PIL image or uint8 tensor -> [3, 224, 224]."""
    return v2.Compose(
        [
            v2.RandomShortestSize(list(range(256, 481))),
            v2.RandomCrop(224),
            v2.RandomHorizontalFlip(),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            Lighting(),
            v2.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
    )


def imagenet_eval() -> v2.Compose:
    """Short side 256, the centre 224: a PIL image or uint8 tensor -> [3, 224, 224]."""
    return v2.Compose(
        [
            v2.Resize(256),
            v2.CenterCrop(224),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
    )
