from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from fkd_ssl.errors import RequestError
from fkd_ssl.eval.features import extract
from fkd_ssl.images import open_images


def picture(path, colour=(1, 2, 3)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), colour).save(path)


def test_folders_are_found_where_torchvision_puts_them(tmp_path) -> None:
    picture(tmp_path / "imagenette2-160/val/n01440764/a.png")
    picture(tmp_path / "train/n01440764/b.png")
    assert open_images(f"imagenette:val:{tmp_path}").names == ["n01440764/a.png"]
    assert open_images(f"imagenette:train:{tmp_path}").names == ["n01440764/b.png"]
    assert open_images(f"imagenet:train:{tmp_path}").root == tmp_path / "train"


def test_arrays_are_sets_like_any_other(monkeypatch) -> None:
    from torchvision import datasets

    pixels = np.random.default_rng(0).integers(0, 256, size=(6, 32, 32, 3), dtype=np.uint8)

    def cifar(root, *, train):
        assert (root, train) == ("/data:1", False)
        return SimpleNamespace(data=pixels, targets=[1, 0, 1, 1, 0, 2], classes=["ship", "cat", "unused"])

    monkeypatch.setattr(datasets, "CIFAR10", cifar)
    made = open_images("cifar10:test:/data:1")
    assert made.classes == ["cat", "ship", "unused"]
    assert made.names[:3] == ["cat/000000.ppm", "cat/000002.ppm", "cat/000003.ppm"]
    assert made.labels.tolist() == [0, 0, 0, 1, 1, 2]
    np.testing.assert_array_equal(made.pixels(3), pixels[1])
    np.testing.assert_array_equal(made.subset([3, 0]).pixels(1), pixels[0])
    features, labels = extract(lambda x: x.float().mean(dim=(2, 3)), made, pixels=28, workers=0, progress=False)
    assert features.shape == (6, 3)
    assert labels.tolist() == made.labels.tolist()
    assert made.digest() != made.subset([1, 0, 2, 3, 4, 5]).digest()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("cifar11:test:ROOT", "no such folder of images, and no kind of image set 'cifar11' .*did you mean cifar10"),
        ("cifar10:val:ROOT", "expected cifar10:SPLIT:ROOT, where SPLIT is train or test"),
        ("imagenette:val:ROOT", "imagenette not found .looked for .*imagenette2-320/val.*nothing is downloaded"),
        ("cifar10:test:ROOT", "cifar10 is missing or damaged"),
        ("stl10:test:ROOT", "stl10 is missing or damaged"),
    ],
)
def test_what_is_not_there_is_named(tmp_path, spec: str, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        open_images(spec.replace("ROOT", str(tmp_path)))


def test_a_changed_pickle_is_not_opened(tmp_path) -> None:
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name in ["batches.meta", "test_batch", *(f"data_batch_{k}" for k in range(1, 6))]:
        (folder / name).write_bytes(b"cbuiltins\nexit\n(I3\ntR.")  # would end this process
    with pytest.raises(RequestError, match="is missing or damaged"):
        open_images(f"cifar10:test:{tmp_path}")


def test_a_folder_of_such_a_name_is_a_folder(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    picture(tmp_path / "cifar10:test:x" / "ash" / "1.png")
    assert open_images("cifar10:test:x").names == ["ash/1.png"]
