"""Vision models of Hugging Face transformers, from a local folder written by `save_pretrained`."""

import inspect
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from fkd_ssl.errors import CheckpointError, RequestError
from fkd_ssl.maps import arrange
from fkd_ssl.targets import Rgb
from fkd_ssl.teachers import state_dicts
from fkd_ssl.teachers.teacher import Teacher
from fkd_ssl.teachers.wrap import wrap
from fkd_ssl.text import first_line


def load_transformers(path: str | Path, *, name: str = "transformers", **fields: Any) -> Teacher:
    """Loads the vision model in a folder. Its targets are the pooled output; its image processor gives mean, std and size.

    Nothing is downloaded, no code in the folder is run, and weights are read only from safetensors. If a model has a pooler and
    the folder lacks its weights (as DINO's), the class token is used instead.

    Args:
        path: Folder with config.json, model.safetensors and preprocessor_config.json.
        name: Name of the column.
        **fields: Further arguments of Teacher.

    Raises:
        RequestError: transformers is not installed, or the folder does not exist.
        CheckpointError: The folder has no vision model, or weights are missing.
    """
    path = Path(path)
    if not path.is_dir():
        raise RequestError(f"{path}: {'a file' if path.exists() else 'not found'}; expected the folder of a transformers model")
    try:
        from transformers import AutoImageProcessor, AutoModel
        from transformers.utils import logging
    except ImportError as error:
        raise RequestError(f"transformers is not installed ({error}): pip install 'fkd_ssl[transformers]'") from error
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # missing weights are checked below
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        model, info = AutoModel.from_pretrained(path, use_safetensors=True, output_loading_info=True, **options)
        processor = AutoImageProcessor.from_pretrained(path, **options)
    except Exception as error:  # transformers may raise anything for an unknown folder
        raise CheckpointError(
            f"{path}: transformers cannot read it as a vision model in safetensors: {first_line(error)}"
        ) from error
    finally:
        logging.set_verbosity(verbosity)
    if model.main_input_name != "pixel_values":
        raise CheckpointError(f"{path}: a {type(model).__name__} takes {model.main_input_name}; expected a vision model")
    lacks = sorted(info["missing_keys"])
    unpooled = bool(lacks) and all(key.startswith("pooler.") for key in lacks)
    foreign = sorted(key for key in info["unexpected_keys"] if not key.startswith(_HEADS))
    wrong = {
        "unexpected": foreign,
        "missing": [] if unpooled else lacks,
        "misshapen": sorted(map(str, info["mismatched_keys"])),
    }
    state_dicts.refuse_keys(wrong, str(path))
    mean, std, pixels = _preprocessing(processor.to_dict(), str(path))
    _check_preprocessing(processor, mean, std, pixels, str(path))
    features = "class token" if unpooled else "pooled output"
    return wrap(
        _Pooled(model.float(), class_token=unpooled),
        name=name,
        network=f"{type(model).__name__} of transformers, {features}",
        source=path.name,
        pixels=pixels,
        mean=mean,
        std=std,
        checkpoint=path.name,
        checkpoint_sha256=state_dicts.weights_digest(model),
        **fields,
    )


# keys that a file may have in addition to the vision model: classifiers, a pixel decoder, a text model
_HEADS = (
    "classifier.",
    "cls_classifier.",
    "distillation_classifier.",
    "head.",
    "lm_head.",
    "decoder.",
    "text_model.",
    "text_projection.",
    "visual_projection.",
    "logit_scale",
    "logit_bias",
)


class _Pooled(nn.Module):
    """Maps [B, 3, H, W] to [B, F], and to the map of the last hidden state."""

    def __init__(self, model: Any, *, class_token: bool) -> None:
        super().__init__()
        self.model = model
        self.class_token = class_token
        takes = inspect.signature(model.forward).parameters
        self.options = {"interpolate_pos_encoding": True} if "interpolate_pos_encoding" in takes else {}

    def forward(self, images: Tensor) -> Tensor:
        """Features of normalised floats."""
        return self._features(self.model(pixel_values=images, **self.options))

    def features_and_map(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Features, and the last hidden state as a map [B, F, h, w], without class, distillation and register tokens."""
        output = self.model(pixel_values=images, **self.options)
        hidden: Tensor = output.last_hidden_state
        if hidden.ndim == 4:
            return self._features(output), hidden
        side = getattr(self.model.config, "patch_size", 1)
        height, width = side if isinstance(side, (list, tuple)) else (side, side)
        size = images.shape[2] // height, images.shape[3] // width
        prefix = hidden.shape[1] - size[0] * size[1]  # negative for Swin, which merges patches
        return self._features(output), arrange(hidden, size, prefix=max(prefix, 0))

    def _features(self, output: Any) -> Tensor:
        if self.class_token:
            token: Tensor = output.last_hidden_state[:, 0]
            return token
        pooled = output.get("pooler_output")
        if pooled is None:
            raise ValueError("it has no pooled output: load it with module:function")
        vector: Tensor = pooled.flatten(1)
        return vector


def _preprocessing(processor: dict[str, Any], where: str) -> tuple[Rgb, Rgb, int]:
    """Returns mean, std and side of the crops that an image processor makes."""
    scale = processor.get("rescale_factor", 1 / 255) if processor.get("do_rescale", True) else 1
    if abs(scale * 255 - 1) > 1e-6:
        raise CheckpointError(f"{where}: its image processor scales pixels by {scale}, expected 1/255")
    size = processor.get("crop_size") if processor.get("do_center_crop") else processor.get("size")
    side = next((size[key] for key in ("height", "shortest_edge") if size.get(key)), None) if isinstance(size, dict) else size
    if not isinstance(side, int):
        raise CheckpointError(f"{where}: the crop size of its image processor is unknown: {size}")
    if not processor.get("do_normalize", "image_mean" in processor):
        return (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), side
    return _rgb(processor, "image_mean", where), _rgb(processor, "image_std", where), side


def _rgb(processor: dict[str, Any], name: str, where: str) -> Rgb:
    """Returns three numbers; a single one applies to all channels, as in transformers."""
    value = processor.get(name)
    values: list[Any] = [*value] if isinstance(value, (list, tuple)) else [value]
    try:
        red, green, blue = (float(number) for number in (values * 3 if len(values) == 1 else values))
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{where}: its image processor's {name} is {value!r}, expected three numbers") from error
    return red, green, blue


def _check_preprocessing(processor: Any, mean: Rgb, std: Rgb, pixels: int, where: str) -> None:
    """Raises CheckpointError if the image processor computes anything other than (x / 255 - mean) / std."""
    image = np.random.default_rng(0).integers(0, 256, (pixels, pixels, 3), dtype=np.uint8)
    try:
        made = processor(images=[image], do_resize=False, do_center_crop=False, return_tensors="np")["pixel_values"]
    except Exception as error:  # another kind of processor may raise anything
        raise CheckpointError(f"{where}: its image processor failed: {type(error).__name__}: {error}") from error
    expected = ((image / 255 - np.array(mean)) / np.array(std)).transpose(2, 0, 1)[None]
    if made.shape != expected.shape or np.abs(made - expected).max() > 1e-3:
        raise CheckpointError(
            f"{where}: its image processor does more than scale and normalise (for instance, it reorders the channels): load "
            "it with module:function"
        )
