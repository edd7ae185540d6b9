"""Mixup and CutMix: mix pairs of crops of a batch and their class probabilities."""

import torch
from torch import Tensor


class Mixing:
    """Mixes each crop of a batch with another crop of the batch, possibly of the same image.

    Mixup (Zhang et al., ICLR 2018, arXiv 1710.09412, eq. 1) averages the pixels; CutMix (Yun et al., ICCV 2019, arXiv
    1905.04899, eq. 1 and 2) replaces a rectangle. If both are enabled, each batch uses one of them at random. The share of the
    first crop is drawn from Beta(a, a) once per batch, as in the code of both papers, with torch's global generator.

    Args:
        mixup: a of mixup; 0 disables it.
        cutmix: a of CutMix; 0 disables it.
    """

    def __init__(self, mixup: float, cutmix: float) -> None:
        self.mixup = mixup
        self.cutmix = cutmix

    def __call__(self, images: Tensor, targets: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Returns mixed crops [B M, 3, P, P], float32 (mixup) or uint8 (CutMix), and each teacher's targets [B M, K]."""
        other = torch.randperm(len(images)).to(images.device, non_blocking=True)
        if self.mixup and (not self.cutmix or torch.rand(()) < 0.5):
            share = _beta(self.mixup)
            images = torch.lerp(images[other].float(), images.float(), share)
        else:
            top, bottom, left, right = rectangle(images.shape[2], images.shape[3], _beta(self.cutmix))
            share = 1 - (bottom - top) * (right - left) / (images.shape[2] * images.shape[3])
            mixed = images.clone(memory_format=torch.preserve_format)
            mixed[:, :, top:bottom, left:right] = images[other, :, top:bottom, left:right]
            images = mixed
        return images, [torch.lerp(target[other], target, share) for target in targets]


def rectangle(height: int, width: int, share: float) -> tuple[int, int, int, int]:
    """Draws a rectangle (top, bottom, left, right) of 1 - `share` of the area at a uniform centre, clipped to the image."""
    side = (1 - share) ** 0.5
    half_height, half_width = int(height * side) // 2, int(width * side) // 2
    y, x = int(torch.randint(height, ())), int(torch.randint(width, ()))
    return max(0, y - half_height), min(height, y + half_height), max(0, x - half_width), min(width, x + half_width)


def _beta(a: float) -> float:
    return float(torch.distributions.Beta(a, a).sample())
