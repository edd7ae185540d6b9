"""Precision of a teacher's arithmetic, and where PyTorch uses TF32."""

from typing import Literal, get_args

import torch

Precision = Literal["fp32", "bf16", "fp16"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)


def uses_tf32(precision: str) -> bool:
    """Whether convolutions of a network in `fp32` (Lightning's `32-true`) use TF32 on this machine's GPU.

    That is PyTorch's default on GPUs since the A100. TF32 has the range of float32 and a mantissa of 10 bits.
    """
    return (
        precision in ("fp32", "32-true")
        and torch.cuda.is_available()
        and torch.cuda.get_device_capability() >= (8, 0)
        and torch.backends.cudnn.allow_tf32
    )
