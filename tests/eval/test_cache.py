import multiprocessing
import os
import shutil

import numpy as np
import pytest
import torch

from fkd_ssl import files
from fkd_ssl.crops import centre, replay
from fkd_ssl.errors import FkdError, ImageError, StoreError
from fkd_ssl.eval import baselines, cache
from fkd_ssl.eval.features import extract
from fkd_ssl.images import scan


@pytest.fixture(autouse=True)
def small_parts(monkeypatch) -> None:
    monkeypatch.setattr(cache, "ROWS", 5)


def options(tmp_path, **more):
    return {
        "folder": tmp_path / "cache",
        "identity": "m",
        "pixels": 16,
        "batch_size": 4,
        "workers": 0,
        "progress": False,
        **more,
    }


class Counting(torch.nn.Module):
    """The backbone, which counts its images except the two of the check."""

    def __init__(self, backbone, stop_at=10**9) -> None:
        super().__init__()
        self.backbone, self.seen, self.stop_at = backbone, -2, stop_at

    def forward(self, pixels):
        self.seen += len(pixels)
        if self.seen >= self.stop_at:
            raise KeyboardInterrupt
        return self.backbone(pixels)


@pytest.mark.parametrize("per_class", [1, 5, 6])  # 4, 20 and 24 images: under a part, whole parts, a rest
def test_it_is_extract(make_set, backbone, tmp_path, per_class: int) -> None:
    images = make_set("set", per_class=per_class)
    plain, labels = extract(backbone, images, pixels=16, workers=0, progress=False)
    model = Counting(backbone)
    for _ in range(2):
        features, baseline, rows, entry = cache.cached(model, images, **options(tmp_path))
        np.testing.assert_allclose(features, plain, rtol=1e-4)
        np.testing.assert_array_equal(rows, np.arange(len(images)))
        views = np.stack([replay(images.pixels(i), centre(*images.pixels(i).shape[:2], 16), 16)[0] for i in rows])
        np.testing.assert_allclose(baseline, baselines.features(torch.from_numpy(views)), atol=1e-6)
    assert model.seen - 2 == len(images)  # the second time, only the check ran
    assert sorted(path.name for path in entry.iterdir()) == [
        "about.json",
        "baselines.npy",
        "done.json",
        "features.npy",
        "labels.npy",
        "noise.npy",
    ]
    np.testing.assert_array_equal(np.load(entry / "labels.npy", allow_pickle=False), labels)
    assert isinstance(features, np.memmap)
    assert not features.flags.writeable


