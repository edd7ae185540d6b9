"""Class probabilities through the command line: stored, checked, recoded, trained on."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fkd_ssl.data import StoredCrops
from fkd_ssl.store import open_store
from fkd_ssl.training.metrics import read_metrics

STORE = "precompute --images train --store labels --teacher own_teacher:classes --recipe fkd --crops 4"
TRAIN = (
    "train --images train --store labels --student squeezenet1_1 --batch_size 18 --crops_per_image 2 --pixels 32 --workers 0 "
    "--log_every 1"
)


@pytest.fixture
def labels(work: Path, call: Any) -> Path:
    """A store of class probabilities."""
    answer = call(f"{STORE} --evaluate val")
    assert answer.status == 0, answer.err
    assert "teacher classes: top-1 100.00 %, top-5 100.00 % of 12 images at 32 px" in answer.err
    assert "codec full: total variation to the teacher's own targets 0.000" in answer.err
    return work / "labels"


def test_probabilities_are_stored_and_read(labels: Path, call: Any, work: Path) -> None:
    about = json.loads(call("inspect labels --json").out)["columns"]["classes"]
    assert (about["codec"], about["teacher"]["shape"], about["teacher"]["kind"]) == ("full", [3], "distribution")
    assert "total variation to the teacher's own targets 0.000" in call("inspect labels").out
    data = StoredCrops(open_store(labels), work / "train", crops_per_image=4, pixels=32)
    batch = data.__getitems__(list(range(len(data)))).batch
    np.testing.assert_allclose(batch["targets"].sum(dim=1), 1, atol=1e-6)
    right = batch["targets"].argmax(dim=1).reshape(-1, 4) == batch["labels"].reshape(-1, 1)
    assert right.float().mean() > 0.9
    assert call("verify labels --images train --teacher own_teacher:classes").status == 0
    answer = call("verify labels --images train --teacher own_teacher:sharper --column classes")
    assert answer.status == 1
    assert "differ from this teacher's" in answer.out or "cosine" in answer.out


def test_other_codecs(labels: Path, call: Any) -> None:
    answer = call("recode labels --codec hard")
    assert answer.status == 0
    assert "from full (6 bytes) to hard (2 bytes); total variation to the source column's targets" in answer.out
    fidelity = json.loads(call("inspect labels --json").out)["columns"]["classes-hard"]["fidelity"]
    assert 0 < fidelity["total_variation_mean"] <= fidelity["total_variation_max"] < 1
    assert fidelity["source_codec"] == "full"
    for codec, said in {
        "SQ8": "is not for class probabilities, the targets of",
        "marginal_renorm_k3": "keeps 3 of 3 classes",
    }.items():
        answer = call(f"recode labels --column classes --codec {codec}")
        assert answer.status == 2
        assert said in answer.err
        assert call(f"{STORE} --codec {codec} --column other").status == 2
    assert "is not for embeddings, the targets of make" in call("recode store --codec hard").err


def test_plan_has_fkds_codecs(work: Path, call: Any) -> None:
    answer = call("plan --images train --teacher own_teacher:classes --crops 4")
    assert answer.status == 0, answer.err
    assert {"hard", "smoothing", "full"} <= {line.split()[0] for line in answer.out.splitlines() if line.split()}
    assert "SQ8" not in answer.out


@pytest.mark.parametrize("source", ["stored", "online"])
def test_a_classifier_is_trained(labels: Path, call: Any, work: Path, source: str) -> None:
    line = (
        TRAIN if source == "stored" else f"{TRAIN.replace('--store labels', '--targets online')} --teacher own_teacher:classes"
    )
    line += " --objective soft_ce --head classifier --epochs 40 --lr 3e-3 --val val --knn_every 40 --knn_k 5 --out run"
    answer = call(line)
    assert answer.status == 0, answer.err
    results = json.loads((work / "run/results.json").read_text())
    assert results["top1"] >= 75
    assert results["top5"] == 100
    assert f"top-1 {results['top1']:.2f} %, top-5 100.00 %" in answer.out
    assert call("knn --model run --train train --val val --workers 0 --k 3").status == 0
    assert call("export --model run --out net.safetensors").status == 0


def test_loss_and_head_must_fit(labels: Path, call: Any, work: Path) -> None:
    for more, said in {
        "": "head mocov2: the targets of 'classes' are class probabilities: choose --head classifier",
        "--objective soft_ce": "choose --head classifier",
        "--head classifier --objective feature_kl": "objective feature_kl: the targets of 'classes' are class probabilities",
    }.items():
        answer = call(f"{TRAIN} --epochs 2 --out run {more}")
        assert answer.status == 2
        assert said in answer.err
    answer = call(f"{TRAIN.replace('labels', 'store')} --epochs 2 --out run --objective soft_ce --head classifier")
    assert "head classifier: the targets of 'make' are embeddings" in answer.err
    assert not (work / "run").exists()


def test_accuracy_needs_as_many_folders_as_classes(work: Path, call: Any) -> None:
    (work / "val/ash").rename(work / "ash")
    answer = call(f"{STORE} --evaluate val")
    assert answer.status == 2
    assert "val: has 2 class folders, but the classifier has 3 classes" in answer.err
    assert not (work / "labels").exists()
    answer = call("precompute --images train --store new --teacher own_teacher:make --crops 4 --evaluate train")
    assert (answer.status, "no teacher gives class probabilities" in answer.err) == (2, True)


LABELS = (
    "train --images train --targets labels --recipe fkd --student squeezenet1_1 --batch_size 18 --crops_per_image 2 "
    "--pixels 32 --workers 0 --log_every 1 --objective soft_ce --head classifier --epochs 40 --lr 3e-3"
)


def test_plain_training_with_labels(call: Any, work: Path) -> None:
    answer = call(f"{LABELS} --label_smoothing 0.1 --val val --knn_every 40 --knn_k 5 --out run")
    assert answer.status == 0, answer.err
    results = json.loads((work / "run/results.json").read_text())
    assert results["top1"] >= 75
    assert results["teacher_forwards"] == 0
    card = (work / "run/README.md").read_text()
    assert card.startswith("# squeezenet1_1, trained on labels\n\nTrained with labels by `fkd-ssl train` on labels targets")
    assert "licence" not in card
    assert f"| top1 of its own classes | {results['top1']:.2f} % |" in card
    assert "| label_smoothing | 0.1 |" in card
    assert call(f"{LABELS} --epochs 1 --mixup 0.8 --cutmix 1 --lr_decay 0.5 --store store --out stored").status == 0


def test_labels_need_classes(call: Any, work: Path) -> None:
    loose = next((work / "train/ash").iterdir())
    loose.rename(work / "train" / loose.name)
    answer = call(f"{LABELS} --out run")
    assert answer.status == 2
    assert "train: some images are outside any class folder" in answer.err
    answer = call(LABELS.replace("--images train", "--images train/birch") + " --out run")
    assert answer.status == 2
    assert not (work / "run").exists()


def test_doubtful_targets_are_calibrated(labels: Path, call: Any, work: Path) -> None:
    line = f"{TRAIN} --objective soft_ce --head classifier --epochs 2"
    assert call(f"{line} --out plain").status == 0
    assert call(f"{line} --calibrate_below 1 --out run").status == 0  # no crop reaches this probability
    assert call(f"{line.replace('--store labels', '--store labels --targets labels')} --out classes").status == 0
    losses = [read_metrics(work / name / "metrics.csv")[0]["loss"] for name in ("plain", "run", "classes")]
    assert losses[0] != losses[1] == losses[2]
    shutil.copytree(work / "train/ash", work / "train/dogwood")
    answer = call(f"{line} --calibrate_below 0.5 --out other")
    assert answer.status == 2
    assert "train: has 4 class folders, but the classifier has 3 classes; expected one folder for each class" in answer.err


def test_embeddings_are_not_mixed(call: Any, work: Path, train_line: str) -> None:
    for option in ("mixup", "cutmix", "calibrate_below"):
        answer = call(f"{train_line} --{option} 0.5 --out mixed")
        assert answer.status == 2
        assert f"{option} 0.5: the targets of 'make' are embeddings; it is for class probabilities" in answer.err


class TestTeachers:
    @pytest.fixture
    def trained(self, call: Any, work: Path) -> Path:
        """A run of supervised training."""
        assert call(f"{LABELS} --out runs/teacher").status == 0
        return work / "runs/teacher"

    def test_a_run_is_a_teacher(self, trained: Path, call: Any, work: Path) -> None:
        line = "precompute --images train --store new --teacher run --checkpoint runs/teacher --recipe fkd --crops 4"
        answer = call(f"{line} --evaluate val")
        assert answer.status == 0, answer.err
        assert "teacher teacher: top-1 " in answer.err
        about = json.loads(call("inspect new --json").out)["columns"]["teacher"]
        assert (about["teacher"]["kind"], about["teacher"]["shape"]) == ("distribution", [3])
        assert call("verify new --images train --teacher run --checkpoint runs/teacher/checkpoints/last.ckpt").status == 0
        assert call(f"{line.replace('runs/teacher', 'runs/other')}").status == 2
        assert call("export --model runs/teacher --out teacher.safetensors").status == 0
        assert call("verify new --images train --teacher run --checkpoint teacher.safetensors").status == 0
        embedding = f"{TRAIN.replace('labels', 'store')} --objective feature_kl --head mocov2"
        assert call(f"{embedding} --out runs/embedding").status == 0
        assert call("export --model runs/embedding --out net.safetensors").status == 0
        for checkpoint, said in {
            "": "teacher run: --checkpoint is needed: a run folder of fkd-ssl train",
            "--checkpoint net.safetensors": "net.safetensors is an export without the projection head; pass the run folder",
        }.items():
            answer = call(f"precompute --images train --store other --teacher run {checkpoint}")
            assert answer.status == 2
            assert said in answer.err

    def test_an_ensemble_in_one_pass_or_from_columns(self, trained: Path, call: Any, work: Path) -> None:
        two = "run{0}own_teacher:classes --checkpoint runs/teacher{0}"
        line = "precompute --images train --recipe fkd --crops 4 --codec full --store"
        answer = call(f"{line} one --teacher {two.format('+')}")
        assert answer.status == 0, answer.err
        assert call(f"{line} two --teacher {two.format(',')}").status == 0
        answer = call("recode two --column teacher,classes --codec full --to both")
        assert answer.status == 0, answer.err
        assert "teacher and classes from full (6 bytes) and full (6 bytes) to full (6 bytes)" in answer.out
        one, both = open_store(work / "one"), open_store(work / "two")
        for row in range(len(one.paths)):
            np.testing.assert_allclose(
                one.targets("teacher-and-classes", row, slice(None)), both.targets("both", row, slice(None)), atol=1e-3
            )
        answer = call(f"verify two --images train --column both --teacher {two.format('+')}")
        assert answer.status == 0, answer.out
        answer = call(f"{line} other --teacher run+own_teacher:classes --checkpoint runs/teacher")
        assert answer.status == 2
        assert "expected A+B and a checkpoint for each, F+G; leave one empty if its teacher needs none" in answer.err
        assert call(f"{line} other --teacher own_teacher:make+own_teacher:classes").status == 2

    def test_verify_finds_an_ensembles_column_by_its_members(self, call: Any, work: Path) -> None:
        both = "own_teacher:sharper+own_teacher:classes"
        line = f"precompute --images train --store two --recipe fkd --crops 4 --teacher own_teacher:classes,{both}"
        assert call(line).status == 0
        answer = call(f"verify two --images train --teacher {both}")  # and not only by that of the last one
        assert answer.status == 0, answer.out


class TestRelabel:
    LINE = LABELS.replace("--targets labels", "--targets relabel --label_maps maps")

    def test_a_student_is_trained_on_label_maps(self, call: Any, work: Path) -> None:
        answer = call("label-maps --images train --out maps --teacher own_teacher:pooled --k 3")
        assert answer.status == 0, answer.err
        answer = call(f"{self.LINE} --val val --knn_every 40 --knn_k 5 --out run")
        assert answer.status == 0, answer.err
        results = json.loads((work / "run/results.json").read_text())
        assert results["top1"] >= 75
        assert results["teacher_forwards"] == 0
        card = (work / "run/README.md").read_text()
        assert card.startswith("# squeezenet1_1, distilled from pooled\n\nTrained without labels by `fkd-ssl train` on relabel")
        assert "| teacher pooled | |" in card
        assert call(f"{self.LINE} --epochs 1 --mixup 0.8 --calibrate_below 0.5 --device_crops on --out mixed").status == 0
        (work / "train/ash/new.png").write_bytes(next((work / "train/ash").iterdir()).read_bytes())
        answer = call(f"{self.LINE} --out other")
        assert answer.status == 1
        assert "maps: has no label maps of 1 of the 19 images of train, for instance 'ash/new.png'" in answer.err

    def test_maps_must_be_there_and_be_of_the_right_kind(self, call: Any, work: Path) -> None:
        answer = call(f"{self.LINE} --out run")
        assert answer.status == 2
        assert "maps: not a folder of label maps" in answer.err
        answer = call(f"{self.LINE.replace('--label_maps maps', '')} --out run")
        assert (answer.status, "--label_maps is needed" in answer.err) == (2, True)
        assert not (work / "run").exists()
