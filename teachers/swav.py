"""SwAV's checkpoint layout (arXiv 2006.09882): every width, projection head with BatchNorm, prototypes."""

from pathlib import Path
from typing import Any

import numpy as np

from fkd_ssl.errors import CheckpointError
from fkd_ssl.teachers import checkpoint
from fkd_ssl.teachers.resnet import read_architecture
from fkd_ssl.teachers.teacher import IMAGENET_MEAN, Teacher

SWAV_STD = (0.228, 0.224, 0.225)
_OTHERS = ("projection_head.", "prototypes.")


def load_swav(path: str | Path, *, name: str = "swav", **about: Any) -> Teacher:
    """A SwAV checkpoint: a ResNet of any width, `projection_head.0/1/3`, `prototypes.weight` [K, D].

    The embedding is the normalised output of the head; the prototypes become the teacher's array `prototypes`.

    Raises:
        CheckpointError: The file is of another layout, or a key is missing, extra or misshapen.
    """
    saved, digest = checkpoint.read(path)
    weights = checkpoint.weights_of(saved, str(path))
    head = checkpoint.part(weights, "projection_head.")
    prototypes = weights.get("prototypes.weight")
    if not head or prototypes is None:
        moco = any(key.startswith("encoder_q.") for key in weights)
        hint = "; it looks like MoCo's: pass --teacher mocov2" if moco else ""
        lacks = "projection_head.*" if not head else "prototypes.weight"
        raise CheckpointError(f"{path}: not SwAV's layout: no key {lacks}, the first is {next(iter(weights))!r}{hint}")
    if "0.weight" not in head or "3.weight" not in head:
        raise CheckpointError(f"{path}: its head has keys {sorted(head)}, expected projection_head.0, .1 and .3")
    architecture = read_architecture(weights, str(path))
    shapes = [(head[f"{k}.weight"].shape[1], head[f"{k}.weight"].shape[0]) for k in (0, 3)]
    dim = shapes[-1][1]
    if prototypes.ndim != 2 or prototypes.shape[1] != dim:
        raise CheckpointError(f"{path}: prototypes {list(prototypes.shape)} do not fit a head of {dim} dimensions")
    encoder = architecture.build()
    projection = checkpoint.mlp(shapes, norm=True)
    backbone = {key: value for key, value in weights.items() if not key.startswith((*_OTHERS, "head."))}
    checkpoint.load_into(encoder, backbone, str(path))
    checkpoint.load_into(projection, head, str(path))
    return Teacher(
        encoder,
        projection,
        name=name,
        dim=dim,
        network=f"{architecture.name}, MLP {shapes[0][0]}-{shapes[0][1]}-{dim} with BatchNorm, {len(prototypes)} prototypes",
        mean=IMAGENET_MEAN,
        std=SWAV_STD,
        checkpoint_sha256=digest,
        arrays={"prototypes": prototypes.detach().float().numpy().astype(np.float32)},
        **about,
    )
