"""A user's own image source works in every verb: a test of `ImageSource` and `SOURCES`."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from fkd_ssl.errors import RequestError
from fkd_ssl.images import SOURCES, ImageSource, open_images, scan
from fkd_ssl.images.named import Arrays
from fkd_ssl.store import open_store

# the source

COLOURS = {"ash": (60, 90, 190), "birch": (70, 170, 80), "cedar": (190, 80, 60)}


class Noise(ImageSource):
    """Noise around three colours, `noise:SEED:COUNT`, generated when it is read."""

    def __init__(self, spec: str) -> None:
        _, self.seed, count = spec.split(":")
        names = [f"{colour}/{k:03d}.png" for colour in COLOURS for k in range(int(count))]
        super().__init__(spec, names, [list(COLOURS).index(name.split("/")[0]) for name in names], list(COLOURS))

    def read(self, index: int) -> bytes:
        generator = np.random.default_rng((int(self.seed), index))
        pixels = generator.normal(0, 50, (40, 44, 3)) + COLOURS[self.classes[self.labels[index]]]
        file = io.BytesIO()
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, format="png")
        return file.getvalue()


# the test

PRECOMPUTE = "precompute --teacher own_teacher:make --crops 4 --codec Flat --chunk_size 16"
TRAIN = "train --student squeezenet1_1 --epochs 1 --batch_size 18 --crops_per_image 2 --pixels 32 --log_every 1"


@pytest.fixture(autouse=True)
def sources(monkeypatch: pytest.MonkeyPatch) -> None:
    def memory(spec: str) -> ImageSource:
        source = Noise(spec.replace("memory", "noise"))
        pixels = np.stack([source.pixels(k) for k in range(len(source))])
        return Arrays(spec, pixels, source.labels, source.classes)

    monkeypatch.setitem(SOURCES, "noise", Noise)
    monkeypatch.setitem(SOURCES, "memory", memory)


def as_tars(source: ImageSource, folder: Path) -> str:
    for shard in range(2):
        with tarfile.open(folder / f"{shard}.tar", "w") as tar:
            for k in range(shard, len(source), 2):
                member = tarfile.TarInfo(source.names[k])
                member.size = source.byte_size(k)
                tar.addfile(member, io.BytesIO(source.read(k)))
    return f"{folder}/{{0..1}}.tar"


def as_parquet(source: ImageSource, folder: Path) -> str:
    images = [{"bytes": source.read(k), "path": source.names[k]} for k in range(len(source))]
    pq.write_table(pa.table({"image": images}), folder / "all.parquet", row_group_size=4)
    return f"{folder}/all.parquet"


def as_list(source: ImageSource, folder: Path) -> str:
    for k, name in enumerate(source.names):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(source.read(k))
    (folder / "all.txt").write_text("\n".join(source.names))
    return f"{folder}/all.txt"


def spec_of(kind: str, seed: int, count: int) -> str:
    """The spec of a source of this kind with the images of `noise:SEED:COUNT`, in files below KIND-SEED."""
    if kind in SOURCES:
        return f"{kind}:{seed}:{count}"
    folder = Path(f"{kind}-{seed}")
    folder.mkdir()
    return {"tars": as_tars, "parquet": as_parquet, "list": as_list}[kind](Noise(f"noise:{seed}:{count}"), folder)


@pytest.mark.parametrize("kind", ["noise", "memory", "tars", "parquet"])
def test_it_works_in_every_verb(work: Path, call: Any, kind: str) -> None:
    images, val = spec_of(kind, 0, 6), spec_of(kind, 1, 4)
    assert call(f"{PRECOMPUTE} --images {images} --store own").status == 0
    store = open_store("own")
    assert (len(store), store.paths[7]) == (18, open_images(images).names[7])
    assert call(f"verify own --images {images} --teacher own_teacher:make").status == 0
    assert call(f"{TRAIN} --images {images} --store own --val {val} --workers 1 --out run").status == 0
    assert json.loads(Path("run/results.json").read_text())["steps"] == 1
    assert call(f"knn --model run --train {images} --val {val} --workers 1").status == 0
    assert call(f"linear --model run --protocol logreg --train {images} --val {val} --workers 0").status == 0
    assert call(f"retrieve --model run --gallery {images} --query train/ash/0.png --workers 0 --sheet near.png").status == 0
    assert call(f"show own --images {images} --image {store.paths[7]}").status == 0
    assert call(f"plan --images {images} --teacher own_teacher:make --crops 4").status == 0
    assert call(f"label-maps --images {images} --teacher own_teacher:pooled --k 2 --out maps").status == 0
    relabelled = "--targets relabel --label_maps maps --head classifier --objective soft_ce"
    assert call(f"{TRAIN} --images {images} {relabelled} --workers 0 --out other").status == 0
    pretrain = "pretrain --arch resnet18 --epochs 1 --batch_size 6 --pixels 32 --queue 12 --workers 0"
    assert call(f"{pretrain} --images {images} --out moco").status == 0
    (work / "own/crops/00000.json").unlink()
    assert call(f"verify own --images {images} --teacher own_teacher:make --repair").status == 0


@pytest.mark.parametrize("kind", ["noise", "tars", "parquet", "list"])
def test_what_holds_the_images_does_not_matter(work: Path, call: Any, kind: str) -> None:
    """The same images under the same names make the same store."""
    source = Noise("noise:0:6")
    for k, name in enumerate(source.names):
        Path("folder", name).parent.mkdir(parents=True, exist_ok=True)
        Path("folder", name).write_bytes(source.read(k))
    images = spec_of(kind, 0, 6)
    for spec, store in ((images, "one"), ("folder", "other")):
        assert call(f"{PRECOMPUTE} --images {spec} --store {store}").status == 0
    files = [sorted(path.relative_to(store) for path in Path(store).rglob("*") if path.is_file()) for store in ("one", "other")]
    assert files[0] == files[1]
    assert all(Path("one", name).read_bytes() == Path("other", name).read_bytes() for name in files[0])
    assert source.digest() == scan("folder").digest()
    assert call("verify one --images folder").status == 0
    assert call(f"cache --images {images} --out small --short_side 20").status == 0
    assert scan("small").names == source.names


OWN_MODULE = """
from fkd_ssl.images import scan
from fkd_ssl.images.named import Arrays

