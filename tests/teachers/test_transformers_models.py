"""Small random vision models of transformers against transformers called directly, with the normalisation written out."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fkd_ssl.errors import CheckpointError, FkdError, RequestError
from fkd_ssl.maps import feature_map, features_and_map
from fkd_ssl.teachers import load_teacher
from fkd_ssl.teachers.transformers_models import _Pooled

transformers = pytest.importorskip("transformers")

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
MEAN, STD = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)


@pytest.fixture
def images() -> Tensor:
    return torch.randint(0, 256, (2, 3, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def normalised(images: Tensor) -> Tensor:
    return (images / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def saved(model: Any, folder: Path, **processor: Any) -> Any:
    model.eval().save_pretrained(folder)
    given = {"image_mean": MEAN, "image_std": STD, "size": {"shortest_edge": 32}, "crop_size": {"height": 28, "width": 28}}
    transformers.BitImageProcessor(**{**given, **processor}).save_pretrained(folder)
    return model


def dinov2() -> Any:
    torch.manual_seed(0)
    return transformers.Dinov2Model(transformers.Dinov2Config(**SIZES, image_size=28, patch_size=14))


def vit(**options: Any) -> Any:
    torch.manual_seed(0)
    return transformers.ViTModel(transformers.ViTConfig(**SIZES, image_size=28, patch_size=14), **options)


@pytest.mark.parametrize("make", [dinov2, vit])
def test_the_pooled_output_and_preprocessing(make: Any, images: Tensor, normalised: Tensor, tmp_path: Path) -> None:
    model = saved(make(), tmp_path / "model")
    teacher = load_teacher("transformers", checkpoint=tmp_path / "model")
    assert (teacher.info.mean, teacher.info.std, teacher.info.pixels, teacher.info.spec.size) == (MEAN, STD, 28, 32)
    assert (teacher.info.checkpoint, teacher.info.network) == (
        "model",
        f"{type(model).__name__} of transformers, pooled output",
    )
    with torch.inference_mode():
        expected = model(pixel_values=normalised).pooler_output
    torch.testing.assert_close(teacher.features(images), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(teacher.embed(images), nn.functional.normalize(expected, dim=1), rtol=0, atol=1e-5)
    assert teacher.embed(images.repeat(1, 1, 2, 2)).shape == (2, 32)  # another size


def test_the_class_token_where_the_pooler_has_no_weights(images: Tensor, normalised: Tensor, tmp_path: Path) -> None:
    model = saved(vit(add_pooling_layer=False), tmp_path)
    teacher = load_teacher("transformers", checkpoint=tmp_path)
    assert teacher.info.network == "ViTModel of transformers, class token"
    with torch.inference_mode():
        expected = model(pixel_values=normalised).last_hidden_state[:, 0]
    torch.testing.assert_close(teacher.features(images), expected, rtol=1e-4, atol=1e-5)
    again = load_teacher("transformers", checkpoint=tmp_path)
    assert torch.equal(again.embed(images), teacher.embed(images))


def test_the_size_without_a_centre_crop_and_pixels_that_are_not_normalised(tmp_path: Path) -> None:
    saved(dinov2(), tmp_path, do_center_crop=False, do_normalize=False, size={"height": 42, "width": 42})
    teacher = load_teacher("transformers", checkpoint=tmp_path)
    assert (teacher.info.pixels, teacher.info.mean, teacher.info.std) == (42, (0, 0, 0), (1, 1, 1))


def test_a_model_that_lacks_weights_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    saved(dinov2(), tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    del state["layernorm.weight"]
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"its keys do not fit: 1 missing \(layernorm\.weight\)"):
        load_teacher("transformers", checkpoint=tmp_path)


def test_pickles_are_not_read(tmp_path: Path) -> None:
    model = saved(dinov2(), tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"transformers cannot read it as a vision model in safetensors"):
        load_teacher("transformers", checkpoint=tmp_path)


def test_a_model_of_text_is_refused(tmp_path: Path) -> None:
    saved(transformers.BertModel(transformers.BertConfig(**SIZES, vocab_size=50)), tmp_path)
    with pytest.raises(CheckpointError, match=r"a BertModel takes input_ids; expected a vision model"):
        load_teacher("transformers", checkpoint=tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rescale_factor": 1.0}, r"its image processor scales pixels by 1\.0, expected 1/255"),
        ({"do_rescale": False}, r"scales pixels by 1, expected 1/255"),
    ],
)
def test_other_pixels_are_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    saved(dinov2(), tmp_path, **change)
    with pytest.raises(CheckpointError, match=message):
        load_teacher("transformers", checkpoint=tmp_path)


def test_a_pooled_output_is_needed(tmp_path: Path) -> None:
    config = transformers.ViTMAEConfig(**SIZES, image_size=28, patch_size=14)
    saved(transformers.ViTMAEModel(config), tmp_path)
    with pytest.raises(FkdError, match=r"it has no pooled output: load it with module:function"):
        load_teacher("transformers", checkpoint=tmp_path)


def test_folders_that_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RequestError, match=r"none: not found; expected the folder of a transformers model"):
        load_teacher("transformers", checkpoint=tmp_path / "none")
    (tmp_path / "file").touch()
    with pytest.raises(RequestError, match=r"file: a file; expected the folder"):
        load_teacher("transformers", checkpoint=tmp_path / "file")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "nothing"}))
    with pytest.raises(CheckpointError, match=r"transformers cannot read it as a vision model"):
        load_teacher("transformers", checkpoint=tmp_path)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(RequestError, match=r"transformers is not installed .*pip install 'fkd_ssl\[transformers\]'"):
        load_teacher("transformers", checkpoint=tmp_path)


LAYOUTS: dict[str, Callable[[], tuple[Any, int]]] = {
    "ViT": lambda: (transformers.ViTModel(transformers.ViTConfig(**SIZES, image_size=28, patch_size=14)), 1),
    "DeiT": lambda: (transformers.DeiTModel(transformers.DeiTConfig(**SIZES, image_size=28, patch_size=14)), 2),
    "DINOv2": lambda: (dinov2(), 1),
    "registers": lambda: (
        transformers.Dinov2WithRegistersModel(
            transformers.Dinov2WithRegistersConfig(**SIZES, image_size=28, patch_size=14, num_register_tokens=4)
        ),
        5,
    ),
    "DINOv3": lambda: (
        transformers.DINOv3ViTModel(transformers.DINOv3ViTConfig(**SIZES, image_size=28, patch_size=14, num_register_tokens=4)),
        5,
    ),
    "SigLIP": lambda: (
        transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**SIZES, image_size=28, patch_size=14)),
        0,
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize(("height", "width"), [(28, 28), (42, 70)])
def test_the_map_is_the_last_hidden_state_without_other_tokens(name: str, height: int, width: int) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, prefix = LAYOUTS[name]()
        given = torch.randn(2, 3, height, width)
    network = _Pooled(model.eval(), class_token=False)
    features, found = features_and_map(network, given)
    output = model(pixel_values=given, **network.options)
    rows, columns = height // 14, width // 14
    assert output.last_hidden_state.shape[1] == prefix + rows * columns
    expected = output.last_hidden_state[:, prefix:].reshape(2, rows, columns, -1).permute(0, 3, 1, 2)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    torch.testing.assert_close(features, output.pooler_output, rtol=0, atol=0)


def test_maps_of_a_convolutional_network_and_of_merged_patches() -> None:
    with torch.random.fork_rng(devices=[]):
        convnext = transformers.ConvNextModel(
            transformers.ConvNextConfig(hidden_sizes=[4, 4, 4, 8], depths=[1, 1, 1, 1])
        ).eval()
        swin = transformers.SwinModel(
            transformers.SwinConfig(image_size=64, embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=4)
        ).eval()
    given = torch.zeros(1, 3, 64, 96)
    torch.testing.assert_close(feature_map(_Pooled(convnext, class_token=False), given), convnext(given).last_hidden_state)
    found = feature_map(_Pooled(swin, class_token=False), given)
    expected = swin(given, interpolate_pos_encoding=True).last_hidden_state.reshape(1, 8, 12, 16).permute(0, 3, 1, 2)
    torch.testing.assert_close(found, expected)
