"""FKD's published label files: read like its code, without executing anything; imported, trained on, written."""

import io
import os
import pickle
import shutil
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms import functional as tf

from fkd_ssl.crops import IMPORTED
from fkd_ssl.data import StoredCrops
from fkd_ssl.errors import RequestError, StoreError
from fkd_ssl.images import scan
from fkd_ssl.store import manifest as layout
from fkd_ssl.store import open_store
from fkd_ssl.store.exchange import fkd_files
from fkd_ssl.store.exchange import fkd_store as fkd_exchange
from fkd_ssl.store.exchange.fkd_store import export_fkd, import_fkd
from fkd_ssl.store.maintain.recode import recode
from fkd_ssl.store.maintain.repair import repair
from fkd_ssl.store.maintain.verify import verify
from fkd_ssl.store.write.columns import describe_fidelity
from fkd_ssl.store.write.precompute import precompute
from fkd_ssl.targets.label_codecs import LabelCodec

C, K = 6, 20


def published(folder: Path, images: Path, *, kind: str = "marginal_smoothing_k5", fp16: bool = False) -> dict[str, list[Any]]:
    """Writes files as the authors' script does, with their fractions; returns boxes in pixels, flips and labels by image."""
    torch.manual_seed(0)
    made = {}
    for path in scan(images).names:
        with Image.open(images / path) as picture:
            width, height = picture.size
            boxes = [RandomResizedCrop.get_params(picture, [0.08, 0.936], [3 / 4, 4 / 3]) for _ in range(C)]
        fractions = torch.stack([torch.FloatTensor([i / height, j / width, h / height, w / width]) for i, j, h, w in boxes])
        flips = torch.rand(C) < 0.5
        p = torch.randn(C, K).mul(3).softmax(dim=1)
        top, index = p.sort(dim=1, descending=True)
        labels: Any = {
            "hard": index[:, 0],
            "smoothing": torch.stack([index[:, 0].float(), top[:, 0]], dim=1),
            "marginal_smoothing_k5": torch.stack([index[:, :5].float(), top[:, :5]], dim=1),
            "full": p,
        }[kind]
        state = [fractions.numpy(), flips.numpy(), labels]
        if fp16:
            state = [np.float16(fractions.numpy()), flips.numpy(), np.float16(labels.numpy())]
        file = folder / fkd_files.label_file(path)
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(state, file)
        made[path] = [fractions, flips, labels, p]
    return made


@pytest.fixture
def images(image_folder: Path) -> Path:
    return image_folder


def fkds_crop(picture: Image.Image, fractions: Any, flip: bool, side: int) -> Image.Image:
    """Does what RandomResizedCrop_FKD and RandomHorizontalFlip_FKD do, without the resize."""
    i, j = fractions[0].item() * picture.size[1], fractions[1].item() * picture.size[0]
    h, w = fractions[2].item() * picture.size[1], fractions[3].item() * picture.size[0]
    cut = tf.crop(picture, i, j, h, w)
    return tf.hflip(cut) if flip else cut


@pytest.mark.parametrize("fp16", [False, True])
def test_boxes_are_fkds_to_the_pixel(images: Path, tmp_path: Path, fp16: bool) -> None:
    made = published(tmp_path / "labels", images, fp16=fp16)
    for path in list(made)[:6]:
        labels = fkd_files.read(tmp_path / "labels" / fkd_files.label_file(path))
        with Image.open(images / path) as file:
            picture = file.convert("RGB")
        records = labels.records(picture.height, picture.width)
        for record, fractions, flip in zip(records, labels.boxes, labels.flips, strict=True):
            expected = np.asarray(fkds_crop(picture, fractions, bool(flip), 0))
            y, x, h, w = (int(record[name]) for name in ("top", "left", "height", "width"))
            ours = np.asarray(picture)[y : y + h, x : x + w]
            ours = ours[:, ::-1] if record["flags"] & 1 else ours
            assert expected[: ours.shape[0], : ours.shape[1]].shape == ours.shape
            np.testing.assert_array_equal(ours, expected[: ours.shape[0], : ours.shape[1]])