def half():
    return scan("train").subset(range(0, 18, 2))

def wrong():
    return "train"

def broken():
    raise ValueError("my own mistake")
"""


def test_a_function_in_place_of_a_folder(work: Path, call: Any) -> None:
    Path("own_images.py").write_text(OWN_MODULE)
    assert call(f"{PRECOMPUTE} --images own_images:half --store own").status == 0
    assert open_store("own").paths == scan("train").names[::2]
    for name, status, said in (
        ("own_images:halves", 2, "images own_images:halves: module 'own_images' has no function 'halves'; did you mean"),
        ("own_image:half", 2, "images own_image:half: No module named 'own_image' (the current folder is on the path)"),
        ("own_images:wrong", 1, "images own_images:wrong: returned a str, expected a fkd_ssl.images.ImageSource"),
        ("own_images:broken", 1, "images own_images:broken: ValueError: my own mistake"),
        ("cifar11:test:x", 2, "no kind of image set 'cifar11'"),
    ):
        answer = call(f"{PRECOMPUTE} --images {name} --store other")
        assert (answer.status, said in answer.err) == (status, True), answer.err


def test_a_changed_image_is_found(work: Path, call: Any) -> None:
    assert call(f"{PRECOMPUTE} --images noise:0:6 --store own").status == 0
    changed = call("verify own --images noise:1:6")
    assert (changed.status, "noise:1:6/ash/000.png: changed since its crops were made" in changed.out) == (1, True)
    trained = call(f"{TRAIN} --images noise:1:6 --store own --workers 0 --out run")
    assert (trained.status, "changed since the store was made" in trained.err) == (1, True)


@pytest.mark.parametrize("names", [["a/1.png", "a/1.png"], ["a\nb.png"], ["a/e\u0301.png"], ["a\u2028.png"], ["\udce9.png"]])
def test_names_that_a_store_cannot_keep_are_refused(monkeypatch: pytest.MonkeyPatch, names: list[str]) -> None:
    class Wrong(Noise):
        def __init__(self, spec: str) -> None:
            ImageSource.__init__(self, spec, names, [-1] * len(names), [])

    monkeypatch.setitem(SOURCES, "wrong", Wrong)
    with pytest.raises(RequestError, match="wrong:x: "):
        open_images("wrong:x")
