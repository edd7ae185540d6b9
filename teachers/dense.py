"""A classifier's logits at each position, before global average pooling, for ReLabel's label maps.

Yun et al., "Re-labeling ImageNet", CVPR 2021 (arXiv 2101.05022), section 3.1. If a network ends in global average pooling and
one linear layer, the two can be exchanged: the layer then gives logits at each position, and their mean equals the network's
output for the image.

Legend: `B` images, `P` their side, `F` features, `K` classes, `h` x `w` positions.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fkd_ssl.errors import RequestError
from fkd_ssl.maps import MapWatch
from fkd_ssl.teachers.teacher import Teacher

TOLERANCE = {"fp32": 1e-3, "fp16": 2e-2, "bf16": 5e-2}
"""Precision -> tolerance between the mean over positions and the network's logits, relative to the largest logit."""


class DenseTeacher:
    """Logits of a classifier at each position: maps uint8 [B, 3, P, P] to float32 [B, K, h, w].

    It supports networks that end in global average pooling of [B, F, h, w] and one linear layer, optionally with flattening and
    dropout between them: ResNet, RegNet, DenseNet, EfficientNet, MobileNetV2 and so on. The layers are found by observing a
    forward pass, so the network's code does not matter. Every call checks that the mean over positions equals the network's
    output, and refuses other networks, such as ConvNeXt (a norm after pooling), MobileNetV3 and vision transformers.

    The forward pass uses the teacher's normalisation and precision; the linear layer at each position always uses fp32.

    Args:
        teacher: Teacher of the kind `distribution`.
        pixels: P; by default the teacher's native size.

    Attributes:
        teacher: The teacher.
        pixels: P.
        height: h.
        width: w.

    Raises:
        RequestError: The teacher does not give class probabilities, or its network is not supported.
        FkdError: The network fails on images of this size.
    """

    def __init__(self, teacher: Teacher, *, pixels: int | None = None) -> None:
        if teacher.info.spec.kind != "distribution":
            raise RequestError(
                f"teacher {teacher.info.name}: gives embeddings; label maps need a classifier's logits: "
                "torchvision/NAME@probabilities, timm/NAME@probabilities, or a module of your own whose kind is 'distribution'"
            )
        self.teacher = teacher
        self.pixels = teacher.info.pixels if pixels is None else pixels
        noise = torch.randint(
            0, 256, (2, 3, self.pixels, self.pixels), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
        )
        self.height, self.width = self(noise).shape[2:]

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Tensor:
        """Logits float32 [B, K, h, w] of images uint8 [B, 3, P, P].

        Raises:
            RequestError: The mean over positions differs from the network's output.
            FkdError: The network fails, or its logits are not finite.
        """
        with _Watch() as watch:
            logits = self.teacher.output(images)
        found, last = watch.map if watch.pooled else None, watch.linear
        if last is None or last[0].shape[0] != self.teacher.info.spec.size:
            raise self._refusal("its logits do not come from a linear layer")
        weight, bias = last
        if found is None or found.shape[:2] != (len(images), weight.shape[1]):
            raise self._refusal("the input of its last linear layer is not the mean of a map")
        dense = F.linear(found.permute(0, 2, 3, 1).float(), weight.float(), None if bias is None else bias.float())
        off = (dense.mean(dim=(1, 2)) - logits.float()).abs().max().item()
        if not off <= TOLERANCE[self.teacher.info.precision] * logits.float().abs().max().item():
            raise self._refusal(
                f"the mean of its logits over positions differs by up to {off:.3g} from its logits of the image"
            )
        return dense.permute(0, 3, 1, 2)

    def _refusal(self, why: str) -> RequestError:
        advice = "" if self.teacher.info.precision == "fp32" else "; if it is such a network, try --precision fp32"
        return RequestError(
            f"teacher {self.teacher.info.name}: {why}: label maps need a network that ends in global average pooling and one "
            f"linear layer, like ResNet, and images (here {self.pixels} px) large enough for several positions{advice}"
        )


class _Watch(MapWatch):
    """Also records the last linear layer that a network applies to vectors.

    Attributes:
        linear: Weight [K, F] and bias [K] or None.
    """

    def __init__(self) -> None:
        super().__init__()
        self.linear: tuple[Tensor, Tensor | None] | None = None

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is F.linear and args[0].ndim == 2:
            self.linear = _parameters(*args[1:], **(kwargs or {}))
        return super().__torch_function__(function, types, args, kwargs)


def _parameters(weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Returns the weight and bias in the arguments of torch.nn.functional.linear."""
    return weight, bias
