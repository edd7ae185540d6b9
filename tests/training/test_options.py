"""Options of a training: accumulation, clipping, averages, single crops, compilation, initial weights, loggers."""

import copy
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fkd_ssl.data import FreshCrops
from fkd_ssl.data.sampler import PassSampler
from fkd_ssl.errors import FkdError, RequestError
from fkd_ssl.students import Student, load_student
from fkd_ssl.targets import TargetSpec, TeacherInfo
from fkd_ssl.training import loggers
from fkd_ssl.training.config import TrainConfig
from fkd_ssl.training.distiller import Distiller, update_average
from fkd_ssl.training.engine import check_batch, single_steps
from fkd_ssl.training.fit import AtomicCheckpoints
from fkd_ssl.training.groups import teacher_precision
from fkd_ssl.training.single_crop import SingleCropPasses

ALL = {
    "head": "simreg",
    "ema": 0.9,
    "objective": "feature_kl+0.1*queue_kl(queue=40)",
    "clip": 1.0,
    "single_crop_epochs": 2,
    "accumulate": 2,
    "warmup_epochs": 1,
}
"""All that keeps something between steps, and all that changes what a step is."""


class KilledError(Exception):
    """Simulates a killed process."""


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def dying(data: Any, after: int) -> Any:
    """A data set that raises KilledError after this many batches."""
    data, calls = copy.copy(data), [0]

    class Dying(type(data)):  # type: ignore[misc]
        def __getitems__(self, indices: Any) -> Any:
            calls[0] += 1
            if calls[0] > after:
                raise KilledError
            return super().__getitems__(indices)

    data.__class__ = Dying
    return data


class TestAccumulation:
    def test_parts_give_the_steps_of_the_whole(self, make_run: Any) -> None:
        """SqueezeNet has no BatchNorm, so a batch's loss is the mean over its parts, up to the last bits of fp32."""
        whole, parts = make_run("whole").train(), make_run("parts", accumulate=4).train()
        assert parts.column("step") == whole.column("step") == list(range(1, 10))
        assert parts.column("loss") == pytest.approx(whole.column("loss"), rel=1e-5)
        assert parts.column("lr") == whole.column("lr")
        assert {key: parts.results[key] for key in ("steps", "crops_seen")} == {"steps": 9, "crops_seen": 144}

    def test_the_learning_rate_decays_linearly(self, make_run: Any) -> None:
        run = make_run("linear", lr_decay="linear").train()
        assert run.column("lr") == pytest.approx([run.config.lr * (1 - step / 9) for step in range(9)])

    def test_parts_must_divide_a_batch(self) -> None:
        with pytest.raises(RequestError, match=r"accumulate 3: does not divide the 64 images of a batch"):
            TrainConfig(images="i", out="o", store="s", accumulate=3, batch_size=256)

    def test_processes_must_divide_a_batch(self) -> None:
        config = TrainConfig(images="i", out="o", store="s", accumulate=2, batch_size=24)
        with pytest.raises(RequestError, match=r"2 processes of 2 parts do not divide its 6 images; .* of 16"):
            check_batch(config, 100, world=2)


