"""train through the command line: what it writes, resumes and refuses."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from fkd_ssl.training.metrics import read_metrics

ONLINE = "--targets online --teacher own_teacher:make"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def broken_off(call: Any, line: str, step: int) -> None:
    """Runs `line` until the batch of step `step` is requested."""
    from fkd_ssl.data.sampler import PassSampler

    batch = PassSampler.batch

    def interrupted(self: PassSampler, at: int) -> Any:
        if at == step:
            raise KeyboardInterrupt
        return batch(self, at)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PassSampler, "batch", interrupted)
        assert call(line).status == 130


def test_a_run_folder_is_complete(work: Path, call: Any, train_line: str) -> None:
    status, out, err = call(f"{train_line} --out run --val val --knn_every 1")
    assert status == 0
    assert out.startswith("run: 2 steps in ")
    assert out.count("\n") == 1
    assert "training squeezenet1_1 on 18 images, stored targets, D = 16; 2 epochs of one crop per image" in err
    assert {path.name for path in (work / "run").iterdir()} == {
        "config.yaml",
        "inputs.json",
        "metrics.csv",
        "results.json",
        "checkpoints",
        "README.md",
    }
    assert yaml.safe_load((work / "run/config.yaml").read_text())["student"]["student"] == "squeezenet1_1"
    results = json.loads((work / "run/results.json").read_text())
    assert (results["steps"], results["crops_seen"], results["config"]["batch_size"]) == (2, 36, 18)
    assert (
        results["knn_top1"] == pytest.approx(results["knn_best"]["top1"]) or results["knn_best"]["top1"] > results["knn_top1"]
    )
    assert {"torch", "fkd_ssl", "python"} <= set(results["versions"])
    metrics = read_metrics(work / "run/metrics.csv")
    assert [line["step"] for line in metrics if line["loss"] is not None] == [1, 2]
    assert [line["step"] for line in metrics if line["knn_top1"] is not None] == [1, 2]


def test_stored_and_online_are_the_same_training(work: Path, call: Any, train_line: str) -> None:
    line = f"{train_line} --epochs 5"
    assert call(f"{line} --out stored").status == 0
    assert call(f"{line} --out online {ONLINE}").status == 0
    stored, online = (read_metrics(work / name / "metrics.csv") for name in ("stored", "online"))
    assert [line["step"] for line in stored] == [1, 2, 3, 4, 5]
    assert [line["loss"] for line in stored] == pytest.approx([line["loss"] for line in online], rel=1e-5)
    forwards = [json.loads((work / name / "results.json").read_text())["teacher_forwards"] for name in ("stored", "online")]
    assert forwards == [0, 90]


def test_online_without_a_store_draws_fresh_crops(work: Path, call: Any, train_line: str) -> None:
    line = train_line.replace("--store store ", "")
    assert call(f"{line} --out run {ONLINE} --teacher_pixels 40").status == 0
    assert json.loads((work / "run/results.json").read_text())["stored_crops_per_image"] is None


def test_images_need_no_classes(work: Path, call: Any, train_line: str) -> None:
    (work / "flat").mkdir()
    for k, path in enumerate(sorted((work / "train").rglob("*.png"))):
        shutil.copy(path, work / "flat" / f"{k}.png")
    line = train_line.replace("--images train", "--images flat").replace("--store store ", "")
    assert call(f"{line} --out run {ONLINE}").status == 0
    answer = call(f"{line} --out other {ONLINE} --val val")
    assert answer.status == 2
    assert "images are outside any class folder" in answer.err
    (work / "level").mkdir()
    for name in ("train", "val"):  # one folder level too many: all images would have the class `imgs`
        (work / "level" / name).mkdir()
        shutil.copytree(work / name, work / "level" / name / "imgs")
    line = train_line.replace("--images train", "--images level/train").replace("--store store ", "")
    answer = call(f"{line} --out other {ONLINE} --val level/val")
    assert answer.status == 2
    assert "'imgs' holds only folders; if these are the classes, give level/train/imgs" in answer.err
    assert not (work / "other").exists()


def test_a_finished_run_does_nothing(work: Path, call: Any, train_line: str) -> None:
    first = call(f"{train_line} --out run")
    before = contents(work / "run")
    status, out, err = call(f"{train_line} --out run")
    assert (first.status, status, out) == (0, 0, first.out)
    assert "run: this run is done" in err
    assert (
        "run: this run is done" in call(f"{train_line} --out run --workers 1 --devices 3").err
    )  # execution options may differ
    assert contents(work / "run") == before


def test_what_is_left_out_follows_from_the_data(work: Path, call: Any) -> None:
    """A batch of 18 images, S2-BNN's loss on few images, a thirtieth of the epochs, the store's 32 px: also after a kill."""
    line = "train --images train --store store --student squeezenet1_1 --epochs 3 --crops_per_image 2 --workers 0 --out run"
    broken_off(call, line, step=1)
    values = yaml.safe_load((work / "run/config.yaml").read_text())
    assert {name: values["data"][name] for name in ("pixels", "batch_size")} == {"pixels": 32, "batch_size": 36}
    assert {name: values["optimizer"][name] for name in ("lr", "warmup_epochs")} == {"lr": 3e-3, "warmup_epochs": 0.1}
    status, _, err = call(line)
    assert status == 0
    assert "defaults for 18 images and feature_kl: pixels 32, batch_size 36, lr 0.003, warmup_epochs 0.1\n" in err
    assert "warning: a training of 2 steps is short (fewer than 500)" in err
    again = call(f"{line} --pixels 32 --batch_size 36 --lr 0.003 --warmup_epochs 0.1")
    assert "run: this run is done" in again.err


def test_a_teacher_online_gives_its_size(work: Path, call: Any) -> None:
    line = f"train --images train --student squeezenet1_1 --epochs 3 --crops_per_image 2 --workers 0 {ONLINE}"
    assert "defaults for 18 images and feature_kl: pixels 32," in call(f"{line} --out run").err
    assert "pixels 40," in call(f"{line} --teacher_pixels 40 --out other").err


@pytest.mark.parametrize("constant", [False, True])
def test_constant_features_are_reported(work: Path, caplog: pytest.LogCaptureFixture, constant: bool) -> None:
    import fkd_ssl

    class Student(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix = torch.nn.Linear(3, 8)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            features: torch.Tensor = self.mix(images.mean(dim=(2, 3)))
            return features * 1e-3 + 1 if constant else features

    options: dict[str, Any] = {"epochs": 2, "crops_per_image": 2, "workers": 0, "knn_k": 5, "val": "val", "lr": None}
    fkd_ssl.train("train", store="store", student=Student(), out="run", **options)
    assert ("warning: the features are nearly constant (collapsed)" in caplog.text) == constant


def test_another_config_is_refused(work: Path, call: Any, train_line: str) -> None:
    assert call(f"{train_line} --out run").status == 0
    before = contents(work / "run")
    status, out, err = call(f"{train_line} --out run --lr 0.5")
    assert (status, out) == (2, "")
    assert "run: holds a run of another config (lr is 0.003 there, 0.5 here); choose another --out" in err
    assert contents(work / "run") == before


def test_ctrl_c_and_the_same_command_again(work: Path, call: Any, train_line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from fkd_ssl.data.sampler import PassSampler

    line = f"{train_line} --epochs 5"
    assert call(f"{line} --out whole").status == 0
    batch = PassSampler.batch

    def interrupted(self: PassSampler, step: int) -> Any:
        if step == 3:
            raise KeyboardInterrupt
        return batch(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(PassSampler, "batch", interrupted)
        status, out, err = call(f"{line} --out run")
    assert (status, out) == (130, "")
    assert "fkd-ssl train: stopped; repeat the command to continue" in err
    assert not (work / "run/results.json").exists()
    status, _, err = call(f"{line} --out run")
    assert status == 0
    assert "continuing squeezenet1_1" in err
    runs = [read_metrics(work / name / "metrics.csv") for name in ("whole", "run")]
    assert [line["step"] for line in runs[1]] == [1, 2, 3, 4, 5]
    assert [line["loss"] for line in runs[0]] == [line["loss"] for line in runs[1]]


def test_it_continues_when_the_store_has_got_another_column(work: Path, call: Any, train_line: str) -> None:
    line = f"{train_line} --epochs 5 --out run"
    broken_off(call, line, 3)
    assert call("recode store --codec SQ8").status == 0
    assert call(line).status == 0
    assert yaml.safe_load((work / "run/config.yaml").read_text())["targets"]["column"] == "make"
    assert "this run is done" in call(line).err
    assert "has the columns make, make-SQ8; choose one with --column" in call(f"{train_line} --out other").err


def test_an_image_that_is_skipped_is_no_neighbour_either(work: Path, call: Any, train_line: str) -> None:
    (work / "train/ash/0.png").write_bytes(b"no picture")
    line = f"{train_line} {ONLINE} --out run --val val --knn_every 1".replace("--store store ", "")
    status, _, err = call(line)
    assert (status, "train/ash/0.png: not a readable image" in err) == (1, True)
    assert call(f"{line} --on_unreadable skip").status == 0
    results = json.loads((work / "run/results.json").read_text())
    assert results["knn_top1"] is not None
    assert results["unreadable_images"] > 0


def test_what_was_trained_is_kept_where_a_score_fails(work: Path, call: Any, train_line: str) -> None:
    line = f"{train_line} --epochs 6 --out run --val val --knn_every 2"
    picture = (work / "val/ash/0.png").read_bytes()
    (work / "val/ash/0.png").write_bytes(b"no picture")
    status, _, err = call(line)
    assert (status, "val/ash/0.png: not a readable image" in err) == (1, True)
    assert torch.load(work / "run/checkpoints/last.ckpt", weights_only=True)["global_step"] == 2
    (work / "val/ash/0.png").write_bytes(picture)
    assert call(line).status == 0
    assert [row["step"] for row in read_metrics(work / "run/metrics.csv") if row["loss"] is not None] == [1, 2, 3, 4, 5, 6]


def test_float16_is_for_gpus(work: Path, call: Any, train_line: str) -> None:
    line = f"{train_line} --out run --precision 16-mixed"
    assert "warning: --precision 16-mixed needs a GPU; using bf16-mixed" in call(line).err
    assert json.loads((work / "run/results.json").read_text())["config"]["precision"] == "bf16-mixed"
    assert "this run is done" in call(line).err


def test_tasks_of_srun_are_refused(work: Path, call: Any, train_line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Except the first, which trains alone, whatever SLURM's variables say."""
    for name, value in (("SLURM_NTASKS", "4"), ("SLURM_JOB_NAME", "fkd"), ("SLURM_LOCALID", "0"), ("SLURM_NODEID", "0")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SLURM_PROCID", "1")
    answer = call(f"{train_line} --out run")
    assert (answer.status, "let it start torchrun" in answer.err) == (2, True)
    assert not (work / "run").exists()
    monkeypatch.setenv("SLURM_PROCID", "0")
    assert call(f"{train_line} --out run").status == 0


def test_a_recipe_beside_a_store_is_ignored_with_a_warning(work: Path, call: Any, train_line: str) -> None:
    answer = call(f"{train_line} --out run {ONLINE} --recipe swav")
    assert "warning: --recipe swav is ignored: the crops are those of --store" in answer.err


@pytest.mark.parametrize("name", ["thesis.tex", "config.yaml", "results.json", "metrics.csv"])
def test_a_foreign_folder_is_left_alone(work: Path, call: Any, train_line: str, name: str) -> None:
    (work / "mine").mkdir()
    (work / "mine" / name).write_text("years: of work\n")
    before = contents(work / "mine")
    status, out, err = call(f"{train_line} --out mine")
    assert (status, out) == (2, "")
    assert "choose another --out" in err
    assert contents(work / "mine") == before


@pytest.mark.parametrize("workers", [0, 2])
def test_a_corrupt_image_is_named(work: Path, call: Any, train_line: str, workers: int) -> None:
    path = work / "train/cedar/2.png"
    path.write_bytes(b"x" * path.stat().st_size)
    status, out, err = call(f"{train_line} --out run".replace("--workers 0", f"--workers {workers}"))
    assert (status, out) == (1, "")
    last = err.strip().splitlines()[-1]
    assert last.startswith("fkd-ssl train: ")
    assert "train/cedar/2.png: changed since the store was made: other content of the same" in last


def test_a_corrupt_image_is_named_online(work: Path, call: Any, train_line: str) -> None:
    (work / "train/cedar/2.png").write_bytes(b"no picture")
    line = train_line.replace("--store store ", "").replace("--workers 0", "--workers 2")
    status, _, err = call(f"{line} --out run {ONLINE}")
    assert status == 1
    assert "cedar/2.png: not a readable image" in err


class TestSeveralTeachers:
    @pytest.fixture
    def two(self, work: Path, call: Any) -> Path:
        """The store has a second column, `prototyped`."""
        line = "precompute --images train --store store --teacher own_teacher:prototyped --crops 4 --codec Flat --chunk_size 16"
        assert call(line).status == 0
        return work

    def test_stored_and_online_are_the_same_training(self, two: Path, call: Any, train_line: str) -> None:
        line = f"{train_line} --epochs 3 --teacher_weights 2,1"
        status, _, err = call(f"{line} --out stored --column make,prototyped")
        assert status == 0
        assert "stored targets, D = 16 and D = 16;" in err
        online = "--targets online --teacher own_teacher:make,own_teacher:prototyped"
        assert call(f"{line} --out online {online}").status == 0
        stored, online = (read_metrics(two / name / "metrics.csv") for name in ("stored", "online"))
        assert [line["loss"] for line in stored] == pytest.approx([line["loss"] for line in online], rel=1e-5)
        assert json.loads((two / "online/results.json").read_text())["teacher_forwards"] == 2 * 3 * 18
        for verb in ("knn --k 5", "linear --protocol logreg"):
            status, out, _ = call(f"{verb} --model stored --train train --val val --workers 0")
            assert status == 0
            assert "top-1" in out

    def test_the_only_column_need_not_be_named(self, work: Path, call: Any, train_line: str) -> None:
        for out, teacher in (("named", "--column make"), ("unnamed", "")):
            assert call(f"{train_line} --out {out} {teacher}").status == 0
        named, unnamed = (read_metrics(work / name / "metrics.csv") for name in ("named", "unnamed"))
        assert [line["loss"] for line in named] == [line["loss"] for line in unnamed]

    def test_prototypes_come_from_the_column_or_from_the_teacher(self, two: Path, call: Any, train_line: str) -> None:
        line = f"{train_line} --objective prototype_ce"
        assert call(f"{line} --out stored --column prototyped").status == 0
        assert call(f"{line} --out online --targets online --teacher own_teacher:prototyped").status == 0
        stored, online = (read_metrics(two / name / "metrics.csv") for name in ("stored", "online"))
        assert [line["loss"] for line in stored] == pytest.approx([line["loss"] for line in online], rel=1e-5)

    def test_a_checkpoint_for_each(self, two: Path, call: Any, train_line: str) -> None:
        (two / "weights.pth").write_bytes(b"any")
        names = "own_teacher:make,own_teacher:prototyped"
        assert call(f"{train_line} --out run --targets online --teacher {names} --checkpoint ,weights.pth").status == 0

    @pytest.mark.parametrize(
        ("options", "status", "said"),
        [
            ("", 2, "has the columns make, prototyped; choose one with --column"),
            ("--column make,swav", 2, "no targets of 'swav'; there are ['make', 'prototyped']"),
            ("--column make,make", 2, "a column is named twice"),
            ("--column make,", 2, "has an empty part"),
            ("--column make,prototyped --teacher_weights 1,2,3", 2, "expected a positive number for each of the 2 teachers"),
            ("--column make,prototyped --objective prototype_ce", 2, "the targets of 'make' have no prototypes"),
            ("--column make --objective prototype_ce", 2, "have no prototypes; use a SwAV teacher, or another objective"),
            ("--targets online --teacher own_teacher:make --objective prototype_ce", 2, "of 'make' have no prototypes"),
            ("--targets online --teacher mocov2,swav --checkpoint F", 2, "checkpoint 'F': 1 for 2 teachers (mocov2,swav)"),
        ],
    )
    def test_what_does_not_fit_is_refused_and_nothing_is_written(
        self, two: Path, call: Any, train_line: str, options: str, status: int, said: str
    ) -> None:
        answer = call(f"{train_line} --out run {options}")
        assert (answer.status, answer.out) == (status, "")
        assert said in answer.err
        assert not (two / "run").exists()


class TestRefused:
    @pytest.mark.parametrize(
        ("change", "status", "said"),
        [
            (("--images train", "--images nowhere"), 2, "nowhere: no such folder of images"),
            (("--images train", "--images empty"), 2, "empty: no images in this folder"),
            (("--store store", "--store nowhere"), 2, "nowhere: not a store (no such folder)"),
            (("--images train", "--images val"), 1, "val: lacks 6 of the 18 images of store, for instance 'ash/4.png'"),
            (("squeezenet1_1", "squezenet1_1"), 2, "did you mean squeezenet1_1"),
            (("--epochs 2", "--epochs 2 --objective mse"), 2, "objective 'mse' is unknown"),
            (("--epochs 2", "--epochs 2 --objective cosine(temperature=0.1)"), 2, "no setting 'temperature'; it has none"),
            (("--batch_size 18", "--batch_size 80"), 2, "a batch has 40 images, the data set 18; choose at most 36"),
            (("--crops_per_image 2", "--crops_per_image 6"), 2, "crops_per_image 6: store holds 4 crops of each image"),
            (("--store store", "--store store --column swav"), 2, "no targets of 'swav'; there are ['make']"),
            (("--store store", f"{ONLINE}:x"), 2, "own_teacher:make:x"),
            (("--store store", f"{ONLINE} --recipe nix"), 2, "--recipe 'nix' is unknown"),
            (("--epochs 2", "--epochs 2 --val nowhere"), 2, "nowhere: no such folder of images"),
            (("--epochs 2", "--epochs 2 --codec SQ8"), 2, "codec SQ8: is for --record"),
            (("--epochs 2", "--epochs 2 --optimizer lars"), 2, "scales only weights with weight decay"),
            (
                ("--batch_size 18", "--batch_size 18 --accumulate 9 --devices 2"),
                2,
                "2 processes of 9 parts do not divide",
            ),
            (
                ("--batch_size 18 --crops_per_image 2", "--batch_size 2 --crops_per_image 1 --accumulate 2"),
                2,
                "BatchNorm needs at least 2 crops in each of 2 parts",
            ),
        ],
    )
    def test_and_nothing_is_written(
        self, work: Path, call: Any, train_line: str, change: tuple[str, str], status: int, said: str
    ) -> None:
        (work / "empty").mkdir()
        answer = call(f"{train_line} --out run".replace(*change))
        assert (answer.status, answer.out) == (status, "")
        assert said in answer.err
        assert not (work / "run").exists()

    def test_half_a_store(self, work: Path, call: Any, train_line: str) -> None:
        (work / "store/targets/make/codes-00000.json").unlink()
        status, _, err = call(f"{train_line} --out run")
        assert status == 1
        assert "1 of 1 shard missing" in err
        assert "run the same fkd-ssl precompute again" in err
