"""segment through the command line and from Python."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import fkd_ssl
from fkd_ssl.commands import report
from fkd_ssl.errors import RequestError
from fkd_ssl.images import open_images

COLOURS = np.array([(70, 70, 70), (200, 60, 50), (60, 70, 210)])
SETS = "--train train/images,train/masks --val val/images,val/masks --workers 0 --steps 30"
NETWORKS = """
import torch
from torch import nn

class Network(nn.Module):
    pixels = 64

    def __init__(self, channels=8, seed=0):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.layers = nn.Sequential(nn.Conv2d(3, channels, 8, stride=8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())

    def forward(self, images):
        return self.layers(images)

def net():
    return Network()

def other():
    return Network(seed=1)

def flat():
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 4))
"""


def write_stripes(folder: Path, count: int, seed: int) -> None:
    """Pictures of a stripe and a square on grey, and their masks of three classes with a void border."""
    generator = np.random.default_rng(seed)
    for part in ("images", "masks"):
        (folder / part).mkdir(parents=True)
    for k in range(count):
        labels = np.zeros((64, 96), dtype=np.uint8)
        first = generator.integers(8, 60)
        labels[:, first : first + 24] = 1
        labels[20:44, 10:34] = 2
        pixels = COLOURS[labels] + generator.normal(0, 30, (64, 96, 3))
        labels[:, :4] = 255
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"images/{k}.jpg", quality=95)
        Image.fromarray(labels).save(folder / f"masks/{k}.png")


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stripes")
    write_stripes(folder / "train", 10, 0)
    write_stripes(folder / "val", 5, 1)
    (folder / "networks.py").write_text(NETWORKS)
    return folder


@pytest.fixture
def place(sets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = Path(shutil.copytree(sets, tmp_path / "place"))
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    return folder


def test_the_table_the_line_and_the_json(place: Path, call: Any) -> None:
    line = f"segment --model networks:net {SETS} --classes floor,stripe,square"
    status, out, err = call(line)
    assert status == 0
    *table, last = out.splitlines()
    assert [row.split()[0] for row in table] == ["class", "floor", "stripe", "square"]
    assert last.startswith("networks:net: segmentation at 64 px: mIoU ")
    assert "most frequent class" in last
    assert "maps of 8 x 12 positions and 8 channels; those of 10 images take " in err
    found = json.loads(call(f"{line} --json").out)
    assert found["kind"] == "segment"
    assert found["miou"] == pytest.approx(np.mean([row["iou"] for row in found["per_class"].values()]))
    assert found["miou"] > found["baselines"]["majority"]
    assert found["transform"] == {"short_side": 64, "multiple": 32}
    assert found["data"]["val"]["images"] == 5
    assert len(found["data"]["val"]["masks_sha256"]) == 64
    assert f"mIoU {found['miou']:.2f} % (95 % interval " in last


def test_a_finished_run_is_shown_and_another_is_refused(place: Path, call: Any) -> None:
    line = f"segment --model networks:net {SETS} --out seg"
    first = call(line)
    again = call(f"{line} --workers 1 --max_memory 1 --pixels 64")
    assert again.out == first.out
    assert "seg: this evaluation is done" in again.err
    assert np.load("seg/counts.npy", allow_pickle=False).shape == (5, 9)
    assert "pixels is" in call(f"{line} --pixels 96").err
    changed = np.asarray(Image.open("val/masks/1.png")).copy()
    changed[0, 50] = 0
    Image.fromarray(changed).save("val/masks/1.png")
    os.utime("val/masks/1.png", (1, 1))
    status, _, err = call(line)
    assert status == 2
    assert "contents of val masks changed since the run began" in err


def test_damaged_images_and_masks_are_left_out_on_request(place: Path, call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The score is then that of the sets without them; a header is read before the pixels, so both are damaged."""
    line = f"segment --model networks:net {SETS} --json"
    damaged = [place / name for name in ("train/images/9.jpg", "train/masks/8.png", "val/images/4.jpg", "val/masks/3.png")]
    for path in damaged:
        path.write_bytes(path.read_bytes()[: 700 if path.suffix == ".jpg" else 60])
    status, out, err = call(f"{line} --out seg")
    assert (status, out) == (1, "")
    assert "train/masks/8.png: " in err
    assert "remove it or pass --on_unreadable skip" in err
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    skipped = call(f"{line} --on_unreadable skip --out seg")
    assert "warning: skipped 4 unreadable images, for instance train/images/9.jpg: " in skipped.err
    assert re.search(r"maps of train: 100%.* 9/9 .*maps of val: 100%.* 4/4 ", skipped.err, re.DOTALL)
    again = call(f"{line} --on_unreadable skip --out seg")
    assert again.out == skipped.out
    assert again.err == "seg: this evaluation is done; it skipped 4 unreadable images\n"
    found = json.loads(skipped.out)
    assert found["unreadable_images"] == 4
    assert (found["n_train"], found["n_val"]) == (8, 3)
    assert np.load("seg/counts.npy", allow_pickle=False).shape == (3, 9)
    for path in damaged:
        for kind, suffix in (("images", "jpg"), ("masks", "png")):
            (path.parents[1] / kind / f"{path.stem}.{suffix}").unlink()
    without = json.loads(call(line).out)
    for key in ("miou", "knn_miou", "interval95", "per_class", "baselines"):
        assert found[key] == without[key], key
    for path in (place / "val/images").iterdir():
        path.write_bytes(path.read_bytes()[:700])
    status, _, err = call(f"{line} --on_unreadable skip")
    assert (status, "val/images: none of its 3 images can be read" in err) == (1, True), err


