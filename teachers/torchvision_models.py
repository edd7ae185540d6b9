"""torchvision's classifiers as teachers: `torchvision/NAME`, with the mean, std and size of its own weights."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fkd_ssl.errors import FkdError, RequestError, did_you_mean
from fkd_ssl.targets import Precision
from fkd_ssl.teachers import state_dicts
from fkd_ssl.teachers.layers import PROBABILITIES, AtLayer
from fkd_ssl.teachers.teacher import Teacher
from fkd_ssl.teachers.wrap import wrap

PRETRAINED = "pretrained"
"""Value of --checkpoint that makes a library download its own weights."""


def load_torchvision(model: str, layer: str | None, checkpoint: str | Path | None, *, precision: Precision = "fp32") -> Teacher:
    """Loads a classifier without its last linear layer, or up to `layer`.

    Args:
        model: Name in torchvision.models.list_models.
        layer: Name in `named_modules`; None for the input of the last linear layer, `probabilities` for the softmax of the
            logits.
        checkpoint: A state_dict of the whole classifier, or `pretrained`: torchvision then downloads its default weights,
            checks their hash and reads them without unpickling.
        precision: Precision of the forward pass.

    Raises:
        RequestError: The model or layer does not exist, or the checkpoint is missing.
        CheckpointError: The checkpoint is of another network.
        FkdError: The download failed.
    """
    from torchvision import models

    spec = f"torchvision/{model}"
    names = models.list_models(module=models)
    if model not in names:
        raise RequestError(f"teacher {spec}: torchvision has no such classifier{did_you_mean(model, names)}")
    weights = models.get_model_weights(model).DEFAULT
    seen = weights.transforms()
    pixels = int(seen.crop_size[0])
    if checkpoint is None:
        raise RequestError(
            f"teacher {spec}: --checkpoint is needed: a file of its state_dict, or {PRETRAINED}, which lets torchvision "
            f"download {weights.url}"
        )
    # the options that torchvision uses for these weights
    extra: dict[str, Any] = {"image_size": pixels} if model.startswith("vit_") else {}
    if model in ("googlenet", "inception_v3"):
        extra = {"transform_input": True, "aux_logits": True, "init_weights": False}
    with torch.random.fork_rng(devices=[]):
        network = models.get_model(model, weights=None, **extra)
    unused = ""  # the last layer, which a file may lack or have for other classes
    if layer is None:
        last = next((key for key, part in reversed(list(network.named_modules())) if isinstance(part, nn.Linear)), None)
        if last is None:
            raise RequestError(f"teacher {spec}: its classifier is not a linear layer: name the layer, {spec}@LAYER")
        network.set_submodule(last, nn.Identity())
        unused = f"{last}."
    name, digest, average = load_weights(network, checkpoint, spec, lambda: _download(weights, spec), unused)
    source = f"{spec} ({type(weights).__name__}.{weights.name})" if checkpoint == PRETRAINED else spec
    kind = "distribution" if layer == PROBABILITIES else "embedding"
    if layer not in (None, PROBABILITIES):
        network = AtLayer(network, layer, spec)
    return wrap(
        network,
        name=model if layer is None else f"{model}-{layer}",
        network=f"{model} of torchvision, {layer or 'pooled features'}{average}; "
        f"{'trained on' if checkpoint == PRETRAINED else 'torchvision prepares'} {seen.interpolation.value} {pixels} px",
        source=source,
        pixels=pixels,
        mean=tuple(seen.mean),
        std=tuple(seen.std),
        checkpoint=name,
        checkpoint_sha256=digest,
        precision=precision,
        kind=kind,
    )


def load_weights(
    network: nn.Module, checkpoint: str | Path, spec: str, download: Callable[[], dict[str, Tensor]], unused: str
) -> tuple[str, str, str]:
    """Loads a file's weights into `network`, or `download()` for `pretrained`, without keys that start with `unused`.

    Returns:
        The name of the weights, their digest, and `StateDict.average`.
    """

    def load(weights: Mapping[str, Tensor], where: str) -> None:
        kept = {key: value for key, value in weights.items() if not (unused and key.startswith(unused))}
        state_dicts.load_into(network, kept, where)

    if str(checkpoint) == PRETRAINED:
        load(download(), f"{spec}: its own weights")
        return PRETRAINED, state_dicts.weights_digest(network), ""
    weights, digest, average = state_dicts.read(checkpoint)
    load(state_dicts.for_network(weights, network, str(checkpoint)), f"{checkpoint}: not the state_dict of {spec}")
    return Path(checkpoint).name, digest, average


def _download(weights: Any, spec: str) -> dict[str, Tensor]:
    try:
        state: dict[str, Tensor] = weights.get_state_dict(progress=True, check_hash=True, weights_only=True)
    except Exception as error:  # the downloader may raise anything
        raise FkdError(
            f"teacher {spec}: torchvision could not download its weights: {type(error).__name__}: {error}. Without a network: "
            f"download {weights.url} on another machine and pass the file as --checkpoint"
        ) from error
    return state
