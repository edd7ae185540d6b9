"""MoCo's checkpoint layout: v2 (MLP head, arXiv 2003.04297) and v1 (linear head, arXiv 1911.05722)."""

from pathlib import Path
from typing import Any

from fkd_ssl.errors import CheckpointError
from fkd_ssl.teachers import state_dicts
from fkd_ssl.teachers.resnet import read_architecture
from fkd_ssl.teachers.teacher import Teacher


def load_mocov2(path: str | Path, *, name: str = "mocov2", **fields: Any) -> Teacher:
    """Loads the query encoder of a MoCo checkpoint: a torchvision ResNet and the head `fc.0`, `fc.2` (v1: `fc`).

    The key encoder, the queue and the optimiser in the file are ignored.

    Raises:
        CheckpointError: The file has another layout, or a key is missing, unexpected or of the wrong shape.
    """
    weights, digest, average = state_dicts.read(path)
    query = state_dicts.part(weights, "encoder_q.")
    others = [key for key in weights if not key.startswith(("encoder_q.", "encoder_k.")) and key not in ("queue", "queue_ptr")]
    if not query:
        swav = any(key.startswith(("projection_head.", "prototypes.")) for key in weights)
        hint = "; it looks like SwAV's: pass --teacher swav" if swav else ""
        first = next(iter(weights))
        raise CheckpointError(f"{path}: not MoCo's layout: no keys module.encoder_q.*; the first key is {first!r}{hint}")
    state_dicts.refuse_keys({"unexpected": others}, str(path))
    architecture = read_architecture(query, str(path))
    backbone = {key: value for key, value in query.items() if not key.startswith("fc.")}
    head = state_dicts.part(query, "fc.")
    projection, dim, words = state_dicts.read_head(head, architecture.feature_dim, f"{path}: encoder_q.fc")
    encoder = architecture.build()
    state_dicts.load_into(encoder, backbone, f"{path}: encoder_q")
    state_dicts.load_into(projection, head, f"{path}: encoder_q.fc")
    known = {*encoder.state_dict(), *(f"fc.{key}" for key in projection.state_dict())}
    strange = [key for key in state_dicts.part(weights, "encoder_k.") if key not in known]
    state_dicts.refuse_keys({"unexpected": strange}, f"{path}: encoder_k")
    return Teacher(
        encoder,
        projection,
        name=name,
        shape=(dim,),
        feature_dim=architecture.feature_dim,
        network=f"{architecture.name}, {words}{average}",
        checkpoint=Path(path).name,
        checkpoint_sha256=digest,
        **fields,
    )