class TestResume:
    """After a kill at any step and a resume, final weights, average and queue are bit-identical on the CPU."""

    @pytest.mark.parametrize("after", [1, 8, 13])  # batches, of which a step has two
    def test_everything_at_once(self, make_run: Any, after: int) -> None:
        whole = make_run("whole", **ALL).train()
        run = make_run("run", **ALL)
        data = run.data
        run.data = dying(data, after)
        with pytest.raises(KilledError):
            run.train()
        run.data = data
        run.train()
        assert {key.partition(".")[0] for key in run.weights} == {"student", "average", "parts"}
        assert equal(run.weights, whole.weights)
        for column in ("step", "loss", "kl", "lr", "crops"):
            assert run.column(column) == whole.column(column)

    @pytest.mark.parametrize("after", [1, 8, 13])
    def test_labels_mixing_a_discriminator_and_drops(self, make_run: Any, after: int) -> None:
        options = {
            "targets": "labels",
            "objective": "soft_ce+0.1*discriminator",
            "head": "classifier",
            "label_smoothing": 0.1,
            "mixup": 0.8,
            "cutmix": 1.0,
            "accumulate": 2,
            "lr_decay": "2,4",
        }
        about = [TeacherInfo(name="labels", spec=TargetSpec("distribution", (3,)))]
        whole = make_run("whole", **options).train(targets=about)
        first = whole.config.lr
        assert whole.column("lr") == pytest.approx([first] * 3 + [first / 10] * 3 + [first / 100] * 3)
        initial = Student("squeezenet1_1", 3, head="classifier").state_dict()
        judge = {key for key in whole.weights if key.startswith("parts")}
        assert judge
        assert len(whole.weights) == len(initial) + len(judge)
        run = make_run("run", **options)
        data = run.data
        run.data = dying(data, after)
        with pytest.raises(KilledError):
            run.train(targets=about)
        run.data = data
        run.train(targets=about)
        assert equal(run.weights, whole.weights)
        assert run.column("loss") == whole.column("loss")
        plain = make_run("plain", **{**options, "mixup": 0.0, "cutmix": 0.0}).train(targets=about)
        assert plain.column("loss") != whole.column("loss")

    def test_a_discriminator_learns_with_the_student(self, make_run: Any) -> None:
        options = {"targets": "labels", "objective": "discriminator", "head": "classifier"}
        about = [TeacherInfo(name="labels", spec=TargetSpec("distribution", (3,)))]
        one, more = (make_run(f"{n}", epochs=n, **options).train(targets=about) for n in (1, 6))
        key = next(key for key in one.weights if key.startswith("parts"))
        assert not torch.equal(one.weights[key], more.weights[key])

    def test_what_is_drawn_in_a_step_too(self, make_run: Any) -> None:
        """RegNet and EfficientNet have stochastic depth and dropout; here a dropout in the head."""

        def with_dropout(run: Any) -> Any:
            import fkd_ssl.students.heads as heads

            plain = heads.HEADS["mocov2"]
            heads.HEADS["mocov2"] = lambda f, d: nn.Sequential(nn.Dropout(0.5), *plain(f, d))
            try:
                return run.train()
            finally:
                heads.HEADS["mocov2"] = plain

        whole, again = (with_dropout(make_run(name)) for name in ("whole", "again"))
        assert equal(whole.weights, again.weights)
        run = make_run("run")
        data = run.data
        run.data = dying(data, 5)
        with pytest.raises(KilledError):
            with_dropout(run)
        run.data = data
        assert equal(with_dropout(run).weights, whole.weights)