@pytest.mark.parametrize(
    ("kind", "fp16", "place"),
    [
        ("hard", False, ""),
        ("smoothing", False, "train"),
        ("marginal_smoothing_k5", False, "imagenet/train"),
        ("marginal_smoothing_k5", True, "imagenet"),
        ("full", True, ""),
    ],
)
def test_a_store_of_label_files(images: Path, tmp_path: Path, kind: str, fp16: bool, place: str) -> None:
    made = published(tmp_path / "labels" / place, images, kind=kind, fp16=fp16)
    store = import_fkd(tmp_path / "labels", scan(images), tmp_path / "store", classes=K)
    assert (store.crops_per_image, store.manifest.recipe, store.column().meta.codec) == (C, IMPORTED, kind)
    assert verify(store, scan(images)).problems == []
    codec = LabelCodec(kind, K)
    for row, path in enumerate(store.paths):
        expected = codec.decode(codec.encode(made[path][3].numpy()))
        np.testing.assert_allclose(store.targets("fkd", row, slice(0, C)), expected, atol=2e-3)
        assert ((store.crops(row, slice(0, C))["flags"] != 0) == made[path][1].numpy()).all()
    batch = StoredCrops(store, images, crops_per_image=3, pixels=32).__getitems__([0, 1]).batch
    assert (batch["images"].shape, batch["targets"].shape) == ((6, 3, 32, 32), (6, K))


def test_renormalised_labels_are_said(images: Path, tmp_path: Path) -> None:
    made = published(tmp_path / "labels", images)
    store = import_fkd(tmp_path / "labels", scan(images), tmp_path / "store", classes=K, codec="marginal_renorm_k5")
    path = store.paths[3]
    index, value = made[path][2][:, 0].long(), made[path][2][:, 1]
    expected = torch.nn.functional.normalize(torch.zeros(C, K).scatter_(1, index, value), p=1.0, dim=1)
    np.testing.assert_allclose(store.targets("fkd", 3, slice(0, C)), expected, atol=2e-3)


@pytest.mark.parametrize("kind", ["hard", "smoothing", "marginal_smoothing_k5", "full"])
def test_there_and_back(images: Path, tmp_path: Path, kind: str) -> None:
    published(tmp_path / "labels", images, kind=kind)
    store = import_fkd(tmp_path / "labels", scan(images), tmp_path / "store", classes=K)
    assert export_fkd(store.column(), tmp_path / "out") == len(store)
    assert export_fkd(store.column(), tmp_path / "out") == 0
    again = import_fkd(tmp_path / "out", scan(images), tmp_path / "again", classes=K)
    for row in range(len(store)):
        assert (np.asarray(again.crops(row, slice(0, C))) == np.asarray(store.crops(row, slice(0, C)))).all()
        np.testing.assert_allclose(again.targets("fkd", row, slice(0, C)), store.targets("fkd", row, slice(0, C)), atol=2e-3)


def test_a_quantised_column_is_exported_as_what_fkd_recovers(images: Path, tmp_path: Path) -> None:
    published(tmp_path / "labels", images, kind="full")
    with pytest.raises(RequestError, match=r"marginal_quantised_k5: changes the labels; .*leave --codec out"):
        import_fkd(tmp_path / "labels", scan(images), tmp_path / "store", classes=K, codec="marginal_quantised_k5")
    store = import_fkd(tmp_path / "labels", scan(images), tmp_path / "store", classes=K)
    column = recode(store, "marginal_quantised_k5", out=tmp_path / "small")
    export_fkd(column, tmp_path / "out")
    again = import_fkd(tmp_path / "out", scan(images), tmp_path / "again", classes=K)
    assert again.column().meta.codec == "marginal_smoothing_k5"
    for row in range(len(again)):
        small = column.store.targets(column.name, row, slice(0, C))
        np.testing.assert_allclose(again.targets("fkd", row, slice(0, C)), small, atol=2e-3)


@pytest.mark.parametrize("kind", ["smoothing", "marginal_smoothing_k5"])
def test_fkds_recovery_fails_on_its_own_fp16_files(images: Path, tmp_path: Path, kind: str) -> None:
    """What the help of --fp16 says; `Recover_soft_label` scatters the values of the file into float32 zeros or ones."""
    published(tmp_path / "labels", images, kind=kind, fp16=True)
    labels = torch.from_numpy(fkd_files.read(next((tmp_path / "labels").rglob("*.tar"))).labels)
    index, value = labels[:, 0].reshape(C, -1).long(), labels[:, 1].reshape(C, -1)
    with pytest.raises(RuntimeError, match="dtype"):
        torch.ones(C, K).scatter_(1, index, value)