@pytest.mark.slow
def test_a_killed_evaluation_is_begun_again(place: Path, call: Any) -> None:
    line = f"segment --model networks:net {SETS.replace('--steps 30', '--steps 3000')} --out".split()
    command = [sys.executable, "-m", "fkd_ssl", *line, "seg"]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL, env={**os.environ, "PYTHONPATH": "."}) as process:
        while process.poll() is None and not Path("seg/inputs.json").exists():
            time.sleep(0.01)
        time.sleep(0.5)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    assert not Path("seg/results.json").exists()
    results = [call(" ".join([*line, name])).out.partition(": ")[2] for name in ("seg", "whole")]
    assert results[0] == results[1] != ""


def test_from_python(place: Path) -> None:
    from networks import Network

    given = {"train": ["train/images", "train/masks"], "steps": 30, "workers": 0}
    val = [open_images("val/images"), open_images("val/masks")]
    found = fkd_ssl.segment(model=Network(), val=val, classes=["floor", "stripe", "square"], pixels=64, **given)
    named = fkd_ssl.segment(model="networks:net", val="val/images,val/masks", classes=3, **given)
    assert found.miou == named.miou
    assert np.array_equal(found.counts, named.counts)
    assert list(found.per_class) == ["floor", "stripe", "square"]
    assert found.interval95[0] <= found.miou <= found.interval95[1]
    assert 0 < found.knn_miou <= 100
    assert set(found.baselines) == {"colours", "colours_knn", "majority"}
    for value in ([1, 2, 3], ("a", "b", "c"), [nn.Identity(), "val/masks"]):
        with pytest.raises(RequestError):
            fkd_ssl.segment(model=Network(), val=value, **given)


def test_a_student_a_library_network_and_a_vision_transformer(place: Path, call: Any) -> None:
    torch.manual_seed(0)
    from torchvision import models

    torch.save(models.resnet18().state_dict(), "r18.pth")
    small = f"{SETS} --steps 2 --json"
    found = json.loads(call(f"segment --model torchvision/resnet18 --checkpoint r18.pth --pixels 64 {small}").out)
    assert (found["map"], found["feature_dim"]) == ([2, 3], 512)
    timm = pytest.importorskip("timm")
    vit = timm.create_model("vit_tiny_patch16_224", num_classes=0)
    torch.save(vit.state_dict(), "vit.pth")
    found = json.loads(call(f"segment --model timm/vit_tiny_patch16_224 --checkpoint vit.pth --pixels 64 {small}").out)
    assert (found["map"], found["feature_dim"]) == ([4, 6], 192)


def test_a_trained_student_and_its_export(work: Path, sets: Path, call: Any, train_line: str) -> None:
    for name in ("train", "val"):
        shutil.copytree(sets / name, work / f"seg/{name}")
    assert call(f"{train_line} --out run").status == 0
    assert call("export --model run --out student.safetensors").status == 0
    sets_of = "--train seg/train/images,seg/train/masks --val seg/val/images,seg/val/masks --workers 0 --steps 5 --pixels 64"
    lines = [call(f"segment --model {model} {sets_of}").out.partition(": ")[2] for model in ("run", "student.safetensors")]
    assert lines[0] == lines[1] != ""


