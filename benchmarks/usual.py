"""The usual way of reading stored crops, for comparison: pickled labels, Pillow, float tensors, one crop at a time.

One label file per image has all its boxes, flips and fp32 targets. Pillow decodes an image; Pillow and torchvision cut,
resize, jitter, blur and flip every crop, which becomes a normalised float tensor.
"""

import random
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import ColorJitter, RandomResizedCrop
from torchvision.transforms import functional as F

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def write_labels(image: Path, label: Path, *, stored: int, dim: int, scale: tuple[float, float]) -> None:
    """Writes one pickled label file: fractional boxes [stored, 4], flips [stored], targets fp32 [stored, dim]."""
    with Image.open(image) as picture:
        boxes = [RandomResizedCrop.get_params(picture, list(scale), [3 / 4, 4 / 3]) for _ in range(stored)]
        width, height = picture.size
    fractions = np.float32(boxes) / np.float32([height, width, height, width])
    rng = np.random.default_rng(0)
    torch.save([fractions, rng.random(stored) < 0.5, rng.standard_normal((stored, dim), dtype=np.float32)], label)


class UsualCrops(Dataset[tuple[Tensor, Tensor]]):
    """`crops` stored crops per image, float [crops, 3, P, P], and their targets float [crops, D]."""

    def __init__(self, images: list[Path], labels: list[Path], *, crops: int, pixels: int, photometric: bool) -> None:
        self.images = images
        self.labels = labels
        self.crops = crops
        self.pixels = pixels
        self.photometric = photometric

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        # our own files; unpickling them is part of what is measured
        boxes, flips, targets = torch.load(self.labels[index], weights_only=False)
        with Image.open(self.images[index]) as file:
            picture = file.convert("RGB")
        chosen = torch.randperm(len(targets))[: self.crops].tolist()
        views = [self._crop(picture, boxes[k], bool(flips[k])) for k in chosen]
        return torch.stack(views), torch.from_numpy(targets[chosen])

    def _crop(self, picture: Image.Image, box: np.ndarray, flip: bool) -> Tensor:
        top, left, height, width = (box * ([picture.height, picture.width] * 2)).tolist()
        crop = picture.crop((left, top, left + width, top + height))
        crop = crop.resize((self.pixels, self.pixels), Image.Resampling.BILINEAR)
        if self.photometric:
            if random.random() < 0.8:
                crop = ColorJitter(0.4, 0.4, 0.4, 0.1)(crop)
            if random.random() < 0.2:
                crop = F.rgb_to_grayscale(crop, 3)
            if random.random() < 0.5:
                crop = crop.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0)))
        if flip:
            crop = F.hflip(crop)
        return F.normalize(F.to_tensor(crop), MEAN, STD)
