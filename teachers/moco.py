"""MoCo's checkpoint layout: v2 (MLP head, arXiv 2003.04297) and v1 (linear head, arXiv 1911.05722)."""

from pathlib import Path
from typing import Any

from torch import nn

from fkd_ssl.errors import CheckpointError
from fkd_ssl.teachers import checkpoint
from fkd_ssl.teachers.resnet import read_architecture
from fkd_ssl.teachers.teacher import Teacher


def load_mocov2(path: str | Path, *, name: str = "mocov2", **about: Any) -> Teacher:
    """The query encoder of a MoCo checkpoint: a torchvision ResNet and the head `fc.0`, `fc.2` (v1: `fc`).

    The key encoder, the queue and the optimiser in the file are not used.

    Raises:
        CheckpointError: The file is of another layout, or a key is missing, extra or misshapen.
    """
    saved, digest = checkpoint.read(path)
    weights = checkpoint.weights_of(saved, str(path))
    query = checkpoint.part(weights, "encoder_q.")
    if not query:
        swav = any(key.startswith(("projection_head.", "prototypes.")) for key in weights)
        hint = "; it looks like SwAV's: pass --teacher swav" if swav else ""
        first = next(iter(weights))
        raise CheckpointError(f"{path}: not MoCo's layout: no keys module.encoder_q.*, the first is {first!r}{hint}")
    architecture = read_architecture(query, str(path))
    backbone = {key: value for key, value in query.items() if not key.startswith("fc.")}
    head = checkpoint.part(query, "fc.")
    layers = [key.removesuffix("weight") for key in head if key.endswith("weight")]
    if sorted(layers) not in ([""], ["0.", "2."]) or any(head[f"{layer}weight"].ndim != 2 for layer in layers):
        raise CheckpointError(f"{path}: its head has keys {sorted(head)}, expected fc.0 and fc.2 (MoCo v2) or fc (v1)")
    shapes = [(head[f"{layer}weight"].shape[1], head[f"{layer}weight"].shape[0]) for layer in sorted(layers)]
    encoder = architecture.build()
    projection: nn.Module = checkpoint.mlp(shapes)
    checkpoint.load_into(encoder, backbone, str(path))
    named = head if "" not in layers else {f"0.{key}": value for key, value in head.items()}
    checkpoint.load_into(projection, named, str(path))
    sizes = "-".join(map(str, [shapes[0][0], *(out for _, out in shapes)]))
    return Teacher(
        encoder,
        projection,
        name=name,
        dim=shapes[-1][1],
        network=f"{architecture.name}, MLP {sizes}",
        checkpoint_sha256=digest,
        **about,
    )