def test_the_key_is_model_images_and_transform(make_set, backbone, tmp_path) -> None:
    images = make_set("set")
    entries = [
        cache.cached(backbone, images, **options(tmp_path, **more))[-1] for more in ({}, {"identity": "n"}, {"pixels": 17})
    ]
    before = images.file(1).stat()
    data = bytearray(images.file(1).read_bytes())
    data[-20] ^= 1  # another content of the same size and time
    images.file(1).write_bytes(data)
    os.utime(images.file(1), ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (images.file(1).stat().st_size, images.file(1).stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert scan(images.root).digest() != images.digest()
    data[-20] ^= 1
    images.file(1).write_bytes(data)
    copied = scan(shutil.copytree(images.root, tmp_path / "copy", copy_function=shutil.copyfile))
    assert copied.digest() == images.digest()
    assert cache.cached(backbone, copied, **options(tmp_path))[-1] == entries[0]
    assert len(set(entries)) == 3


def test_what_was_killed_continues(make_set, backbone, tmp_path) -> None:
    images = make_set("set")
    stopped = Counting(backbone, stop_at=16)
    with pytest.raises(KeyboardInterrupt):
        cache.cached(stopped, images, **options(tmp_path))
    resumed = Counting(backbone)
    features, *_ = cache.cached(resumed, images, **options(tmp_path))
    assert resumed.seen == len(images) - 15  # three complete parts existed
    np.testing.assert_allclose(features, extract(backbone, images, pixels=16, workers=0, progress=False)[0], rtol=1e-4)


def fill(folder, images, backbone, counts) -> None:
    cache.ROWS = 1
    torch.set_num_threads(1)
    model = Counting(backbone)
    cache.cached(model, images, **options(folder))
    counts.put(model.seen)


def test_several_processes_share_the_work(make_set, backbone, tmp_path) -> None:
    images = make_set("set", per_class=10)
    context = multiprocessing.get_context("spawn")
    counts = context.Queue()
    workers = [context.Process(target=fill, args=(tmp_path, images, backbone, counts)) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    assert sum(counts.get(timeout=10) for _ in workers) == 40  # none twice, none lost
    cache.ROWS = 1
    features, *_ = cache.cached(backbone, images, **options(tmp_path))
    np.testing.assert_allclose(features, extract(backbone, images, pixels=16, workers=0, progress=False)[0], rtol=1e-4)


def test_another_model_of_the_same_identity_is_refused(make_set, backbone, tmp_path) -> None:
    images = make_set("set")
    backbone.eval()  # inside a function it is not put into eval mode
    cache.cached(backbone, images, **options(tmp_path))
    with pytest.raises(StoreError, match=r"gives other outputs now .did its code change.*delete the folder, or choose another"):
        cache.cached(lambda pixels: backbone(pixels)[:, ::2], images, **options(tmp_path))
    changes = [
        lambda features: features.roll(1, dims=1),
        lambda features: features * 3,
        lambda features: torch.nn.functional.normalize(features, dim=1),
    ]
    for change in changes:
        with pytest.raises(StoreError, match="gives other outputs now"):
            cache.cached(lambda pixels, change=change: change(backbone(pixels)), images, **options(tmp_path))
    cache.cached(lambda pixels: backbone(pixels) * (1 + 1e-5), images, **options(tmp_path))  # rounding of another machine


def test_damage_is_named(make_set, backbone, tmp_path) -> None:
    images = make_set("set")
    *_, entry = cache.cached(backbone, images, **options(tmp_path))
    with (entry / "features.npy").open("r+b") as file:
        file.truncate(200)
    with pytest.raises(StoreError, match=r"features.npy: 200 bytes, expected"):
        cache.cached(backbone, images, **options(tmp_path))
    (entry / "features.npy").unlink()
    (entry / "features.npy").symlink_to("/etc/passwd")
    with pytest.raises(StoreError, match=r"features.npy: a symbolic link"):
        cache.cached(backbone, images, **options(tmp_path))


@pytest.mark.parametrize("name", ["features.npy", "labels.npy"])
def test_a_flipped_bit_is_found(make_set, backbone, tmp_path, name: str) -> None:
    images = make_set("set")
    *_, entry = cache.cached(backbone, images, **options(tmp_path))
    data = bytearray((entry / name).read_bytes())
    data[-1] ^= 1
    (entry / name).write_bytes(data)
    with pytest.raises(StoreError, match=f"{name}: altered: its sha256 is not the one in done.json; delete the folder"):
        cache.cached(backbone, images, **options(tmp_path))


def test_a_tuple_and_nan_are_refused(make_set, tmp_path) -> None:
    images = make_set("set")
    with pytest.raises(FkdError, match="the model returned a tuple of 2: expected one tensor"):
        cache.cached(lambda pixels: (pixels, pixels), images, **options(tmp_path))
    with pytest.raises(FkdError, match="NaN or infinity for 2 of 2 images"):
        cache.cached(lambda pixels: pixels.flatten(1).float() * float("nan"), images, **options(tmp_path))
    assert not list((tmp_path / "cache").glob("*/part*"))


def test_about_says_what_the_key_is(make_set, backbone, tmp_path) -> None:
    images = make_set("set")
    *_, entry = cache.cached(backbone, images, **options(tmp_path))
    about = files.read_json(entry / "about.json")
    assert (about["model"], about["n"], about["resize"], about["centre_crop"]) == ("m", 24, 18, 16)
    assert about["classes"] == ["blue", "green", "red", "sand"]


def test_damaged_images_are_skipped_and_remembered(make_set, backbone, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(cache, "ROWS", 8)
    images = make_set("set", per_class=5)  # 20: the last part has 4, and all of these are damaged
    whole, _ = extract(backbone, images, pixels=16, workers=0, progress=False)
    damaged = [1, 16, 17, 18, 19]
    for row in damaged:
        images.file(row).write_bytes(b"no picture")
    with pytest.raises(ImageError, match=r"not a readable image: unknown image format$"):
        cache.cached(backbone, images, **options(tmp_path))
    model = Counting(backbone)
    for _ in range(2):
        skipped: set[str] = set()
        features, baseline, rows, entry = cache.cached(model, images, **options(tmp_path), skipped=skipped)
        assert rows.tolist() == [row for row in range(20) if row not in damaged]
        np.testing.assert_allclose(features, whole[rows], rtol=1e-4)
        assert baseline.shape == (15, baselines.DIM)
        assert len(skipped) == 5
        assert str(images.file(1)) in min(skipped)
    assert model.seen - 2 == 15  # the second time, only the check ran
    np.testing.assert_array_equal(np.load(entry / "labels.npy", allow_pickle=False), images.labels[rows])
    with pytest.raises(ImageError, match=f"{images.file(1)}: could not be read when its features were computed"):
        cache.cached(backbone, images, **options(tmp_path))
    for row in range(20):
        images.file(row).write_bytes(b"no picture")
    with pytest.raises(ImageError, match="none of its 20 images can be read"):
        cache.cached(backbone, scan(images.root), **options(tmp_path), skipped=set())
