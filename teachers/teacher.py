"""Teachers: frozen networks that map crops to targets."""

import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, Self

import torch
from torch import Tensor, nn

from fkd_ssl.errors import FkdError, RequestError
from fkd_ssl.maps import features_and_map, to_grid
from fkd_ssl.targets import TargetSpec, TeacherInfo
from fkd_ssl.targets.tokens import TOKENS

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Teacher(nn.Module):
    """A frozen backbone and projection head with their own preprocessing, always in eval mode.

    Args:
        backbone: Maps normalised floats [B, 3, H, W] to features [B, F].
        head: Maps features, or a grid of tokens, to vectors of any length, or logits, `[B, *shape]`.
        name: Default name of the column in a store.
        shape: Shape of one target.
        kind: `embedding`: targets are the L2-normalised outputs of the head; `distribution`: targets are class probabilities,
            the softmax of the head's outputs; `tokens`: the backbone's feature map is pooled to the grid of `shape` [h, w, D],
            passes through the head as [B, h, w, F], and each token is normalised.
        feature_dim: F; by default the size of a target.
        **fields: Fields of TeacherInfo: network, pixels, mean, std, licence, source, checkpoint, checkpoint_sha256, precision,
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
        **fields: Any,
    ) -> None:
        super().__init__()
        fields |= {key: str(fields[key]) for key in ("source", "checkpoint") if fields.get(key) is not None}  # paths too
        self.info = TeacherInfo(name=name, spec=TargetSpec(kind, tuple(shape)), **fields)
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
        self.info = replace(
            self.info,
            name=f"{self.info.name}-backbone",
            network=f"{self.info.network}: the features of the backbone",
            spec=TargetSpec("embedding", (self.feature_dim,)),
            arrays={},
        )
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

    def check_size(self, side: int) -> None:
        """Runs once on crops of this side if it may not support them, so that this is known before anything is written.

        Raises:
            RequestError: The grid of the tokens is finer than the feature map, or there is no map.
            FkdError: As `embed`.
        """
        if side != self.info.pixels or self.info.spec.kind == TOKENS:
            self.embed(torch.zeros(2, 3, side, side, dtype=torch.uint8))

    @property
    def network_key(self) -> object:
        """Equal for teachers that share a network and its input, so that `embed_with` can take them together."""
        return id(self.backbone), self.info.mean, self.info.std, self.info.precision

    @torch.inference_mode()
    def embed_with(self, others: "Sequence[Teacher]", images: Tensor) -> list[Tensor]:
        """Targets of this teacher and of others with the same `network_key`, from one forward pass.

        Raises:
            FkdError: As `embed`.
        """
        teachers = [self, *others]
        with self._autocast():
            found = self._forward(images, with_map=any(teacher.info.spec.kind == TOKENS for teacher in teachers))
            outputs = [teacher._output(*found, images) for teacher in teachers]
        return [teacher.info.spec.definition.of_output(output) for teacher, output in zip(teachers, outputs, strict=True)]

    @torch.inference_mode()
    def output(self, images: Tensor) -> Tensor:
        """Outputs of the head, from which `embed` makes targets: vectors, logits or tokens `[B, *shape]`, of any float type.

        Raises:
            RequestError: The grid of the tokens is finer than the feature map, or there is no map.
            FkdError: As `embed`.
        """
        with self._autocast():
            return self._output(*self._forward(images, with_map=self.info.spec.kind == TOKENS), images)

    @torch.inference_mode()
    def features(self, images: Tensor) -> Tensor:
        """Backbone features float32 [B, F] of uint8 [B, 3, H, W], used by probes and kNN."""
        with self._autocast():
            return self._forward(images, with_map=False)[0].float()

    @torch.inference_mode()
    def map(self, images: Tensor) -> Tensor:
        """Feature map float32 [B, h, w, F] of uint8 [B, 3, H, W], neither pooled nor normalised.

        Raises:
            RequestError: The network has no feature map.
            FkdError: As `embed`.
        """
        with self._autocast():
            _, found = self._forward(images, with_map=True)
        assert found is not None
        return found.permute(0, 2, 3, 1).float()

    def _forward(self, images: Tensor, *, with_map: bool) -> tuple[Tensor, Tensor | None]:
        """Features [B, F], and the feature map [B, F, h, w] if requested."""
        inputs = self._prepare(images)
        if not with_map:
            return self._checked(self._run(self.backbone, inputs, images), images), None
        try:
            features, found = self._run(lambda given: features_and_map(self.backbone, given), inputs, images)
        except RequestError as error:
            raise RequestError(f"teacher {self.info.name}: {error}") from error
        return self._checked(features, images), self._checked(found, images, tuple(found.shape[1:]))

    def _output(self, features: Tensor, found: Tensor | None, images: Tensor) -> Tensor:
        """Output of the head for features, or for the grid of a map."""
        shape = self.info.spec.shape
        if self.info.spec.kind == TOKENS:
            assert found is not None
            rows, columns = found.shape[2:]
            if rows < shape[0] or columns < shape[1]:
                raise RequestError(
                    f"teacher {self.info.name}: its feature map has {rows} x {columns} positions for crops of "
                    f"{images.shape[3]} x {images.shape[2]} px; a grid of {shape[0]} x {shape[1]} is too fine: choose --grid "
                    f"{min(rows, columns)}, or larger crops (--pixels)"
                )
            features = to_grid(found.float(), (shape[0], shape[1]))
        return self._checked(self._run(self.head, features, images), images, shape)

    def _run(self, part: Callable[[Tensor], Any], given: Tensor, images: Tensor) -> Any:
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
