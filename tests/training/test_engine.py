"""Trainings from end to end: stored equals online, a killed one continues to the same bits, golden losses."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fkd_ssl.commands.resolve import load_student
from fkd_ssl.crops import RECIPES
from fkd_ssl.data import FreshCrops, StoredCrops
from fkd_ssl.errors import FkdError, RequestError
from fkd_ssl.images import scan
from fkd_ssl.students import Student
from fkd_ssl.targets import TargetSpec, TeacherInfo
from fkd_ssl.training.config import TrainConfig
from fkd_ssl.training.engine import total_steps

GOLDEN = Path(__file__).parent / "golden_losses.json"


class KilledError(Exception):
    """Simulates a killed process, which cannot save anything."""


def dies_after(steps: int, embed: Any) -> Any:
    """A teacher that raises KilledError after this many batches."""
    calls = [0]

    def dying(images: torch.Tensor) -> torch.Tensor:
        calls[0] += 1
        if calls[0] > steps:
            raise KilledError
        return embed(images)  # type: ignore[no-any-return]

    return dying


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


class TestStoredEqualsOnline:
    def test_the_same_loss_at_every_step(self, make_run: Any, tiny_teacher: Any) -> None:
        stored = make_run("stored", epochs=9).train()
        online = make_run("online", epochs=9, targets="online", teacher="tiny").train(embed=tiny_teacher.embed)
        assert stored.column("step") == online.column("step") == list(range(1, 15))
        assert stored.column("loss") == pytest.approx(online.column("loss"), rel=1e-5)
        assert stored.column("kl") == pytest.approx(online.column("kl"), rel=1e-3)
        assert tiny_teacher.crops_seen == online.results["teacher_forwards"] == 14 * 16
        assert stored.results["teacher_forwards"] == 0

    def test_and_other_losses_on_fresh_crops(self, make_run: Any, tiny_teacher: Any, image_folder: Path) -> None:
        stored = make_run("stored", epochs=1).train()
        data = FreshCrops(scan(image_folder), RECIPES["mocov2"], crops_per_image=2, pixels=32)
        fresh = make_run("fresh", data, epochs=1, targets="online", teacher="tiny").train(embed=tiny_teacher.embed)
        assert stored.column("loss")[0] != pytest.approx(fresh.column("loss")[0], rel=1e-4)

    def test_a_lossy_codec_gives_nearly_the_same_loss(
        self, make_run: Any, make_store: Any, image_folder: Path, tmp_path: Path
    ) -> None:
        exact = make_run("exact", epochs=2).train()
        lossy = StoredCrops(make_store(tmp_path / "sq8", codec="SQ8"), image_folder, crops_per_image=2, pixels=32)
        run = make_run("lossy", lossy, epochs=2).train()
        assert run.column("loss")[0] == pytest.approx(exact.column("loss")[0], rel=1e-3)
        assert run.column("loss") == pytest.approx(exact.column("loss"), rel=2e-2)
        assert run.column("loss") != exact.column("loss")


class TestSeveralTeachers:
    NAMES = ("a", "b")

    @pytest.fixture
    def teachers(self, new_teacher: Any) -> list[Any]:
        """Two networks; the second has prototypes, as has the first."""
        teachers = [new_teacher(seed=seed, name=name) for seed, name in enumerate(self.NAMES)]
        for seed, teacher in enumerate(teachers):
            generator = torch.Generator().manual_seed(seed)
            teacher.info.arrays["prototypes"] = torch.randn(20, 16, generator=generator).numpy()
        return teachers

    @pytest.fixture
    def train_both(self, make_run: Any, make_store: Any, teachers: list[Any], image_folder: Path, tmp_path: Path) -> Any:
        """train_both(**options) -> a run on stored targets and an online run on the same crops."""
        for teacher in teachers:
            store = make_store(tmp_path / "two", codec="Flat", teacher=teacher)

        def train(names: tuple[str, ...] = self.NAMES, **options: Any) -> tuple[Any, Any]:
            data = StoredCrops(store, image_folder, crops_per_image=2, pixels=32, column=list(names))
            crops = StoredCrops(store, image_folder, crops_per_image=2, pixels=32, with_targets=False)
            columns = [store.column(name) for name in names]
            infos = [c.info for c in columns]
            embeds = [teacher.embed for teacher in teachers if teacher.info.name in names]
            named = ",".join(names)
            stored = make_run("stored", data, column=named, **options).train(targets=infos)
            online = make_run("online", crops, targets="online", **{"teacher": named, **options}).train(
                targets=infos, embeds=embeds
            )
            return stored, online

        return train

    def test_stored_equals_online_at_every_step(self, train_both: Any, teachers: list[Any]) -> None:
        stored, online = train_both(epochs=5, teacher_weights="3,1")
        assert len(stored.column("loss")) == 8
        assert stored.column("loss") == pytest.approx(online.column("loss"), rel=1e-5)
        assert stored.column("kl") == pytest.approx(online.column("kl"), rel=1e-3)
        assert teachers[0].crops_seen - teachers[1].crops_seen == 0
        assert online.results["teacher_forwards"] == 2 * 8 * 16
        assert stored.results["teacher_forwards"] == 0

    def test_prototype_ce_stored_equals_online_and_learns(self, train_both: Any) -> None:
        stored, online = train_both(("b",), epochs=12, objective="prototype_ce")
        assert stored.column("loss") == pytest.approx(online.column("loss"), rel=1e-5)
        kl = stored.column("kl")
        assert all(value > 0 for value in kl)
        assert sum(kl[-4:]) < 0.9 * sum(kl[:4])

    def test_both_heads_are_trained_and_the_checkpoint_gives_them_back(self, train_both: Any) -> None:
        stored, _ = train_both(epochs=1)
        assert stored.checkpoint()["fkd_ssl_student"] == {"name": "squeezenet1_1", "dim": [16, 16], "pixels": 32}
        student, _ = load_student(stored.folder / "checkpoints" / "last.ckpt")
        assert student.dims == [16, 16]
        saved = {key.removeprefix("student."): value for key, value in stored.weights.items()}
        assert equal(dict(student.state_dict()), saved)
        torch.manual_seed(stored.config.seed)
        fresh = Student("squeezenet1_1", 16, 16).state_dict()
        for key in ("head.0.weight", "more_heads.0.0.weight", "more_heads.0.2.bias"):
            assert not torch.equal(saved[key], fresh[key])

    def test_a_killed_training_continues_to_the_same_bits(self, make_run: Any, teachers: list[Any]) -> None:
        options = {"targets": "online", "teacher": "a,b", "epochs": 3}
        infos = [TeacherInfo(name=teacher.info.name, spec=TargetSpec("embedding", (16,))) for teacher in teachers]
        embeds = [teacher.embed for teacher in teachers]
        whole = make_run("whole", **options).train(targets=infos, embeds=embeds)
        run = make_run("run", **options)
        with pytest.raises(KilledError):
            run.train(targets=infos, embeds=[embeds[0], dies_after(3, embeds[1])])
        assert equal(run.train(targets=infos, embeds=embeds).weights, whole.weights)
        assert run.column("loss") == whole.column("loss")

    def test_targets_that_lack_what_the_objective_needs_are_refused(self, make_run: Any) -> None:
        run = make_run(objective="prototype_ce")
        with pytest.raises(RequestError, match=r"the targets of 'tiny' have no prototypes"):
            run.train()
        assert list(run.folder.iterdir()) == []


class TestSteps:
    @pytest.mark.parametrize(
        ("epochs", "images", "batch", "steps"),
        [(100, 24, 16, 150), (1, 24, 16, 2), (0.5, 24, 16, 1), (2, 1_281_167, 256, 10010), (3, 10, 10, 3)],
    )
    def test_total_steps(self, epochs: float, images: int, batch: int, steps: int) -> None:
        config = TrainConfig(images="i", out="o", store="s", epochs=epochs, batch_size=batch, crops_per_image=1)
        assert total_steps(config, images) == steps

    def test_m_does_not_change_the_amount_of_training(self, make_run: Any) -> None:
        one = make_run("m1", crops_per_image=1, epochs=2).train()
        four = make_run("m4", crops_per_image=4, epochs=2).train()
        for key in ("steps", "crops_seen", "epochs"):
            assert one.results[key] == four.results[key]
        assert one.results["steps"] == 3
        assert one.column("epoch") == four.column("epoch")

    def test_a_batch_larger_than_the_set_is_refused(self, make_run: Any) -> None:
        run = make_run(batch_size=64)
        with pytest.raises(RequestError, match=r"batch_size 64: a batch has 32 images, the data set 24; choose at most 48"):
            run.train()
        assert list(run.folder.iterdir()) == []


class TestResults:
    def test_what_results_say(self, make_run: Any) -> None:
        results = make_run().train().results
        expected = {
            "epochs": 6,
            "steps": 9,
            "images": 24,
            "crops_seen": 144,
            "stored_crops_per_image": 4,
            "teacher_forwards": 0,
            "knn_top1": None,
            "knn_best": None,
        }
        assert {key: results[key] for key in expected} == expected
        assert results["train_seconds"] > 0
        assert 0 <= results["data_wait"] <= 1
        assert results["peak_memory_bytes"] > 1e7
        json.dumps(results)

    def test_metrics_have_a_line_every_log_every_steps_and_at_the_end(self, make_run: Any) -> None:
        fine, coarse = make_run("fine").train(), make_run("coarse", log_every=4).train()
        assert fine.column("step") == list(range(1, 10))
        assert coarse.column("step") == [4, 8, 9]
        assert coarse.column("crops") == [64, 128, 144]
        assert coarse.column("epoch") == pytest.approx([64 / 24, 128 / 24, 6])
        losses = fine.column("loss")
        assert coarse.column("loss") == pytest.approx([sum(losses[:4]) / 4, sum(losses[4:8]) / 4, losses[8]], rel=1e-6)
        seconds = fine.column("seconds")
        assert seconds == sorted(seconds)
        assert all(0 <= wait <= 1 for wait in fine.column("wait"))

    def test_lr_is_what_the_step_used(self, make_run: Any) -> None:
        run = make_run(epochs=6, warmup_epochs=2, lr=0.01).train()
        expected = [0.01 / 3, 0.02 / 3, 0.01, 0.01]
        assert run.column("lr")[:4] == pytest.approx(expected)
        assert 0 < run.column("lr")[-1] < 0.001

    def test_the_loss_is_the_kl_above_its_floor(self, make_run: Any, tiny_teacher: Any) -> None:
        run = make_run(epochs=0.5).train()
        assert 0 < run.column("kl")[0] < run.column("loss")[0]
        assert run.column("loss")[0] <= 2.7726 + run.column("kl")[0]  # a floor is an entropy: at most ln 16

    def test_a_second_training_is_bit_identical_and_another_seed_is_not(self, make_run: Any) -> None:
        a, b, c = make_run("a", epochs=2).train(), make_run("b", epochs=2).train(), make_run("c", epochs=2, seed=1).train()
        assert equal(a.weights, b.weights)
        assert not equal(a.weights, c.weights)

    def test_workers_do_not_change_the_training(self, make_run: Any) -> None:
        alone, workers = make_run("alone", epochs=2).train(), make_run("workers", epochs=2, workers=2).train()
        assert equal(alone.weights, workers.weights)

    @pytest.mark.parametrize("workers", [0, 2])
    def test_crops_made_on_the_device_do_not_change_the_training(
        self, make_run: Any, flat_store: Any, image_folder: Path, workers: int
    ) -> None:
        data = StoredCrops(flat_store, image_folder, crops_per_image=2, pixels=32, decode_only=True)
        device = make_run("device", data=data, device_crops="on", workers=workers).train()
        assert device.column("loss") == make_run().train().column("loss")

    def test_an_online_teacher_of_another_size_has_its_crops_made_there_too(
        self, make_run: Any, flat_store: Any, image_folder: Path, tiny_teacher: Any
    ) -> None:
        losses = []
        for where in (False, True):
            data = StoredCrops(
                flat_store, image_folder, crops_per_image=2, pixels=32, with_targets=False, teacher_pixels=48, decode_only=where
            )
            run = make_run(
                f"run{where}",
                data=data,
                targets="online",
                teacher="x:y",
                teacher_pixels=48,
                device_crops="on" if where else "off",
            )
            losses.append(run.train(embed=tiny_teacher.embed).column("loss"))
        assert losses[0] == losses[1]

    def test_mixed_precision_is_near(self, make_run: Any) -> None:
        full, mixed = make_run("full", epochs=2).train(), make_run("mixed", epochs=2, precision="bf16-mixed").train()
        assert mixed.column("loss") == pytest.approx(full.column("loss"), rel=5e-2)
        assert mixed.column("loss") != full.column("loss")


@pytest.mark.parametrize(("name", "lr"), [("adam", 1e-3), ("adamw", 1e-3), ("sgd", 0.02), ("lars", 0.2)])
def test_every_optimizer_lowers_the_loss(make_run: Any, name: str, lr: float) -> None:
    decay = 1e-6 if name == "lars" else 0
    losses = make_run(optimizer=name, lr=lr, epochs=16, objective="cosine", weight_decay=decay).train().column("loss")
    assert sum(losses[-5:]) < 0.97 * sum(losses[:5])


class TestResume:
    @pytest.fixture
    def make_run(self, make_run: Any) -> Any:
        """With BatchNorm, whose running statistics must also be restored."""
        return partial(make_run, student="shufflenet_v2_x0_5")

    @pytest.fixture(autouse=True)
    def same_ctrl_c(self) -> Iterator[None]:
        handler = signal.getsignal(signal.SIGINT)
        yield
        signal.signal(signal.SIGINT, handler)

    def test_a_killed_training_continues_to_the_same_bits(self, make_run: Any, tiny_teacher: Any) -> None:
        options = {"targets": "online", "teacher": "tiny", "warmup_epochs": 1}
        whole = make_run("whole", **options).train(embed=tiny_teacher.embed)
        ignored = {"train_seconds", "crops_per_second", "data_wait", "peak_memory_bytes"}
        expected = {key: value for key, value in whole.results.items() if key not in ignored}
        for steps in (1, 3, 7):  # before the first checkpoint, and between two
            run = make_run(f"killed after {steps}", **options)
            with pytest.raises(KilledError):
                run.train(embed=dies_after(steps, tiny_teacher.embed))
            run.train(embed=tiny_teacher.embed)
            assert equal(run.weights, whole.weights), steps
            for column in ("step", "epoch", "crops", "loss", "kl", "lr"):
                assert run.column(column) == whole.column(column), (steps, column)
            assert {key: value for key, value in run.results.items() if key not in ignored} == expected

    def test_targets_of_another_dimension_are_refused(self, make_run: Any, tiny_teacher: Any) -> None:
        run = make_run("run", targets="online", teacher="tiny")
        with pytest.raises(KilledError):
            run.train(embed=dies_after(3, tiny_teacher.embed))
        with pytest.raises(RequestError, match=r"last.ckpt: was trained on targets of D = 16, and now they have D = 5: give"):
            run.train(embed=tiny_teacher.embed, targets=[TeacherInfo(name="tiny", spec=TargetSpec("embedding", (5,)))])

    def test_a_line_of_several_steps_survives(self, make_run: Any, tiny_teacher: Any) -> None:
        options = {"targets": "online", "teacher": "tiny", "log_every": 4}
        whole = make_run("whole", **options).train(embed=tiny_teacher.embed)
        with pytest.raises(KilledError):
            make_run("killed", **options).train(embed=dies_after(7, tiny_teacher.embed))
        resumed = make_run("killed", **options).train(embed=tiny_teacher.embed)
        assert resumed.column("step") == [4, 8, 9]
        assert resumed.column("loss") == whole.column("loss")

    def test_stored_targets_continue_from_where_they_were(self, make_run: Any) -> None:
        whole = make_run("whole").train()
        killed = make_run("killed")

        class Dying(type(killed.data)):  # type: ignore[misc]
            def __getitems__(self, indices: Any) -> Any:
                if indices[0][0] == 2:
                    raise KilledError
                return super().__getitems__(indices)

        kind = type(killed.data)
        killed.data.__class__ = Dying
        with pytest.raises(KilledError):
            killed.train()
        killed.data.__class__ = kind
        assert 0 < killed.checkpoint()["global_step"] < 9
        assert equal(killed.train().weights, whole.weights)
        assert killed.column("step") == list(range(1, 10))

    def test_seconds_add_up_over_sessions(self, make_run: Any, tiny_teacher: Any) -> None:
        run = make_run(targets="online", teacher="tiny")
        with pytest.raises(KilledError):
            run.train(embed=dies_after(5, tiny_teacher.embed))
        run.train(embed=tiny_teacher.embed)
        seconds = run.column("seconds")
        assert seconds == sorted(seconds)
        assert run.results["train_seconds"] >= seconds[-2]

    def test_ctrl_c_arrives_as_such_and_the_training_continues(self, make_run: Any, tiny_teacher: Any) -> None:
        options = {"targets": "online", "teacher": "tiny"}
        whole = make_run("whole", **options).train(embed=tiny_teacher.embed)
        calls = [0]

        def interrupted(images: torch.Tensor) -> torch.Tensor:
            calls[0] += 1
            if calls[0] == 6:
                raise KeyboardInterrupt
            return tiny_teacher.embed(images)  # type: ignore[no-any-return]

        run = make_run("run", **options)
        with pytest.raises(KeyboardInterrupt):
            run.train(embed=interrupted)
        assert equal(run.train(embed=tiny_teacher.embed).weights, whole.weights)

    @pytest.mark.slow
    def test_a_process_that_ends_at_once_continues(self, make_run: Any) -> None:
        whole = make_run("whole").train()
        run = make_run("run")
        run.folder.mkdir()
        script = (
            "import os, sys, torch\n"
            "from pathlib import Path\n"
            "import fkd_ssl\n"
            "from fkd_ssl.data import StoredCrops\n"
            "from fkd_ssl.targets import TargetSpec, TeacherInfo\n"
            "from fkd_ssl.training.metrics import MetricsWriter\n"
            "from fkd_ssl.training.config import TrainConfig\n"
            "from fkd_ssl.training.engine import train\n"
            "torch.set_num_threads(1)\n"
            f"config = TrainConfig(**{run.config.__dict__!r})\n"
            "write = MetricsWriter._append\n"
            "def dying(self, step, **values):\n"
            "    write(self, step, **values)\n"
            "    if step == 5: os._exit(9)\n"
            "MetricsWriter._append = dying\n"
            "data = StoredCrops(fkd_ssl.open_store(config.store), config.images, crops_per_image=2, pixels=32)\n"
            "train(config, data, Path(config.out), targets=[TeacherInfo(name='tiny', spec=TargetSpec('embedding', (16,)))])\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}
        )
        assert done.returncode == 9, done.stderr
        assert run.column("step") == [1, 2, 3, 4, 5]
        assert run.checkpoint()["global_step"] == 4
        run.train()
        assert equal(run.weights, whole.weights)
        assert run.column("step") == list(range(1, 10))
        assert run.column("loss") == whole.column("loss")


class TestCheckpoints:
    def test_the_last_and_the_best_by_knn(self, make_run: Any) -> None:
        scores = [20.0, 30.0, 10.0]
        run = make_run(knn_every=2).train(score=lambda student: scores.pop())
        assert sorted(path.name for path in (run.folder / "checkpoints").iterdir()) == ["best.ckpt", "last.ckpt"]
        assert run.results["knn_top1"] == 20.0
        assert run.results["knn_best"] == {"top1": 30.0, "step": 6}
        assert run.checkpoint("best")["global_step"] == 6
        assert run.checkpoint("last")["global_step"] == 9
        knn = [(line["step"], line["knn_top1"]) for line in run.metrics if line["knn_top1"] is not None]
        assert knn == [(3, 10.0), (6, 30.0), (9, 20.0)]
        assert all(line["loss"] is None for line in run.metrics if line["knn_top1"] is not None)

    def test_without_a_score_there_is_no_best(self, make_run: Any) -> None:
        run = make_run(epochs=1).train()
        assert [path.name for path in (run.folder / "checkpoints").iterdir()] == ["last.ckpt"]

    def test_scoring_changes_nothing_and_sees_the_student_in_eval_mode(self, make_run: Any) -> None:
        modes = []

        def score(student: nn.Module) -> float:
            modes.append((student.training, any(m.training for m in student.modules()), torch.is_grad_enabled()))
            return 1.0

        plain, scored = make_run("plain").train(), make_run("scored", knn_every=2).train(score=score)
        assert set(modes) == {(False, False, False)}
        assert equal(plain.weights, scored.weights)

    def test_the_best_is_remembered_over_a_restart(self, make_run: Any, tiny_teacher: Any) -> None:
        def score(student: nn.Module) -> float:
            return scores.pop()

        options = {"targets": "online", "teacher": "tiny", "knn_every": 2}
        scores = [30.0, 20.0, 10.0, 50.0]
        with pytest.raises(KilledError):
            make_run("run", **options).train(embed=dies_after(5, tiny_teacher.embed), score=score)
        run = make_run("run", **options).train(embed=tiny_teacher.embed, score=score)
        assert run.results["knn_best"]["top1"] == 50.0
        assert run.results["knn_best"]["step"] == run.checkpoint("best")["global_step"] == 3

    def test_a_checkpoint_gives_the_student_back(self, make_run: Any) -> None:
        images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
        seen = {}

        def score(student: Any) -> float:
            seen["features"] = student.features(images)
            seen["weights"] = {key: value.clone() for key, value in student.state_dict().items()}
            return 1.0

        run = make_run(epochs=2).train(score=score)
        student, pixels = load_student(run.folder / "checkpoints" / "last.ckpt")
        assert pixels == 32
        assert not student.training
        assert equal(dict(student.state_dict()), seen["weights"])
        with torch.no_grad():
            exact = student.to(memory_format=torch.contiguous_format).features(images)
        assert torch.equal(exact, seen["features"])

    def test_a_checkpoint_says_what_it_is(self, make_run: Any) -> None:
        saved = make_run(epochs=1).train().checkpoint()
        assert saved["fkd_ssl_student"] == {"name": "squeezenet1_1", "dim": 16, "pixels": 32}


def test_losses_are_golden(make_run: Any) -> None:
    """20 steps of all parts together. To change them on purpose: UPDATE_GOLDEN=1 pytest ..."""
    run = make_run(epochs=13, warmup_epochs=2).train()
    found = {name: run.column(name) for name in ("loss", "kl")}
    if os.environ.get("UPDATE_GOLDEN"):
        GOLDEN.write_text(json.dumps(found, indent=1) + "\n")
    golden = json.loads(GOLDEN.read_text())
    assert len(golden["loss"]) == 20
    assert found["loss"] == pytest.approx(golden["loss"], rel=1e-3)
    assert found["kl"] == pytest.approx(golden["kl"], rel=5e-2)


class TestDivergence:
    def test_a_loss_that_is_no_number_stops_before_it_is_saved(self, make_run: Any, tiny_teacher: Any) -> None:
        calls = [0]

        def breaking(images: torch.Tensor) -> torch.Tensor:
            calls[0] += 1
            return tiny_teacher.embed(images) * (float("nan") if calls[0] == 5 else 1.0)  # type: ignore[no-any-return]

        run = make_run("run", targets="online", teacher="tiny")
        with pytest.raises(FkdError, match=r"step 5: a teacher.s targets are NaN or infinity"):
            run.train(embed=breaking)
        assert run.column("step") == [1, 2, 3, 4]
        assert all(
            torch.isfinite(value).all() for value in run.checkpoint()["state_dict"].values() if value.is_floating_point()
        )