def test_report_has_the_mean_iou_and_differences(place: Path, call: Any) -> None:
    for name in ("net", "other"):
        assert call(f"segment --model networks:{name} {SETS} --out runs/{name}").status == 0
    assert call(f"segment --model networks:net {SETS.replace('30', '31')} --out runs/departs").status == 0
    heading, _, *rows = call("report runs --baseline networks:net").out.splitlines()
    assert "| mIoU | kNN mIoU | difference |" in heading
    assert len(rows) == 3
    assert any("steps 31 instead of 500" in row for row in rows)
    found = {row["model"]: row for row in json.loads(call("report runs --baseline networks:net --json").out)["rows"]}
    other = found["networks:other"]
    means = [json.loads(Path(f"runs/{name}/results.json").read_text())["miou"] for name in ("other", "net")]
    assert other["difference"] == pytest.approx(means[0] - means[1])
    assert other["low"] <= other["difference"] <= other["high"]
    assert other["pixels"] == 64
    assert report.KINDS == ("knn", "linear", "segment", "retrieve")


def test_wrong_requests(place: Path, call: Any) -> None:
    Image.fromarray(np.zeros((64, 96, 3), np.uint8)).save("rgb.png")
    (place / "rgb").mkdir()
    for k in range(5):
        shutil.copy("rgb.png", f"rgb/{k}.png")
    for name in ("small", "beyond"):
        shutil.copytree("val/masks", name)
    Image.open("val/masks/0.png").resize((48, 32)).save("small/0.png")
    Image.fromarray(np.full((64, 96), 7, np.uint8)).save("beyond/3.png")
    val = "--train train/images,train/masks --workers 0 --steps 3 --val"
    for line, message in (
        (f"--model networks:net {val} val/images", "--val val/images: expected IMAGES,MASKS"),
        (f"--model networks:net {val} val/images,val/masks,val", "expected IMAGES,MASKS"),
        (f"--model networks:net {val} val/images,rgb", "rgb/0.png: expected a mask: a PNG with one byte per pixel"),
        (f"--model networks:net {val} val/images,nowhere", "nowhere"),
        (f"--model networks:net {val} val/images,small", "small/0.png: a mask of 48 x 32 px for an image of 96 x 64 px"),
        (f"--model networks:net {val} val/images,beyond", "beyond/3.png: has label 7, but there are 3 classes, 0 to 2 (as in"),
        (f"--model networks:net {val} val/images,train/masks", "train/masks: 5 of 10 masks have no image in val/images"),
        (f"--model networks:net {SETS} --classes 2", "train/masks/0.png: has label 2, but there are 2 classes, 0 to 1"),
        (f"--model networks:net {SETS} --classes 1", "--classes 1: must be between 2 and 255"),
        (f"--model networks:net {SETS} --ignore 256", "--ignore 256: must be between 0 and 255"),
        (f"--model networks:net {SETS} --max_memory 1e-6", "over --max_memory 1e-06 GB: choose smaller --pixels"),
        (f"--model networks:flat {SETS}", "has no feature map"),
    ):
        status, out, err = call(f"segment {line}")
        assert (status, out) == (2, ""), err
        assert message in err
        assert err.count("fkd-ssl segment: ") == 1


@pytest.mark.data
@pytest.mark.skipif("FKD_SSL_DATA" not in os.environ, reason="FKD_SSL_DATA is not set")
def test_camvid_real_data(call: Any, tmp_path: Path) -> None:
    """Real data: a MoCo v2 ResNet-18 is better than colours and places on street scenes."""
    data = Path(os.environ["FKD_SSL_DATA"])
    camvid, teacher = data / "data/camvid", data / "teachers/mocov2_r18_imagenette.pth.tar"
    sets = f"--train {camvid}/train/images,{camvid}/train/masks --val {camvid}/val/images,{camvid}/val/masks --ignore 11"
    found = json.loads(call(f"segment --model teacher:mocov2 --checkpoint {teacher} --pixels 192 {sets} --json").out)
    assert (found["classes"], found["n_train"], found["n_val"]) == (11, 367, 101)
    assert found["miou"] > found["baselines"]["colours"] > found["baselines"]["majority"]
    assert found["knn_miou"] > found["baselines"]["majority"]
