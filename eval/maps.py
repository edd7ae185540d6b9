"""Feature maps of images of any proportions, and the colours of their cells as a baseline.

Images keep their proportions: the short side is resized to P pixels, and both sides are rounded to a multiple that suits the
network.

Legend: `B` images in a batch, `H` x `W` pixels, `h` x `w` positions of a map, `F` channels.
"""

import sys
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from fkd_ssl.arrays import Int64Array
from fkd_ssl.errors import FkdError, ImageError
from fkd_ssl.eval.features import frozen
from fkd_ssl.eval.masks import Masked
from fkd_ssl.eval.views import View, load
from fkd_ssl.images import ImageSource
from fkd_ssl.progress import bar_disabled

Maps = Callable[[Tensor], Tensor]
"""Maps uint8 [B, 3, H, W] on the CPU to float [B, h, w, F] on any device; normalises and moves the pixels itself."""
COLOURS = 8
"""Dimensions of the baseline: mean and deviation of red, green and blue in a cell, and its place."""
_FORWARD = 16  # images that the network gets at once


def multiple_of(network: nn.Module) -> int:
    """The multiple that the sides of images are rounded to: 32, or the largest multiple of the patch below it (28 for 14)."""
    strides = [max(part.stride) for part in network.modules() if isinstance(part, nn.Conv2d)]
    patch = max(strides, default=1)
    return patch * max(1, 32 // patch)


def resized(size: tuple[int, int], pixels: int, multiple: int) -> tuple[int, int]:
    """Height and width of an image as the network sees it.

    >>> resized((360, 480), 224, 32)
    (224, 288)
    """
    height, width = (multiple * max(1, round(side * pixels / min(size) / multiple)) for side in size)
    return height, width


class _Resized(Dataset[View]):
    """Images, resized."""

    def __init__(self, images: ImageSource, sizes: dict[int, tuple[int, int]]) -> None:
        self.images, self.sizes = images, sizes

    def __getitem__(self, index: int) -> View:
        """The pixels uint8 [3, H, W] of image `index`."""
        try:
            image = torch.from_numpy(self.images.pixels(index)).permute(2, 0, 1)
        except ImageError as error:
            return error
        view = functional.interpolate(image[None], self.sizes[index], mode="bilinear", antialias=True)
        return view[0].contiguous(memory_format=torch.preserve_format), index


def extract(
    model: Maps,
    data: Masked,
    rows: Int64Array,
    *,
    pixels: int,
    multiple: int,
    workers: int,
    progress: bool,
    desc: str,
    skipped: set[str] | None = None,
) -> Iterator[tuple[int, tuple[int, int], dict[str, Tensor]]]:
    """For each image in `rows`, by size: its index, h and w, and its positions, float32 on the CPU, see `_Example`.

    `skipped` collects the error message of each damaged image, which is left out; if it is None, the first error is raised.

    Raises:
        ImageError: An image is damaged and `skipped` is None, or all images are damaged.
        FkdError: The model's output is not a finite map.
    """
    sizes = {int(row): resized(data.sizes[row], pixels, multiple) for row in rows}
    by_size: dict[tuple[int, int], list[int]] = {}
    for row, size in sizes.items():
        by_size.setdefault(size, []).append(row)
    batches = [same[first : first + _FORWARD] for same in by_size.values() for first in range(0, len(same), _FORWARD)]
    read = 0
    with (
        frozen(model),
        tqdm(total=len(rows), desc=desc, unit="img", file=sys.stderr, disable=bar_disabled(show=progress)) as bar,
    ):
        for views, indices in load(_Resized(data.images, sizes), batches, workers=workers, skipped=skipped, bar=bar):
            if not len(indices):
                continue
            read += len(indices)
            with torch.no_grad():
                maps = checked(model(views), len(views)).cpu()
            h, w = maps.shape[1:3]
            colours = _colours(views, h, w)
            for index, found, colour in zip(indices.tolist(), maps, colours, strict=True):
                if not found.isfinite().all():
                    raise FkdError(f"the model returned NaN or infinity for {data.images.names[index]!r}")
                # clones can be used by autograd, which the output of a model in inference mode cannot
                yield index, (h, w), {"model": found.flatten(0, 1).clone(), "colours": colour}
            bar.update(len(indices))
    if not read:
        raise ImageError(f"{data.images.spec}: none of its {len(rows)} images can be read")


def checked(output: object, images: int) -> Tensor:
    """Returns a model's output as float32 [B, h, w, F]; raises FkdError if it is something else."""
    right = isinstance(output, Tensor) and output.ndim == 4 and len(output) == images and output.is_floating_point()
    if not right:
        what = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise FkdError(f"the model returned {what} for {images} images: expected maps, floats [B, h, w, F]")
    assert isinstance(output, Tensor)
    return output.detach().float()


def _colours(views: Tensor, h: int, w: int) -> Tensor:
    """The baseline's positions of images uint8 [B, 3, H, W]: [B, h w, COLOURS], about from -1/2 to 1/2."""
    values = views.float() / 255 - 0.5
    mean, square = (functional.adaptive_avg_pool2d(part, (h, w)) for part in (values, values**2))
    deviation = (square - mean**2).clamp(min=0).sqrt()
    y, x = torch.meshgrid((torch.arange(h) + 0.5) / h - 0.5, (torch.arange(w) + 0.5) / w - 0.5, indexing="ij")
    place = torch.stack([y, x]).expand(len(views), 2, h, w)
    return torch.cat([mean, deviation, place], dim=1).flatten(2).transpose(1, 2).contiguous()
