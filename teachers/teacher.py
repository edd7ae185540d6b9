"""A frozen network that maps crops to targets."""

import re
from contextlib import AbstractContextManager
from typing import Any, Literal, Self, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fkd_ssl.arrays import Float32Array
from fkd_ssl.errors import FkdError, RequestError
from fkd_ssl.kinds import Kind
from fkd_ssl.teachers.presets import IMAGENET_MEAN, IMAGENET_STD, Rgb

Precision = Literal["fp32", "bf16", "fp16"]

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def _rgb(values: Any, what: str) -> Rgb:
    """Three numbers, however they came."""
    try:
        red, green, blue = (float(value) for value in values)
    except (TypeError, ValueError) as error:
        raise RequestError(f"{what} {values!r}: expected three numbers, of R, G and B in 0 to 1") from error
    return red, green, blue


class Teacher(nn.Module):
    """A backbone and a projection head, frozen, always in eval mode, with their own preprocessing.

    Args:
        backbone: Normalised floats [B, 3, H, W] to features [B, F].
        head: Features to embeddings [B, D].
        name: What a store's column is called by default.
        dim: D.
        feature_dim: F; D by default.
        network: The architecture in words.
        pixels: Native input size; other sizes work as far as the network does.
        mean: Of RGB in 0 to 1.
        std: Likewise.
        licence: Of the weights.
        source: Where the weights came from, a URL or module:function.
        checkpoint: Name of the file of weights, without its folder.
        checkpoint_sha256: Of that file.
        precision: fp32, or bf16 and fp16 by autocast. fp32 on a GPU is what PyTorch's own switches make of it: by default
            its convolutions use TF32.
        arrays: What a store keeps beside the targets, for instance `prototypes` float32 [K, D].
        kind: `embedding`: targets are L2-normalised vectors; `distribution`: class probabilities, the softmax of what the head
            gives.
    """

    _mean: Tensor
    _std: Tensor

    def __init__(
        self,
        backbone: nn.Module,
        head: nn.Module,
        *,
        name: str,
        dim: int,
        network: str,
        feature_dim: int | None = None,
        pixels: int = 224,
        mean: Rgb = IMAGENET_MEAN,
        std: Rgb = IMAGENET_STD,
        licence: str = "not stated",
        source: str | None = None,
        checkpoint: str | None = None,
        checkpoint_sha256: str | None = None,
        precision: Precision = "fp32",
        arrays: dict[str, Float32Array] | None = None,
        kind: Kind = "embedding",
    ) -> None:
        if precision not in ("fp32", *_AUTOCAST):
            raise RequestError(f"precision {precision!r}: expected fp32, {' or '.join(_AUTOCAST)}")
        if kind not in get_args(Kind):
            raise RequestError(f"teacher {name}: kind {kind!r}: expected {' or '.join(get_args(Kind))}")
        super().__init__()
        self.kind: Kind = kind
        self.backbone = backbone
        self.head = head
        self.name = name
        self.dim = dim
        self.feature_dim = dim if feature_dim is None else feature_dim
        self.network = network
        self.pixels = pixels
        self.mean = _rgb(mean, "mean")
        self.std = _rgb(std, "std")
        if min(self.std) <= 0:
            raise RequestError(f"teacher {name}: std {self.std}: must be positive")
        self.licence = licence or "not stated"
        self.source = None if source is None else str(source)
        self.checkpoint = None if checkpoint is None else str(checkpoint)
        self.checkpoint_sha256 = checkpoint_sha256
        self.precision = precision
        self.arrays = arrays or {}
        self.register_buffer("_mean", torch.tensor(self.mean).view(1, 3, 1, 1) * 255, persistent=False)
        self.register_buffer("_std", torch.tensor(self.std).view(1, 3, 1, 1) * 255, persistent=False)
        self.requires_grad_(False)
        self.to(memory_format=torch.channels_last)
        self.eval()

    def train(self, mode: bool = True) -> Self:
        """Stays in eval mode: a teacher is frozen."""
        return super().train(False)

    @torch.inference_mode()
    def embed(self, images: Tensor) -> Tensor:
        """Targets float32 [B, D] of crops uint8 [B, 3, H, W]: L2-normalised, or probabilities; nothing is resized.

        Raises:
            FkdError: The network gives something other than finite [B, D].
        """
        embedding = self.output(images)
        return embedding.float().softmax(dim=1) if self.kind == "distribution" else F.normalize(embedding.float(), dim=1)

    @torch.inference_mode()
    def output(self, images: Tensor) -> Tensor:
        """What `embed` makes targets of: embeddings of any length or logits [B, D], in the precision of the forward.

        Raises:
            FkdError: As `embed`.
        """
        with self._autocast():
            features = self._checked(self._run(self.backbone, self._prepare(images), images), images)
            output = self._checked(self._run(self.head, features, images), images)
        if output.shape[1] != self.dim:
            raise FkdError(f"teacher {self.name}: gave D = {output.shape[1]}, expected {self.dim}")
        return output

    @torch.inference_mode()
    def features(self, images: Tensor) -> Tensor:
        """Backbone features float32 [B, F] of uint8 [B, 3, H, W]: what probes and kNN are run on."""
        with self._autocast():
            return self._checked(self._run(self.backbone, self._prepare(images), images), images).float()

    def _run(self, part: nn.Module, given: Tensor, images: Tensor) -> Any:
        """A part's output; what it raises, but for want of memory, becomes an error that names the size of the crops."""
        try:
            return part(given)
        except (RuntimeError, ValueError, TypeError, AssertionError, IndexError) as error:
            if re.search("out of memory|can't allocate memory", str(error)):
                raise
            height, width = images.shape[2:]
            own = "" if (height, width) == (self.pixels, self.pixels) else f"; its own size is {self.pixels} (--pixels)"
            what = (str(error).splitlines() or [""])[0]
            raise FkdError(
                f"teacher {self.name}: fails on crops of {width} x {height} px: {type(error).__name__}: {what}{own}"
            ) from error

    def _prepare(self, images: Tensor) -> Tensor:
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise FkdError(f"teacher {self.name}: got {images.dtype} {list(images.shape)}, expected uint8 [B, 3, H, W]")
        images = images.to(self._mean.device, non_blocking=True).contiguous(memory_format=torch.channels_last)
        return (images - self._mean) / self._std

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.precision == "fp32":  # also inside a student's own autocast
            return torch.autocast(self._mean.device.type, enabled=False)
        return torch.autocast(self._mean.device.type, dtype=_AUTOCAST[self.precision])

    def _checked(self, output: Any, images: Tensor) -> Tensor:
        if not isinstance(output, Tensor) or output.ndim != 2 or len(output) != len(images) or not output.is_floating_point():
            what = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise FkdError(f"teacher {self.name}: its network gave {what} for {len(images)} images, expected [B, D]")
        if not output.isfinite().all():
            advice = "its weights are damaged, or far from what its preprocessing gives it"
            if self.precision != "fp32":
                advice = "try --precision fp32"
            raise FkdError(f"teacher {self.name}: its network gave NaN or infinity in {self.precision}: {advice}")
        return output