def test_another_teacher_sees_the_imported_crops(images: Path, tmp_path: Path, tiny_teacher: Any) -> None:
    published(tmp_path / "labels", images)
    store = import_fkd(tmp_path / "labels", scan(images), tmp_path / "store", classes=K)
    records = np.asarray(store.crops(2, slice(0, C)))
    found = scan(images)
    precompute(found, store.folder, tiny_teacher, crops=C, recipe=IMPORTED, pixels=32, codec="Flat", progress=False)
    store = open_store(store.folder)
    assert store.column_names == ["fkd", "tiny"]
    assert (np.asarray(store.crops(2, slice(0, C))) == records).all()
    from fkd_ssl.crops import replay
    from fkd_ssl.images import read_image

    crops = torch.from_numpy(replay(read_image(images / store.paths[2]), records, 32))
    np.testing.assert_allclose(store.targets("tiny", 2, slice(0, C)), tiny_teacher.embed(crops).numpy(), atol=1e-5)
    with pytest.raises(RequestError, match="recipe imported: is for stores made by import-fkd"):
        precompute(found, tmp_path / "new", tiny_teacher, crops=C, recipe=IMPORTED, pixels=32)


class Evil:
    def __reduce__(self) -> Any:
        return exec, ("raise SystemExit('executed')",)


