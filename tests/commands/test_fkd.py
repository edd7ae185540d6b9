"""import-fkd and export-fkd: FKD's label files through the command line."""

from pathlib import Path
from typing import Any


def test_label_files_there_and_back(work: Path, call: Any) -> None:
    line = "precompute --images train --store labels --teacher own_teacher:classes --recipe fkd --crops 4 --codec smoothing"
    assert call(line).status == 0
    answer = call("export-fkd labels --out files/imagenet/train")
    assert (answer.status, answer.out) == (0, "files/imagenet/train: 18 label files written\n")
    assert len(list(work.glob("files/imagenet/train/*/*.tar"))) == 18
    answer = call("import-fkd files --images train --store again")
    assert (answer.status, answer.out) == (0, "again: 18 images x 4 crops, labels smoothing of 3 classes\n")
    assert "smoothing of 3 classes: 4 + 20 bytes per crop" in answer.err
    assert call("verify again --images train").status == 0
    train = (
        "train --images train --store again --student squeezenet1_1 --batch_size 18 --crops_per_image 2 --pixels 32 --workers 0"
    )
    assert call(f"{train} --epochs 2 --objective soft_ce --head classifier --out run").status == 0
    answer = call("recode again --codec hard --to hard")
    assert "to hard (2 bytes); total variation to the source column's targets 0." in answer.out
    assert "note: information that smoothing discarded cannot be recovered" in answer.err
    more = "precompute --images train --store again --teacher own_teacher:make --crops 4 --pixels 32"
    answer = call(more)
    assert answer.status == 2
    assert "its recipe is" in answer.err
    assert call(f"{more} --recipe imported").status == 0
    assert call("verify again --images train --teacher own_teacher:make").status == 0


def test_what_is_refused(work: Path, call: Any) -> None:
    for line, said in {
        "export-fkd store --out files": "its targets are embeddings",
        "import-fkd train --images train --store new": "has no label files of these images",
        "import-fkd train --images train/ash --store new": "number of class folders of train/ash, which has 0",
        "import-fkd train --images train --store new --classes 1": "--classes 1: must be at least 2",
    }.items():
        answer = call(line)
        assert (answer.status, answer.out) == (2, "")
        assert said in answer.err
        assert not (work / "new").exists()
    assert call("precompute --images train --store labels --teacher own_teacher:classes --crops 2").status == 0
    answer = call("export-fkd labels --out files")
    assert answer.status == 2
    assert "crops of the recipe mocov2 change colours" in answer.err


def test_an_image_that_cannot_be_read_is_named(work: Path, call: Any) -> None:
    assert call("precompute --images train --store labels --teacher own_teacher:classes --recipe fkd --crops 2").status == 0
    assert call("export-fkd labels --out files").status == 0
    image = next((work / "train/ash").iterdir())
    image.write_bytes(b"torn")
    answer = call("import-fkd files --images train --store new")
    assert answer.status == 1
    assert f"train/ash/{image.name}: " in answer.err
    assert answer.err.endswith("; repair or remove it\n")  # and names only options that import-fkd has
    assert not (work / "new").exists()
