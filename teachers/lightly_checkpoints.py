"""Checkpoints of modules of lightly or solo-learn: a .ckpt whose `backbone.*` is a ResNet of torchvision."""

from pathlib import Path
from typing import Any

from torch import nn

from fkd_ssl.errors import CheckpointError
from fkd_ssl.teachers import state_dicts
from fkd_ssl.teachers.resnet import read_architecture
from fkd_ssl.teachers.teacher import Teacher

# lightly's examples use nn.Sequential(*list(resnet.children())[:-1]), whose parts have numbers instead of names
_NUMBERED = {"0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3", "7": "layer4"}


def load_lightly(path: str | Path, *, name: str = "lightly", **fields: Any) -> Teacher:
    """Loads the backbone of a module trained with lightly or solo-learn. Its targets are the pooled features, D = 512 or 2048.

    Classifiers, heads, momentum networks, memory banks and optimisers in the file are ignored. To distil a head, use
    module:function.

    Raises:
        CheckpointError: The file has no `backbone.*` or `encoder.*`, the backbone is not a ResNet, or a key is missing,
            unexpected or of the wrong shape.
    """
    weights, digest, average = state_dicts.read(path)
    backbone = state_dicts.backbone(weights, str(path))
    if not backbone:
        first = next(iter(weights))
        raise CheckpointError(f"{path}: not lightly's layout: no keys backbone.* or encoder.*; the first key is {first!r}")
    if all(key.partition(".")[0] in _NUMBERED for key in backbone):
        backbone = {f"{_NUMBERED[key.partition('.')[0]]}.{key.partition('.')[2]}": value for key, value in backbone.items()}
    backbone = {key: value for key, value in backbone.items() if not key.startswith("fc.")}  # a ResNet's classifier
    architecture = read_architecture(backbone, str(path))
    encoder = architecture.build()
    state_dicts.load_into(encoder, backbone, f"{path}: backbone")
    return Teacher(
        encoder,
        nn.Identity(),
        name=name,
        shape=(architecture.feature_dim,),
        network=f"{architecture.name}, pooled features{average}",
        checkpoint=Path(path).name,
        checkpoint_sha256=digest,
        **fields,
    )