class TestCheckpoints:
    def test_they_never_pass_through_another_folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A file from a temporary folder on another disk would be copied over the last good one."""
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
        AtomicCheckpoints(tmp_path).save_checkpoint({"step": 1}, tmp_path / "new" / "last.ckpt")
        assert torch.load(tmp_path / "new" / "last.ckpt", weights_only=True) == {"step": 1}
        assert [path.name for path in (tmp_path / "new").iterdir()] == ["last.ckpt"]

    def test_a_kill_while_one_is_written_leaves_the_last(self, tmp_path: Path) -> None:
        script = (
            "import os, sys, torch\n"
            "from pathlib import Path\n"
            "from fkd_ssl.training.fit import AtomicCheckpoints\n"
            "checkpoints = AtomicCheckpoints(Path(sys.argv[1]).parent)\n"
            "checkpoints.save_checkpoint({'step': 1}, sys.argv[1])\n"
            "sync = os.fsync\n"
            "os.fsync = lambda number: os.kill(os.getpid(), 9)\n"
            "checkpoints.save_checkpoint({'step': 2, 'weights': torch.zeros(10**6)}, sys.argv[1])\n"
        )
        done = subprocess.run([sys.executable, "-c", script, str(tmp_path / "last.ckpt")], check=False)
        assert done.returncode == -signal.SIGKILL
        assert torch.load(tmp_path / "last.ckpt", weights_only=True) == {"step": 1}


class TestSigterm:
    @pytest.fixture(autouse=True)
    def same_handlers(self) -> Iterator[None]:
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        yield
        for number, handler in handlers.items():
            signal.signal(number, handler)

    def test_it_saves_first_and_the_training_continues_to_the_same_bits(self, make_run: Any, tiny_teacher: Any) -> None:
        options = {"targets": "online", "teacher": "tiny", "epochs": 16}  # 24 steps; a checkpoint each two
        whole = make_run("whole", **options).train(embed=tiny_teacher.embed)
        calls = [0]

        def ended(images: torch.Tensor) -> Any:
            calls[0] += 1
            if calls[0] == 7:
                os.kill(os.getpid(), signal.SIGTERM)
            return tiny_teacher.embed(images)

        before = signal.getsignal(signal.SIGTERM)
        run = make_run("run", **options)
        with pytest.raises(KeyboardInterrupt):
            run.train(embed=ended)
        assert signal.getsignal(signal.SIGTERM) == before
        assert run.checkpoint()["global_step"] == 7
        assert run.column("step") == list(range(1, 8))
        run.train(embed=tiny_teacher.embed)
        assert equal(run.weights, whole.weights)
        assert run.column("loss") == whole.column("loss")


class TestAverage:
    def test_its_equation(self) -> None:
        average, network = nn.BatchNorm1d(3).double(), nn.BatchNorm1d(3).double()
        network(torch.from_numpy(np.random.default_rng(0).normal(2, 3, size=(8, 3))))
        network.weight.data = torch.tensor([1.0, 2.0, 3.0]).double()
        expected = 0.9 * average.running_mean.numpy() + 0.1 * network.running_mean.numpy()  # type: ignore[union-attr]
        update_average(average, network, 0.9)
        np.testing.assert_allclose(average.running_mean, expected, rtol=1e-12)  # type: ignore[arg-type]
        np.testing.assert_allclose(average.weight.detach(), [1.0, 1.1, 1.2], rtol=1e-12)
        assert average.num_batches_tracked is not None
        assert int(average.num_batches_tracked) == 1

    def test_it_is_what_is_scored_and_given_back_and_the_training_is_the_same(self, make_run: Any) -> None:
        seen: list[dict[str, torch.Tensor]] = []

        def score(student: Student) -> float:
            assert not student.training
            seen.append({key: value.clone() for key, value in student.state_dict().items()})
            return 1.0

        plain, run = make_run("plain").train(), make_run("run", ema=0.9).train(score=score)
        weights = run.weights
        for key, value in plain.weights.items():
            assert torch.equal(weights[key], value)
        average = {key.removeprefix("average."): value for key, value in weights.items() if key.startswith("average.")}
        assert equal(seen[-1], average)
        assert not equal(average, {key.removeprefix("student."): value for key, value in plain.weights.items()})
        student, _ = load_student(run.folder / "checkpoints" / "last.ckpt")
        assert equal(dict(student.state_dict()), average)

    def test_the_weights_follow_the_ramp(self, make_run: Any) -> None:
        """d_t = min(d, (1 + t) / (10 + t)): after one step with t = 0 it is 0.1 of the start and 0.9 of the student."""
        run = make_run("run", ema=0.99, epochs=0.5).train()
        torch.manual_seed(0)
        start = Student(run.config.student, 16).state_dict()["head.0.weight"].double()
        after, average = (run.weights[f"{name}.head.0.weight"].double() for name in ("student", "average"))
        torch.testing.assert_close(average, 0.1 * start + 0.9 * after, rtol=1e-6, atol=1e-7)

    @pytest.mark.parametrize("ema", [0.0, 1.0, -1.0])
    def test_a_decay_lies_between(self, ema: float) -> None:
        with pytest.raises(RequestError, match=rf"ema {ema}: must be between 0 and 1"):
            TrainConfig(images="i", out="o", store="s", ema=ema)


class TestClipping:
    def test_the_gradients_norm_is_at_most_that(self, make_run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        norms = []
        step = Distiller.optimizer_step

        def noted(self: Distiller, epoch: int, batch_idx: int, optimizer: Any, closure: Any) -> None:
            step(self, epoch, batch_idx, optimizer, closure)
            grads = [p.grad for p in self.student.parameters() if p.grad is not None]
            norms.append(float(torch.stack([g.norm() for g in grads]).norm()))

        monkeypatch.setattr(Distiller, "optimizer_step", noted)
        make_run("free").train()
        free = [*norms]
        norms.clear()
        make_run("clipped", clip=0.5 * min(free)).train()
        assert norms == pytest.approx([0.5 * min(free)] * 9, rel=1e-4)


class TestSingleCrops:
    def test_every_image_once_a_pass_and_every_crop_before_any_twice(self) -> None:
        """6 images x 2 crops, then single ones: steps 0 to 4 read 5 passes of half the images, the last ones all."""
        sampler = PassSampler(6, 3, 9, seed=0, single=4, crops_per_image=2)
        batches = [sampler.batch(step) for step in range(9)]
        assert [len(batch) for batch in batches] == [3] * 5 + [6] * 4
        plain = PassSampler(6, 3, 9, seed=0)
        assert batches[:5] == [plain.batch(step) for step in range(5)]
        assert [sorted(i for _, i in batch) for batch in batches[5:]] == [list(range(6))] * 4
        # five batches are two and a half passes: crops 0 to 5 are used
        assert [{p for p, _ in batch} for batch in batches[5:]] == [{6}, {7}, {8}, {9}]
        assert [sampler.is_single(p) for p in (0, 2, 6, 9)] == [False, False, True, True]

    def test_ranks_interleave(self) -> None:
        whole = PassSampler(6, 2, 5, seed=0, single=3, crops_per_image=2)
        ranks = [PassSampler(6, 2, 5, seed=0, single=3, crops_per_image=2, rank=r, world=2) for r in range(2)]
        for step in range(5):
            pairs = zip(*(rank.batch(step) for rank in ranks), strict=True)
            assert [pair for both in pairs for pair in both] == whole.batch(step)

    def test_the_crops_are_those_that_come_next(self, make_run: Any) -> None:
        """C = 4, M = 2: after the pass of crops a, a + 1 the single ones are a + 2, a + 3, a."""
        run = make_run()
        sampler = PassSampler(24, 12, 8, seed=0, single=6, crops_per_image=2)
        data = SingleCropPasses(run.data, sampler)
        two, third, fourth, again = (data.__getitems__([(p, 5)]).batch["images"] for p in (0, 2, 3, 4))
        assert (len(two), len(third)) == (2, 1)
        rest = run.data.__getitems__([(1, 5)]).batch["images"]
        assert torch.equal(torch.cat([third, fourth]), rest)
        assert torch.equal(again[0], two[0])

    def test_a_training(self, make_run: Any) -> None:
        run = make_run("run", single_crop_epochs=2, epochs=4).train()
        plain = make_run("plain", epochs=4).train()
        assert single_steps(run.config, 24) == 3
        assert run.column("step") == plain.column("step") == [1, 2, 3, 4, 5, 6]
        assert run.column("loss")[:3] == plain.column("loss")[:3]
        assert run.column("loss")[3] != plain.column("loss")[3]
        assert run.column("crops") == plain.column("crops")

    def test_a_batch_of_more_images_than_there_are_is_refused(self, make_run: Any) -> None:
        run = make_run(batch_size=32, single_crop_epochs=1)
        with pytest.raises(RequestError, match=r"batch_size 32: a batch has 32 images, the data set 24; choose at most 24"):
            run.train()

    def test_fresh_crops_go_on_too(self, make_run: Any, image_folder: Path) -> None:
        from fkd_ssl.crops import RECIPES
        from fkd_ssl.images import scan

        fresh = FreshCrops(scan(image_folder), RECIPES["mocov2"], crops_per_image=2, pixels=32)
        data = SingleCropPasses(fresh, PassSampler(24, 12, 8, seed=0, single=6, crops_per_image=2))
        third = data.__getitems__([(3, 5)]).batch["images"]
        assert torch.equal(third[0], fresh.__getitems__([(1, 5)]).batch["images"][1])

    def test_more_than_all_epochs_are_refused(self) -> None:
        with pytest.raises(RequestError, match=r"single_crop_epochs 5: must be at most epochs 4"):
            TrainConfig(images="i", out="o", store="s", epochs=4, single_crop_epochs=5)


@pytest.mark.slow
def test_a_compiled_backbone_gives_the_same_training(make_run: Any) -> None:
    plain, compiled = make_run("plain", epochs=1).train(), make_run("compiled", epochs=1, compile=True).train()
    assert compiled.column("loss") == pytest.approx(plain.column("loss"), rel=1e-4)
    assert compiled.weights.keys() == plain.weights.keys()


class TestInit:
    def test_the_second_step_starts_from_the_first(self, make_run: Any) -> None:
        narrow = {"width": 0.125, "stem": "small", "epochs": 1, "lr": 1e-9}
        first = make_run("first", student="reactnet_step1", **narrow).train()
        given, _ = load_student(first.folder / "checkpoints" / "last.ckpt")
        second = make_run("second", student="reactnet", **narrow).train(init=given.state_dict())
        for key in ("student.backbone.blocks.3.conv1.weight", "student.head.0.weight"):
            torch.testing.assert_close(second.weights[key], first.weights[key], rtol=0, atol=1e-7)
        assert second.checkpoint()["fkd_ssl_student"] == {
            "name": "reactnet",
            "stem": "small",
            "width": 0.125,
            "dim": 16,
            "pixels": 32,
        }
        student, _ = load_student(second.folder / "checkpoints" / "last.ckpt")
        assert student.feature_dim == 128

    def test_a_head_of_another_shape_is_new(self) -> None:
        one, two = Student("squeezenet1_1", 8), Student("squeezenet1_1", 4)
        before = two.head[2].weight.clone()
        two.start_from(one.state_dict())
        assert torch.equal(two.head[0].weight, one.head[0].weight)
        assert torch.equal(two.head[2].weight, before)

    def test_another_network_is_refused(self) -> None:
        with pytest.raises(RequestError, match=r"init: these weights are not those of squeezenet1_1.*; pass those of the same"):
            Student("squeezenet1_1", 8).start_from(Student("resnet18", 8).state_dict())


class TestLoggers:
    def test_tensorboard_gets_the_lines(self, make_run: Any) -> None:
        pytest.importorskip("tensorboard")
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        run = make_run("run", logger="tensorboard")
        run.folder.mkdir()
        run.train(logger=loggers.make_logger("tensorboard", run.folder), score=lambda student: 12.5)
        events = EventAccumulator(str(run.folder / "tensorboard"))
        events.Reload()
        losses = [(event.step, event.value) for event in events.Scalars("loss")]
        own = [(line["step"], line["loss"]) for line in run.metrics if line["loss"] is not None]
        assert losses == [(step, pytest.approx(loss)) for step, loss in own]
        assert events.Scalars("knn_top1")[-1].value == 12.5

    @pytest.mark.parametrize("name", ["tensorboard", "wandb", "mlflow"])
    def test_without_its_package_it_says_what_to_install(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(loggers, "find_spec", lambda name: None)
        with pytest.raises(RequestError, match=rf"logger {name}: {name} is not installed: pip install 'fkd_ssl\[{name}\]'"):
            loggers.check_logger(name)

    def test_mlflow_gets_the_lines(self, make_run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        mlflow = pytest.importorskip("mlflow")
        monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
        run = make_run("run", logger="mlflow")
        run.folder.mkdir()
        logger = loggers.make_logger("mlflow", run.folder)
        run.train(logger=logger, score=lambda student: 12.5)
        client = mlflow.MlflowClient(f"sqlite:///{run.folder}/mlflow.db")
        (found,) = client.search_runs([logger.experiment_id])
        assert (found.info.run_name, found.data.metrics["knn_top1"]) == ("run", 12.5)
        losses = [(metric.step, metric.value) for metric in client.get_metric_history(found.info.run_id, "loss")]
        own = [(line["step"], line["loss"]) for line in run.metrics if line["loss"] is not None]
        assert losses == [(step, pytest.approx(loss)) for step, loss in own]

    def test_wandb_gets_the_lines(self, make_run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        wandb = pytest.importorskip("wandb")
        monkeypatch.setenv("WANDB_MODE", "offline")
        run = make_run("run", logger="wandb")
        run.folder.mkdir()
        run.train(logger=loggers.make_logger("wandb", run.folder), score=lambda student: 12.5)
        assert wandb.run.summary["knn_top1"] == 12.5
        last = [line["loss"] for line in run.metrics if line["loss"] is not None][-1]
        assert wandb.run.summary["loss"] == pytest.approx(last)
        wandb.finish()
        (log,) = run.folder.glob("wandb/offline-run-*/run-*.wandb")
        assert b"knn_top1" in log.read_bytes()


def test_sync_batchnorm_needs_gpus(make_run: Any) -> None:
    with pytest.raises(RequestError, match=r"sync_batchnorm: needs GPUs; this machine has none"):
        make_run(sync_batchnorm=True).train()


def test_a_divergence_names_the_last_good_checkpoint(make_run: Any, tiny_teacher: Any) -> None:
    calls = [0]

    def breaking(images: torch.Tensor) -> Any:
        calls[0] += 1
        return tiny_teacher.embed(images) * (float("nan") if calls[0] == 6 else 1.0)

    run = make_run("run", targets="online", teacher="tiny")
    message = r"step 6: a teacher's targets are NaN or infinity; the last good checkpoint is .*last\.ckpt, of step 4;"
    with pytest.raises(FkdError, match=message):
        run.train(embed=breaking)
    calls[0] = 5
    with pytest.raises(FkdError, match=r"the last good checkpoint is .*last\.ckpt, of step 4;"):
        run.train(embed=breaking)


def test_queue_kl_stored_equals_online(make_run: Any, tiny_teacher: Any) -> None:
    options = {"objective": "queue_kl(queue=50, temperature=0.2, teacher_temperature=0.05)"}
    stored = make_run("stored", **options).train()
    online = make_run("online", **options, targets="online", teacher="tiny").train(embed=tiny_teacher.embed)
    assert stored.column("loss") == pytest.approx(online.column("loss"), rel=1e-4)
    assert torch.equal(stored.weights["parts.0.next"], torch.tensor(9 * 16 % 50))
    assert not torch.equal(stored.weights["parts.0.queue"][:5], stored.weights["parts.0.queue"][5:10])


class TestCheckpointInterval:
    def test_checkpoints_of_short_epochs_are_left_out(self, make_run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        """Six epochs of one and a half steps: with an interval that never ends, only the last step is saved."""
        saved: list[int] = []
        real = AtomicCheckpoints.save_checkpoint

        def save(self: Any, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
            saved.append(checkpoint["global_step"])
            real(self, checkpoint, path, storage_options)

        monkeypatch.setattr(AtomicCheckpoints, "save_checkpoint", save)
        every = make_run("every", checkpoint_interval=0).train()
        assert saved == [2, 4, 6, 8, 9]
        saved.clear()
        once = make_run("once", checkpoint_interval=3600).train()
        assert saved == [9]
        assert once.column("loss") == every.column("loss")

    def test_the_interval_starts_again_with_each_checkpoint(self, make_run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        """A clock of 10 seconds a call is read once when the training starts, at each epoch, and after each checkpoint."""
        now = iter(range(0, 10_000, 10))
        monkeypatch.setattr("fkd_ssl.training.monitor.time", SimpleNamespace(monotonic=lambda: next(now)))
        saved: list[int] = []
        real = AtomicCheckpoints.save_checkpoint

        def save(self: Any, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
            saved.append(checkpoint["global_step"])
            real(self, checkpoint, path, storage_options)

        monkeypatch.setattr(AtomicCheckpoints, "save_checkpoint", save)
        make_run(checkpoint_interval=15).train()
        assert saved == [4, 8, 9]  # 20 seconds after the start, 20 after the checkpoint of step 4, and the last step

    def test_it_must_not_be_negative(self, make_run: Any) -> None:
        with pytest.raises(RequestError, match=r"checkpoint_interval -1: must be at least 0, and finite"):
            make_run(checkpoint_interval=-1)


class TestTeacherPrecision:
    def test_it_is_that_of_the_student_by_default(self, make_run: Any) -> None:
        given = {"targets": "online", "teacher": "x:y", "store": None}
        found = [
            teacher_precision(make_run(precision=precision, teacher_precision=teacher, **given).config)
            for precision in ("32-true", "bf16-mixed", "16-mixed")
            for teacher in (None, "fp32")
        ]
        assert found == ["fp32", "fp32", "bf16", "fp32", "fp16", "fp32"]

    def test_stored_targets_have_none(self, make_run: Any) -> None:
        with pytest.raises(RequestError, match=r"teacher_precision bf16: is not used with --targets stored"):
            make_run(teacher_precision="bf16")

    @pytest.mark.parametrize(("precision", "expected"), [(None, False), ("fp32", True)])
    def test_tf32_of_the_teacher_is_in_the_results(
        self, make_run: Any, tiny_teacher: Any, monkeypatch: pytest.MonkeyPatch, precision: str | None, expected: bool
    ) -> None:
        """On a GPU with TF32, which the CPU of this test stands for."""
        monkeypatch.setattr("fkd_ssl.training.engine.uses_tf32", lambda precision: precision == "fp32")
        options = {"targets": "online", "teacher": "x:y", "store": None, "precision": "bf16-mixed", "epochs": 1}
        run = make_run(teacher_precision=precision, **options).train(embed=tiny_teacher.embed)
        assert run.results["tf32"] is expected

    def test_a_teacher_that_gives_nan_is_named(self, make_run: Any, tiny_teacher: Any) -> None:
        run = make_run(targets="online", teacher="x:y", store=None, checkpoint_interval=0)
        with pytest.raises(FkdError, match=r"step 1: a teacher's targets are NaN or infinity; .*try --teacher_precision fp32"):
            run.train(embed=lambda images: tiny_teacher.embed(images) * float("nan"))
