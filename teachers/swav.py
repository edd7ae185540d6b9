"""SwAV's checkpoint layout (arXiv 2006.09882): ResNets of any width, a projection head with BatchNorm, and prototypes."""

from pathlib import Path
from typing import Any

import numpy as np

from fkd_ssl.errors import CheckpointError
from fkd_ssl.targets.info import IMAGENET_MEAN
from fkd_ssl.teachers import state_dicts
from fkd_ssl.teachers.presets import SWAV_STD
from fkd_ssl.teachers.resnet import read_architecture
from fkd_ssl.teachers.teacher import Teacher

_OTHERS = ("projection_head.", "prototypes.")


def load_swav(path: str | Path, *, name: str = "swav", **fields: Any) -> Teacher:
    """Loads a SwAV checkpoint: a ResNet of any width, `projection_head.0/1/3` (w5: 0/2), `prototypes.weight` [K, D].

    The embedding is the normalised output of the head. The prototypes are stored unchanged as the teacher's array `prototypes`.
    Their rows have almost unit length, since SwAV's script saves after an optimiser step.

    Raises:
        CheckpointError: The file has another layout, or a key is missing, unexpected or of the wrong shape.
    """
    weights, digest, average = state_dicts.read(path)
    head = state_dicts.part(weights, "projection_head.")
    prototypes = weights.get("prototypes.weight")
    if not head or prototypes is None:
        moco = any(key.startswith("encoder_q.") for key in weights)
        hint = "; it looks like MoCo's: pass --teacher mocov2" if moco else ""
        if any(key.startswith("prototypes.prototypes") for key in weights):
            hint = "; it has several sets of prototypes, like DeepCluster-v2 and SeLa-v2: load it with module:function"
        lacks = "projection_head.*" if not head else "prototypes.weight"
        raise CheckpointError(f"{path}: not SwAV's layout: no key {lacks}; the first key is {next(iter(weights))!r}{hint}")
    backbone = {key: value for key, value in weights.items() if not key.startswith(_OTHERS)}
    architecture = read_architecture(backbone, str(path))
    projection, dim, words = state_dicts.read_head(head, architecture.feature_dim, f"{path}: projection_head")
    others = [key for key in weights if key.startswith("prototypes.") and key != "prototypes.weight"]
    fits = prototypes.ndim == 2 and prototypes.shape[1] == dim and len(prototypes) and prototypes.is_floating_point()
    wrong = [] if fits else [f"prototypes.weight {list(prototypes.shape)}, expected floats [K, {dim}]"]
    state_dicts.refuse_keys({"unexpected": others, "misshapen": wrong}, str(path))
    encoder = architecture.build()
    state_dicts.load_into(encoder, backbone, str(path))
    state_dicts.load_into(projection, head, f"{path}: projection_head")
    if not prototypes.isfinite().all():
        raise CheckpointError(f"{path}: its prototypes hold NaN or infinity")
    return Teacher(
        encoder,
        projection,
        name=name,
        shape=(dim,),
        feature_dim=architecture.feature_dim,
        network=f"{architecture.name}, {words}, {len(prototypes)} prototypes{average}",
        mean=IMAGENET_MEAN,
        std=SWAV_STD,
        checkpoint=Path(path).name,
        checkpoint_sha256=digest,
        arrays={"prototypes": prototypes.detach().float().numpy().astype(np.float32)},
        **fields,
    )
