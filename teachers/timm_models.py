"""timm's networks as teachers: `timm/NAME`, including DINO and DINOv2, with mean, std and size of timm's config."""

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fkd_ssl.errors import CheckpointError, FkdError, RequestError, did_you_mean
from fkd_ssl.targets import Precision
from fkd_ssl.teachers import state_dicts
from fkd_ssl.teachers.layers import PROBABILITIES, AtLayer
from fkd_ssl.teachers.teacher import Teacher
from fkd_ssl.teachers.torchvision_models import PRETRAINED
from fkd_ssl.teachers.wrap import wrap


def load_timm(model: str, layer: str | None, checkpoint: str | Path | None, *, precision: Precision = "fp32") -> Teacher:
    """Loads a network of timm without its classifier, or up to `layer`.

    Vision transformers accept other sizes than their own if timm supports it.

    Args:
        model: Name of a timm model, with or without the tag of its weights.
        layer: Name in `named_modules`; None for timm's pooled features (`num_classes=0`), `probabilities` for the softmax of
            its logits.
        checkpoint: A state_dict in timm's layout or in one that timm converts (such as DINOv2's), or `pretrained`: timm then
            downloads the weights of the tag and reads them without unpickling.
        precision: Precision of the forward pass.

    Raises:
        RequestError: timm is not installed, the model or layer does not exist, or the checkpoint is missing.
        CheckpointError: The checkpoint is of another network.
        FkdError: The download failed.
    """
    spec = f"timm/{model}"
    try:
        import timm
        from timm.data import resolve_model_data_config
    except ImportError as error:
        raise RequestError(f"teacher {spec}: timm is not installed ({error}): pip install 'fkd_ssl[timm]'") from error
    if not timm.is_model(model):
        names = timm.list_models()
        raise RequestError(f"teacher {spec}: timm has no such model{did_you_mean(model.partition('.')[0], names)}")
    classes = layer == PROBABILITIES
    network = _build(timm, model, spec, classes=classes)
    if classes and not getattr(network, "num_classes", 0):
        raise RequestError(f"teacher {spec}@{PROBABILITIES}: timm's {model} has no classifier; leave @{PROBABILITIES} out")
    own = str(checkpoint) == PRETRAINED
    config, published = resolve_model_data_config(network), network.pretrained_cfg
    pixels = int(config["input_size"][-1])
    place = published.get("url") or published.get("hf_hub_id") or "an unknown place"
    if checkpoint is None:
        raise RequestError(
            f"teacher {spec}: --checkpoint is needed: a file of its state_dict, or {PRETRAINED}, which lets timm download "
            f"its weights (from {place}, licence {published.get('license') or 'not stated'})"
        )
    licence, average = published.get("license") or "not stated", ""
    if own:
        network = _build(timm, model, spec, classes=classes, pretrained=True)
        name, digest = PRETRAINED, state_dicts.weights_digest(network)
    else:
        weights, digest, average = state_dicts.read(checkpoint)
        name = Path(checkpoint).name
        weights = state_dicts.for_network(weights, network, str(checkpoint))
        weights = _converted(network, weights, published.get("classifier"), str(checkpoint))
        state_dicts.load_into(network, weights, f"{checkpoint}: not the state_dict of {spec}")
    return wrap(
        network if layer is None or classes else AtLayer(network, layer, spec),
        name=model if layer is None else f"{model}-{layer}",
        network=f"{model} of timm, {layer or 'pooled features'}{average}; "
        f"{'trained on' if own else 'timm prepares'} {config['interpolation']} {pixels} px",
        source=spec,
        pixels=pixels,
        test_pixels=min(pixels, 224) if getattr(network, "dynamic_img_size", False) else pixels,  # 518 px would take minutes
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        licence=licence if own else f"not stated; timm's own weights of {model}: {licence}",
        checkpoint=name,
        checkpoint_sha256=digest,
        precision=precision,
        kind="distribution" if classes else "embedding",
    )


def _build(timm: Any, model: str, spec: str, *, classes: bool, pretrained: bool = False) -> Any:
    options: dict[str, Any] = {"pretrained": pretrained, **({} if classes else {"num_classes": 0})}
    try:
        with torch.random.fork_rng(devices=[]):
            try:
                return timm.create_model(model, **options, dynamic_img_size=True)
            except TypeError:  # most networks do not have this option
                return timm.create_model(model, **options)
    except Exception as error:  # the downloader may raise anything
        if not pretrained:
            raise RequestError(f"teacher {spec}: timm cannot make it: {type(error).__name__}: {error}") from error
        raise FkdError(
            f"teacher {spec}: timm could not download its weights: {type(error).__name__}: {error}. Without a network: get "
            "the file on another machine and pass it as --checkpoint"
        ) from error


_POSITIONS = ("pos_embed", "positional_embedding", "position_embeddings")


def _head_keys(name: str) -> set[str]:
    """Returns the keys of a linear classifier called `name`. LeViT's is part of a module that also has a BatchNorm."""
    whole = name.removesuffix(".linear")
    norm = {f"{whole}.bn.{part}" for part in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")}
    return {f"{name}.weight", f"{name}.bias"} | (norm if whole != name else set())


def _converted(network: nn.Module, weights: dict[str, Tensor], classifier: Any, where: str) -> dict[str, Tensor]:
    """Returns the weights without the classifier, under the network's names if timm can convert them."""
    wanted = network.state_dict()
    heads = {key for name in ((classifier,) if isinstance(classifier, str) else classifier or ()) for key in _head_keys(name)}

    def headless(state: dict[str, Tensor]) -> dict[str, Tensor]:
        return {key: value for key, value in state.items() if key in wanted or key not in heads}

    kept = headless(weights)
    convert = getattr(sys.modules[type(network).__module__], "checkpoint_filter_fn", None)  # timm's convention
    if convert is None or all(key in wanted and wanted[key].shape == value.shape for key, value in kept.items()):
        return kept
    # timm would resample another patch size or number of positions; the result would not be the teacher in the file
    positions = {key: wanted["pos_embed"] for key in kept if key.endswith(_POSITIONS)} if "pos_embed" in wanted else {}
    misshapen = [
        f"{key} {list(value.shape)}, expected {list(({**positions, **wanted})[key].shape)}"
        for key, value in kept.items()
        if (key in wanted and value.ndim == wanted[key].ndim and value.shape != wanted[key].shape)
        or (key in positions and abs(value.numel() - positions[key].numel()) > positions[key].shape[-1])
    ]
    state_dicts.refuse_keys({"misshapen": misshapen}, where)
    try:
        return headless(convert(weights, network))
    except Exception as error:  # the file has a layout that timm does not expect
        raise CheckpointError(f"{where}: timm cannot convert it: {type(error).__name__}: {error}") from error
