"""Random networks of timm against timm called directly, with the normalisation written out."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fkd_ssl.checkpoints import digest
from fkd_ssl.errors import CheckpointError, RequestError
from fkd_ssl.teachers import load_teacher

timm = pytest.importorskip("timm")

SMALL = "vit_tiny_patch16_224.augreg_in21k_ft_in1k"
DINO, DINOV2 = "vit_small_patch16_224.dino", "vit_small_patch14_dinov2.lvd142m"


def saved(name: str, path: Path, **options: Any) -> Any:
    torch.manual_seed(0)
    network = timm.create_model(name, pretrained=False, **options).eval()
    save_file(network.state_dict(), path) if path.suffix == ".safetensors" else torch.save(network.state_dict(), path)
    return network


def pixels(side: int, count: int = 2) -> Tensor:
    return torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def normalised(images: Tensor, config: Any) -> Tensor:
    mean, std = (torch.tensor(config[key]).view(3, 1, 1) for key in ("mean", "std"))
    return (images / 255 - mean) / std


@pytest.mark.parametrize(
    ("name", "suffix"),
    [(SMALL, ".pth"), (DINO, ".safetensors"), ("resnet18.a1_in1k", ".pth"), ("swin_tiny_patch4_window7_224", ".safetensors")],
)
def test_pooled_features_and_preprocessing_are_timms(name: str, suffix: str, tmp_path: Path) -> None:
    file = tmp_path / f"w{suffix}"
    network = saved(name, file)
    teacher = load_teacher(f"timm/{name}", checkpoint=file)
    config = timm.data.resolve_model_data_config(network)
    assert (teacher.info.mean, teacher.info.std, teacher.info.pixels) == (
        config["mean"],
        config["std"],
        config["input_size"][1],
    )
    assert config["interpolation"] in teacher.info.network
    # the user's file may have another licence than timm's weights
    assert teacher.info.licence == f"not stated; timm's own weights of {name}: {network.pretrained_cfg['license']}"
    assert (teacher.info.name, teacher.info.source, teacher.info.spec.size) == (name, f"timm/{name}", network.num_features)
    assert (teacher.info.checkpoint, teacher.info.checkpoint_sha256) == (file.name, digest(file))
    network.reset_classifier(0)
    images = pixels(teacher.info.pixels)
    with torch.inference_mode():
        expected = network(normalised(images, config))
    torch.testing.assert_close(teacher.features(images), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(teacher.embed(images), nn.functional.normalize(expected, dim=1), rtol=0, atol=1e-5)


def test_normalisation_other_than_imagenets_is_taken_over(tmp_path: Path) -> None:
    network = saved(SMALL, tmp_path / "w.pth")
    assert network.pretrained_cfg["mean"] == (0.5, 0.5, 0.5)  # otherwise the test proves nothing
    assert load_teacher(f"timm/{SMALL}", checkpoint=tmp_path / "w.pth").info.std == (0.5, 0.5, 0.5)


def test_dinov2_takes_other_sizes_than_its_own(tmp_path: Path) -> None:
    network = saved(DINOV2, tmp_path / "w.pth", num_classes=0, dynamic_img_size=True)
    teacher = load_teacher(f"timm/{DINOV2}", checkpoint=tmp_path / "w.pth")
    assert (teacher.info.pixels, teacher.info.spec.size) == (518, 384)
    images = pixels(98)
    with torch.inference_mode():
        expected = network(normalised(images, network.pretrained_cfg))
    torch.testing.assert_close(teacher.features(images), expected, rtol=1e-4, atol=1e-5)


def test_dinov2s_own_file_is_converted_by_timm(tmp_path: Path) -> None:
    """facebookresearch/dinov2 saves a mask token that the network does not need."""
    network = saved(DINOV2, tmp_path / "timm.pth", num_classes=0)
    torch.save({**network.state_dict(), "mask_token": torch.zeros(1, 384)}, tmp_path / "own.pth")
    own, same = (load_teacher(f"timm/{DINOV2}", checkpoint=tmp_path / f"{name}.pth") for name in ("own", "timm"))
    assert torch.equal(own.embed(pixels(56)), same.embed(pixels(56)))


@pytest.mark.parametrize(("layer", "dim"), [("layer2", 128), ("layer4.1.bn2", 512)])
def test_a_named_layer(layer: str, dim: int, tmp_path: Path) -> None:
    network = saved("resnet18.a1_in1k", tmp_path / "w.pth")
    teacher = load_teacher(f"timm/resnet18.a1_in1k@{layer}", checkpoint=tmp_path / "w.pth")
    assert (teacher.info.spec.size, teacher.info.name) == (dim, f"resnet18.a1_in1k-{layer}")
    seen: list[Tensor] = []
    network.get_submodule(layer).register_forward_hook(lambda module, inputs, output: seen.append(output.clone()))
    images = pixels(64)
    with torch.inference_mode():
        network(normalised(images, network.pretrained_cfg))
    expected = seen[0].mean(dim=(2, 3))
    torch.testing.assert_close(teacher.features(images), expected, rtol=1e-4, atol=1e-4)


def test_tokens_of_a_block(tmp_path: Path) -> None:
    network = saved(SMALL, tmp_path / "w.pth")
    teacher = load_teacher(f"timm/{SMALL}@blocks.3", checkpoint=tmp_path / "w.pth")
    with torch.inference_mode():
        tokens = network.forward_intermediates(
            normalised(pixels(224), network.pretrained_cfg),
            indices=[3],
            output_fmt="NLC",
            intermediates_only=True,
            return_prefix_tokens=True,
            norm=False,
        )
    patches, prefix = tokens[0]
    expected = torch.cat([prefix, patches], dim=1).mean(dim=1)
    torch.testing.assert_close(teacher.features(pixels(224)), expected, rtol=1e-4, atol=1e-5)


def test_loading_draws_no_random_numbers(tmp_path: Path) -> None:
    saved("resnet18.a1_in1k", tmp_path / "w.pth")
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    load_teacher("timm/resnet18.a1_in1k", checkpoint=tmp_path / "w.pth")
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize(
    ("name", "checkpoint", "message"),
    [
        (f"timm/{DINOV2}", None, r"--checkpoint is needed: .* pretrained, which lets timm download .*licence apache-2\.0"),
        ("timm/resnet19", None, r"timm has no such model; did you mean resnet"),
        ("timm/resnet18.nowhere", None, r"timm cannot make it: .*nowhere"),
        (f"timm/{DINOV2}", "none.pth", r"none\.pth: not found"),
    ],
)
def test_what_is_refused(name: str, checkpoint: str | None, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        load_teacher(name, checkpoint=checkpoint)


def test_another_networks_weights_are_refused(tmp_path: Path) -> None:
    saved("resnet34.a1_in1k", tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match=r"not the state_dict of timm/resnet18: .* unexpected \(layer1\.2\.conv1\.weight"):
        load_teacher("timm/resnet18", checkpoint=tmp_path / "w.pth")


def test_without_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(RequestError, match=r"timm is not installed .*pip install 'fkd_ssl\[timm\]'"):
        load_teacher("timm/resnet18")


def test_its_own_weights_when_asked(tmp_path: Path) -> None:
    """From timm's own cache folder; and the message if the file is missing."""
    repository = tmp_path / "hub" / "models--timm--resnet18.a1_in1k"
    snapshot = repository / "snapshots" / "one"
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("one")
    saved("resnet18.a1_in1k", snapshot / "model.safetensors")
    code = (
        "import sys, torch; from fkd_ssl.errors import FkdError; from fkd_ssl.teachers import load_teacher\n"
        "a, b = (load_teacher('timm/resnet18.a1_in1k', checkpoint=c) for c in ('pretrained', sys.argv[1]))\n"
        "crops = torch.arange(2 * 3 * 64 * 64).view(2, 3, 64, 64).to(torch.uint8)\n"
        "print(torch.equal(a.embed(crops), b.embed(crops)), a.info.checkpoint, a.info != b.info)\n"
        "try: load_teacher('timm/resnet34.a1_in1k', checkpoint='pretrained')\n"
        "except FkdError as error: print(error.exit_status, ' '.join(str(error).split()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(snapshot / "model.safetensors")],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    first, second = done.stdout.splitlines()
    assert first == "True pretrained True"
    assert second.startswith("1 teacher timm/resnet34.a1_in1k: timm could not download its weights")
    assert second.endswith("Without a network: get the file on another machine and pass it as --checkpoint")


@pytest.mark.parametrize("changed", [("patch_embed.proj.weight", (192, 3, 32, 32)), ("pos_embed", (1, 50, 192))])
def test_weights_that_timm_would_resample_are_refused(tmp_path: Path, changed: tuple[str, tuple[int, ...]]) -> None:
    state = saved(SMALL, tmp_path / "w.pth").state_dict()
    torch.save({**state, changed[0]: torch.zeros(changed[1])}, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match=rf"1 misshapen \({changed[0]} "):
        load_teacher(f"timm/{SMALL}", checkpoint=tmp_path / "w.pth")


@pytest.mark.parametrize(("name", "key"), [(SMALL, "head.evil.weight"), ("resnet18.a1_in1k", "fc.bogus")])
def test_only_the_classifiers_own_keys_are_left_out(tmp_path: Path, name: str, key: str) -> None:
    state = saved(name, tmp_path / "w.pth").state_dict()
    torch.save({**state, key: torch.zeros(3)}, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match=r"1 unexpected"):
        load_teacher(f"timm/{name}", checkpoint=tmp_path / "w.pth")


def test_a_classifier_with_a_batchnorm_of_its_own_is_left_out_whole(tmp_path: Path) -> None:
    name = "levit_128s.fb_dist_in1k"
    saved(name, tmp_path / "w.pth")
    assert load_teacher(f"timm/{name}", checkpoint=tmp_path / "w.pth").info.spec.size == 384


@pytest.mark.parametrize("name", ["resnet18.a1_in1k", SMALL])
def test_probabilities_are_the_softmax_of_the_whole_classifier(name: str, tmp_path: Path) -> None:
    network = saved(name, tmp_path / "w.pth")
    teacher = load_teacher(f"timm/{name}@probabilities", checkpoint=tmp_path / "w.pth")
    assert (teacher.info.spec.kind, teacher.info.spec.size) == ("distribution", 1000)
    images = pixels(teacher.info.pixels)
    with torch.inference_mode():
        expected = network(normalised(images, timm.data.resolve_model_data_config(network))).softmax(dim=1)
    torch.testing.assert_close(teacher.embed(images), expected, rtol=1e-4, atol=1e-7)


def test_a_network_without_a_classifier_has_no_probabilities(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="has no classifier; leave @probabilities out"):
        load_teacher(f"timm/{DINO}@probabilities", checkpoint=tmp_path / "none")
