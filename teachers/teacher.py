"""Teachers: frozen networks that map crops to targets."""

import re
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, Self

import torch
from torch import Tensor, nn

from fkd_ssl.errors import FkdError
from fkd_ssl.targets import TargetSpec, TeacherInfo

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Teacher(nn.Module):
    """A frozen backbone and projection head with their own preprocessing, always in eval mode.

    Args:
        backbone: Maps normalised floats [B, 3, H, W] to features [B, F].
        head: Maps features to vectors of any length, or logits, `[B, *shape]`.
        name: Default name of the column in a store.
        shape: Shape of one target.
        kind: `embedding`: targets are the L2-normalised outputs of the head; `distribution`: targets are class probabilities,
            the softmax of the head's outputs.
        feature_dim: F; by default the size of a target.
        **about: Fields of TeacherInfo: network, pixels, mean, std, licence, source, checkpoint, checkpoint_sha256, precision,
            arrays. On a GPU, fp32 follows PyTorch's settings: by default convolutions use TF32.

    Attributes:
        info: Information about the teacher and its targets.

    Raises:
        RequestError: A value is invalid.
    """

    _mean: Tensor
    _std: Tensor

    def __init__(
        self,
        backbone: nn.Module,
        head: nn.Module,
        *,
        name: str,
        shape: tuple[int, ...],
        kind: str = "embedding",
        feature_dim: int | None = None,
        **about: Any,
    ) -> None:
        super().__init__()
        about |= {key: str(about[key]) for key in ("source", "checkpoint") if about.get(key) is not None}  # paths too
        self.info = TeacherInfo(name=name, spec=TargetSpec(kind, tuple(shape)), **about)
        self.backbone = backbone
        self.head = head
        self.feature_dim = self.info.spec.size if feature_dim is None else feature_dim
        for key, values in (("_mean", self.info.mean), ("_std", self.info.std)):
            self.register_buffer(key, torch.tensor(values).view(1, 3, 1, 1) * 255, persistent=False)
        self.requires_grad_(False)
        self.to(memory_format=torch.channels_last)
        self.eval()

    @property
    def device(self) -> torch.device:
        """The device of the network."""
        return self._mean.device

    def compile(self, *args: Any, **options: Any) -> None:
        """Compiles the network in place; accepts the arguments of torch.compile."""
        for part in (self.backbone, self.head):
            part.compile(*args, **options)

    def without_head(self) -> Self:
        """Makes the backbone's features [F] the target, as in SimReg (arXiv 2201.05131). Returns the same teacher."""
        about = {"name": f"{self.info.name}-backbone", "network": f"{self.info.network}: the features of the backbone"}
        self.info = replace(self.info, **about, spec=TargetSpec("embedding", (self.feature_dim,)), arrays={})
        self.head = nn.Identity()
        return self

    def train(self, mode: bool = True) -> Self:
        """Stays in eval mode: a teacher is frozen."""
        return super().train(False)

    @torch.inference_mode()
    def embed(self, images: Tensor) -> Tensor:
        """Targets float32 `[B, *shape]` of crops uint8 [B, 3, H, W]: L2-normalised, or probabilities; nothing is resized.

        Raises:
            FkdError: The network gives something other than finite `[B, *shape]`.
        """
        return self.info.spec.definition.of_output(self.output(images))

    @torch.inference_mode()
    def output(self, images: Tensor) -> Tensor:
        """Outputs of the head, from which `embed` makes targets: vectors or logits `[B, *shape]`, not necessarily float32.

        Raises:
            FkdError: As `embed`.
        """
        with self._autocast():
            features = self._checked(self._run(self.backbone, self._prepare(images), images), images)
            return self._checked(self._run(self.head, features, images), images, self.info.spec.shape)

    @torch.inference_mode()
    def features(self, images: Tensor) -> Tensor:
        """Backbone features float32 [B, F] of uint8 [B, 3, H, W], used by probes and kNN."""
        with self._autocast():
            return self._checked(self._run(self.backbone, self._prepare(images), images), images).float()

    def _run(self, part: nn.Module, given: Tensor, images: Tensor) -> Any:
        """Runs a part; turns its exceptions, except out of memory, into an FkdError that names the size of the crops."""
        try:
            return part(given)
        except (Exception, SystemExit) as error:  # a user's own network may raise anything
            if isinstance(error, (FkdError, MemoryError)) or re.search("out of memory|can't allocate memory", str(error)):
                raise
            height, width = images.shape[2:]
            side = self.info.pixels
            own = "" if (height, width) == (side, side) else f"; its native size is {side} (--pixels)"
            what = (str(error).splitlines() or [""])[0]
            raise FkdError(
                f"teacher {self.info.name}: fails on crops of {width} x {height} px: {type(error).__name__}: {what}{own}"
            ) from error

    def _prepare(self, images: Tensor) -> Tensor:
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise FkdError(f"teacher {self.info.name}: got {images.dtype} {list(images.shape)}, expected uint8 [B, 3, H, W]")
        images = images.to(self._mean.device, non_blocking=True).contiguous(memory_format=torch.channels_last)
        return (images - self._mean) / self._std

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.info.precision == "fp32":  # also inside a student's own autocast
            return torch.autocast(self._mean.device.type, enabled=False)
        return torch.autocast(self._mean.device.type, dtype=_AUTOCAST[self.info.precision])

    def _checked(self, output: Any, images: Tensor, shape: tuple[int, ...] | None = None) -> Tensor:
        """Checks that an output is a tensor of floats with one row per image, of `shape`, or if None of features [F].

        On the CPU, it must also be finite. On a GPU this check would wait for the GPU; callers check what they copy to the CPU.
        """
        right = isinstance(output, Tensor) and len(output) == len(images) and output.is_floating_point()
        if not right or (output.ndim != 2 if shape is None else output.shape[1:] != shape):
            what = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
            wanted = "[B, D]" if shape is None else [len(images), *shape]
            raise FkdError(f"teacher {self.info.name}: its network gave {what} for {len(images)} images, expected {wanted}")
        checked: Tensor = output
        if checked.device.type == "cpu" and not checked.isfinite().all():
            what = f"its network gave NaN or infinity in {self.info.precision}"
            raise FkdError(f"teacher {self.info.name}: {what}: {self.info.if_not_finite}")
        return checked