def saved(*parts: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(list(parts), buffer)
    return buffer.getvalue()


BOXES, FLIPS, LABELS = np.full((C, 4), 0.5, np.float32), np.zeros(C, bool), np.zeros((C, 2, 5), np.float32)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (saved(Evil(), FLIPS, LABELS), "not an FKD label file"),
        (pickle.dumps([Evil()]), "not an FKD label file"),
        (b"", "not an FKD label file"),
        (saved(BOXES, FLIPS), "not an FKD label file"),
        (saved(BOXES[:, :3], FLIPS, LABELS), "expected boxes"),
        (saved(BOXES, FLIPS[:2], LABELS), "expected boxes"),
        (saved(BOXES * np.nan, FLIPS, LABELS), "expected boxes"),
        (saved(np.array([[None] * 4] * C), FLIPS, LABELS), "not an FKD label file|expected boxes"),
        (saved(BOXES, np.full(C, 2), LABELS), "expected boxes"),
        (saved([[0.5] * 4] * C, FLIPS, LABELS), "not an FKD label file"),
        (saved(torch.zeros(1).as_strided((10**9, 4), (0, 0)), FLIPS, LABELS), "holds a tensor .* over a storage of 1 numbers"),
    ],
)
def test_what_is_no_label_file(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(StoreError, match=said):
        fkd_files.read(tmp_path / "a.tar")


def test_what_would_fill_the_memory_or_wait_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = saved(BOXES, FLIPS, torch.zeros(C, 2, 50_000))
    monkeypatch.setattr(fkd_files, "_MAX_BYTES", len(whole) // 2)
    with zipfile.ZipFile(io.BytesIO(whole)) as entries, zipfile.ZipFile(tmp_path / "a.tar", "w", zipfile.ZIP_DEFLATED) as small:
        for name in entries.namelist():
            small.writestr(name, entries.read(name))
    assert (tmp_path / "a.tar").stat().st_size < len(whole) // 100
    with pytest.raises(StoreError, match=r"a\.tar: .*has compressed entries"):
        fkd_files.read(tmp_path / "a.tar")
    os.mkfifo(tmp_path / "b.tar")
    os.close(os.open(tmp_path / "b.tar", os.O_RDWR))
    with pytest.raises(StoreError, match=r"b\.tar: not a regular file"):
        fkd_files.read(tmp_path / "b.tar")


CLASSES = np.tile(np.float32([4, 1, 2, 3, 0]), (C, 1))
VALUES = np.tile(np.float32([0.5, 0.2, 0.1, 0.05, 0.01]), (C, 1))
FIVE = np.stack([CLASSES, VALUES], axis=1)


@pytest.mark.parametrize(
    ("labels", "spec", "said"),
    [
        (FIVE, "marginal_smoothing_k3", r"labels \[6, 2, 5\], expected \[C, 2, 3\] of marginal_smoothing_k3, 20 classes"),
        (FIVE, "smoothing", r"expected \[C, 2\]"),
        (FIVE, "hard", r"expected \[C\]"),
        (np.eye(20, dtype=np.float32)[[7] * C], "hard", r"expected \[C\]"),
        (np.eye(20, dtype=np.float32)[[7] * C], "smoothing", r"expected \[C, 2\]"),
        (FIVE[:, :, 0], "full", r"expected \[C, 20\]"),
        (np.stack([CLASSES, 0 * VALUES], axis=1), "marginal_smoothing_k5", "not the most probable of 20"),
        (np.float32([[3, 0.01]] * C), "smoothing", "not the most probable of 20"),
        (FIVE + 100, "marginal_smoothing_k5", "not probabilities of 20 classes"),
    ],
)
def test_labels_of_another_kind(labels: Any, spec: str, said: str) -> None:
    with pytest.raises(StoreError, match=said):
        fkd_files.Labels(BOXES, FLIPS, labels).codes(LabelCodec(spec, 20))


@pytest.mark.parametrize(
    ("box", "said"),
    [
        ([0.5, 0.5, 10, 10], "is outside the image"),
        ([-0.2, 0, 0.9, 1], "is outside the image"),
        ([0.5, 0.5, 0.51, 0.4], "is outside the image"),
        ([0.5, 0.5, 0.001, 0.5], "no area inside the image"),
    ],
)
def test_boxes_of_no_image(box: Any, said: str) -> None:
    with pytest.raises(StoreError, match=said):
        fkd_files.Labels(np.float32([box]), FLIPS[:1], LABELS[:1]).records(100, 100)


def test_damaged_and_missing_files_are_listed_and_nothing_appears(images: Path, tmp_path: Path) -> None:
    published(tmp_path / "labels", images)
    files = sorted((tmp_path / "labels").rglob("*.tar"))
    files[0].write_bytes(b"")
    files[1].unlink()
    files[2].write_bytes(files[2].read_bytes()[:-100])
    torch.save([BOXES[:3], FLIPS[:3], LABELS[:3]], files[4])
    bad = LABELS.copy()
    bad[:, 0] = [0, 1, 2, 3, K]
    torch.save([BOXES, FLIPS, bad], files[5])
    torch.save([BOXES + 0.9, FLIPS, LABELS], files[6])
    with pytest.raises(StoreError) as caught:
        import_fkd(tmp_path / "labels", scan(images), tmp_path / "store", classes=K)
    said = str(caught.value)
    assert "6 label files cannot be used" in said
    whats = ("not an FKD label file", "No such file", "not an FKD label file", "3 crops", f"probabilities of {K}", "a box")
    for file, what in zip(files[:3] + files[4:7], whats, strict=True):
        assert any(str(file) in line and what in line for line in said.splitlines()), (file, what, said)
    assert not (tmp_path / "store").exists()
    published(tmp_path / "labels", images)  # after the repair, the same call continues
    assert len(import_fkd(tmp_path / "labels", scan(images), tmp_path / "store", classes=K)) == len(files)


def test_what_is_refused(images: Path, tmp_path: Path, make_store: Any) -> None:
    with pytest.raises(RequestError, match="has no label files of these images"):
        import_fkd(tmp_path, scan(images), tmp_path / "store", classes=K)
    published(tmp_path / "labels", images)
    with pytest.raises(RequestError, match="exists; choose another"):
        import_fkd(tmp_path / "labels", scan(images), tmp_path / "labels", classes=K)
    published(tmp_path / "half", images, fp16=True)
    with pytest.raises(StoreError, match="float16, which is exact up to 2048, of 3000 classes"):
        import_fkd(tmp_path / "half", scan(images), tmp_path / "store", classes=3000)


def test_a_class_without_labels_does_not_hide_the_others(tmp_path: Path) -> None:
    paths = [f"{folder}/{number:03d}.jpg" for folder in "ab" for number in range(300)]
    for path in paths[300:]:
        (tmp_path / fkd_files.label_file(path)).parent.mkdir(exist_ok=True)
        (tmp_path / fkd_files.label_file(path)).touch()
    assert fkd_files.find(tmp_path, paths) == tmp_path


def test_wrong_options_leave_nothing_in_the_way(images: Path, tmp_path: Path) -> None:
    published(tmp_path / "labels", images)
    with pytest.raises(StoreError, match="not probabilities of 6 classes"):
        import_fkd(tmp_path / "labels", scan(images), tmp_path / "store", classes=6)
    assert import_fkd(tmp_path / "labels", scan(images), tmp_path / "store", classes=K).column().meta.target.size == K


def test_none_can_be_read(images: Path, tmp_path: Path) -> None:
    published(tmp_path / "labels", images)
    files = sorted((tmp_path / "labels").rglob("*.tar"))
    for file in files:
        file.write_bytes(b"")
    with pytest.raises(StoreError, match=rf"{files[0]}: not an FKD label file .*no other label file"):
        import_fkd(tmp_path / "labels", scan(images), tmp_path / "store", classes=K)


def test_two_images_with_one_file_of_labels(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    published(tmp_path / "labels", images)
    pictures = Path(shutil.copytree(images, tmp_path / "pictures"))
    first = scan(pictures).names[0]
    twin = f"{first.partition('.')[0]}.left.jpg"
    shutil.copy(pictures / first, pictures / twin)
    said = f"would share the label file '{fkd_files.label_file(first)}'; rename one of them"
    with pytest.raises(RequestError, match=said):
        import_fkd(tmp_path / "labels", scan(pictures), tmp_path / "store", classes=K)
    with monkeypatch.context() as patch:
        patch.setattr(fkd_files, "check_names", lambda paths: None)
        store = import_fkd(tmp_path / "labels", scan(pictures), tmp_path / "store", classes=K)
    with pytest.raises(RequestError, match=said):
        export_fkd(store.column(), tmp_path / "out")


def test_export_keeps_files_of_other_labels(images: Path, tmp_path: Path) -> None:
    published(tmp_path / "labels", images)
    store = import_fkd(tmp_path / "labels", scan(images), tmp_path / "store", classes=K)
    first = tmp_path / "out" / fkd_files.label_file(store.paths[0])
    export_fkd(store.column(), tmp_path / "out")
    before = first.read_bytes()
    with pytest.raises(StoreError, match=rf"{first}: exists and holds other labels"):
        export_fkd(store.column(), tmp_path / "out", fp16=True)
    assert first.read_bytes() == before


def test_a_killed_import_goes_on_with_the_same_only(
    images: Path, tmp_path: Path, tree: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    published(tmp_path / "a/labels", images)
    published(tmp_path / "b/labels", images)
    for file in (tmp_path / "b/labels").rglob("*.tar"):  # other labels below a folder of the same name
        boxes, flips, labels = fkd_files.read(file).boxes, fkd_files.read(file).flips, fkd_files.read(file).labels
        torch.save([boxes.astype(np.float32), ~flips, labels], file)
    monkeypatch.setattr(layout, "ROWS_PER_SHARD", 4)
    whole = import_fkd(tmp_path / "a/labels", scan(images), tmp_path / "whole", classes=K)
    write, made = fkd_exchange._write, []

    def killed(*args: Any) -> None:
        if made:
            raise KeyboardInterrupt
        made.append(args)
        write(*args)

    monkeypatch.setattr(fkd_exchange, "_write", killed)
    with pytest.raises(KeyboardInterrupt):
        import_fkd(tmp_path / "a/labels", scan(images), tmp_path / "store", classes=K)
    monkeypatch.setattr(fkd_exchange, "_write", write)
    fewer = scan(images).subset(range(1, 8))
    for labels, found, options in (
        ("b", scan(images), {}),
        ("a", fewer, {}),
        ("a", scan(images), {"classes": K + 1}),
        ("a", scan(images), {"column": "other"}),
        ("a", scan(images), {"codec": "marginal_renorm_k5"}),
    ):
        with pytest.raises(RequestError, match="holds other unfinished work"):
            import_fkd(tmp_path / labels / "labels", found, tmp_path / "store", **{"classes": K, **options})
    import_fkd(tmp_path / "a/labels", scan(images), tmp_path / "store", classes=K)
    assert tree(tmp_path / "store") == tree(whole.folder)


@pytest.mark.parametrize("damage", ["altered", "missing", "sidecar"])
def test_imported_crops_are_not_made_again(images: Path, tmp_path: Path, damage: str) -> None:
    published(tmp_path / "labels", images)
    store = import_fkd(tmp_path / "labels", scan(images), tmp_path / "store", classes=K)
    path = layout.crops_file(store.folder, 0)
    if damage == "altered":
        path.write_bytes(path.read_bytes()[:-21] + bytes([9]) + path.read_bytes()[-20:])
    elif damage == "missing":
        path.unlink()
    else:
        path.with_suffix(".json").write_text("{}")
    store = open_store(store.folder)
    found, said = verify(store, scan(images)), []
    assert found.problems
    repair(store, found.damage, scan(images), log=said.append)
    assert any("were imported and cannot be drawn again" in line for line in said)
    assert verify(open_store(store.folder), scan(images)).problems == found.problems


def test_what_imported_labels_leave_of_their_teachers_is_not_known(images: Path, tmp_path: Path) -> None:
    published(tmp_path / "labels", images)
    store = import_fkd(tmp_path / "labels", scan(images), tmp_path / "store", classes=K)
    assert describe_fidelity(store.column().meta.fidelity) == "the loss to the teacher's own targets is unknown"
