"""The functions of `fkd_ssl`: with paths and with objects they do what the command line does."""

import copy
import csv
import dataclasses
import inspect
import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import torchvision
from torch import nn

import fkd_ssl
from fkd_ssl import api, cli, options, runs
from fkd_ssl.errors import CheckpointError, FkdError, RequestError
from fkd_ssl.images import ImageSource, open_images

TEACHER = "teacher:own_teacher:make"
SETS: dict[str, Any] = {"train": "train", "val": "val", "workers": 0}
TRAIN: dict[str, Any] = {
    "student": "squeezenet1_1", "epochs": 2, "batch_size": 18, "crops_per_image": 2, "pixels": 32, "workers": 0, "log_every": 1,
    "lr": 1e-3, "warmup_epochs": 0.0,
}  # fmt: skip

GIVEN: dict[str, Any] = {"images": "train", "store": "store", "out": "run"}
GIVEN_TEACHER: dict[str, Any] = {"images": "train", "store": "new", "teacher": nn.ReLU()}


@pytest.fixture
def net(work: Path) -> nn.Module:
    """The module of the teacher `own_teacher:make`."""
    import own_teacher

    made: nn.Module = own_teacher.make()
    return made


@pytest.fixture
def trained(work: Path) -> Any:
    """A student of the store."""
    return fkd_ssl.train("train", store="store", out="run", **TRAIN)


def losses(run: str | Path) -> list[str]:
    with (Path(run) / "metrics.csv").open() as file:
        return [line["loss"] for line in csv.DictReader(file)]


def line(verb: str, **given: Any) -> str:
    """The command line with these options."""
    return f"{verb} {' '.join(f'--{name} {value}' for name, value in given.items())}"


class TestTheSameAsTheCommandLine:
    def test_knn(self, net: nn.Module, call: Any) -> None:
        found = json.loads(call(line("knn", model=TEACHER, **SETS) + " --json").out)
        images = {"train": open_images("train"), "val": open_images("val")}
        for model, sets in ((TEACHER, SETS), (net, SETS), (net, {**SETS, **images}), (net.forward, {**SETS, "pixels": 32})):
            score = fkd_ssl.knn(model, **sets)
            assert (score.top1, score.top5, list(score.interval95)) == (found["top1"], found["top5"], found["interval95"])
            assert score.correct.mean() * 100 == pytest.approx(score.top1)
            assert score.values["data"] == found["data"]

    def test_several_k_are_a_list_and_numbers_are_numbers(self, net: nn.Module, call: Any) -> None:
        found = json.loads(call(line("knn", model=TEACHER, **SETS, k="1,5", temperature="0.07,inf") + " --json").out)
        score = fkd_ssl.knn(net, **SETS, k=[1, 5], temperature=[0.07, float("inf")])
        assert score.values["grid"] == found["grid"]
        assert fkd_ssl.knn(net, **SETS, shots=2).interval95 is None  # a mean over draws

    @pytest.mark.parametrize("protocol", ["logreg", "moco"])
    def test_linear(self, net: nn.Module, call: Any, protocol: str) -> None:
        given = {**SETS, "protocol": protocol} | ({"epochs": 1} if protocol == "moco" else {})
        found = json.loads(call(line("linear", model=TEACHER, **given) + " --json").out)
        assert fkd_ssl.linear(net, **given).top1 == fkd_ssl.linear(TEACHER, **given).top1 == found["top1"]

    def test_several_protocols_are_a_dict(self, net: nn.Module) -> None:
        found = fkd_ssl.linear(net, **SETS, protocol=["logreg", "moco"], epochs=1, out="probes")
        assert list(found) == ["moco", "logreg"]
        assert found["logreg"].out == Path("probes/logreg")
        assert found["logreg"].top1 == fkd_ssl.linear(net, **SETS, protocol="logreg").top1

    def test_retrieve(self, net: nn.Module, call: Any) -> None:
        given = {"gallery": "train", "queries": "val", "workers": 0}
        found = json.loads(call(line("retrieve", model=TEACHER, **given) + " --json").out)
        result = fkd_ssl.retrieve(net, **given)
        assert (result.recall[5], result.map_at_r) == (found["recall"]["5"], found["map_at_r"])

    def test_nearest_images(self, net: nn.Module, call: Any) -> None:
        given = {"gallery": "train", "query": "val/ash/0.png", "workers": 0}
        found = json.loads(call(line("retrieve", model=TEACHER, **given, sheet="one.png") + " --json").out)
        result = fkd_ssl.retrieve(net, **given, sheet="two.png")
        assert [item["image"] for item in result.nearest] == [item["image"] for item in found["nearest"]]
        assert result._repr_png_() == Path("two.png").read_bytes()

    def test_features_are_arrays_for_the_scores(self, net: nn.Module, call: Any) -> None:
        entry = Path(
            json.loads(call(line("features", model=TEACHER, images="train", features="cache") + " --json").out)["entry"]
        )
        train, val = (fkd_ssl.features(net, images=name, workers=0) for name in ("train", "val"))
        assert np.array_equal(train.features, np.load(entry / "features.npy"))
        assert train.out is None
        arrays = fkd_ssl.knn(train=(train.features, train.labels), val=(torch.from_numpy(val.features), val.labels), k=5)
        assert arrays.top1 == fkd_ssl.knn(net, **SETS, k=5).top1
        files = call(line("knn", train=f"{entry}/features.npy,{entry}/labels.npy", k=5) + " --leave_one_out --json").out
        assert fkd_ssl.knn(train=(train.features, train.labels), leave_one_out=True, k=5).top1 == json.loads(files)["top1"]

    @pytest.mark.parametrize("images", [str, Path, open_images])
    def test_precompute(self, net: nn.Module, images: Callable[[str], Any]) -> None:
        made = fkd_ssl.precompute(images("train"), store=Path("new"), teacher=net, crops=4, codec="Flat", chunk_size=16)
        assert (made.crops, made.store.column_names) == (18 * 4, ["Network"])
        for part in ("images.txt", "crops/00000.npy"):
            assert Path("new", part).read_bytes() == Path("store", part).read_bytes()
        codes = [
            next(Path(store, "targets", name).glob("codes*.npy")) for store, name in (("new", "Network"), ("store", "make"))
        ]
        assert codes[0].read_bytes() == codes[1].read_bytes()
        assert fkd_ssl.precompute("train", store=made.store, teacher=net, crops=4, codec="Flat", chunk_size=16).crops == 0
        assert fkd_ssl.verify(made, images="train", teacher=net).problems == []
        assert fkd_ssl.show(made, images="train", image="ash/0.png").out == Path("sheet.png")

    def test_a_problem_of_a_store(self, work: Path, call: Any) -> None:
        codes = next(Path("store/targets/make").glob("codes*.npy"))
        codes.write_bytes(codes.read_bytes()[:-1] + b"x")
        result = fkd_ssl.verify("store")
        assert f"{result!r}\n" == call("verify store").out
        assert result.problems

    def test_train_and_export(self, trained: Any, call: Any) -> None:
        assert call(line("train", images="train", store="store", out="again", **TRAIN)).out.startswith("again: 2 steps in ")
        assert losses("again") == losses(trained)
        assert trained.steps == 2
        assert call(line("export", model="again", out="again.safetensors")).status == 0
        exported = fkd_ssl.export(trained, out="one.safetensors")
        assert Path("again.safetensors").read_bytes() == Path(exported).read_bytes()
        student = fkd_ssl.export(trained.student, out="two.safetensors")
        weights = [safetensors.torch.load_file(file) for file in (exported, student)]
        assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
        assert "squeezenet1_1" in exported.load

    def test_an_online_teacher(self, net: nn.Module, call: Any) -> None:
        given = {**TRAIN, "targets": "online"}
        assert call(line("train", images="train", teacher="own_teacher:make", out="named", **given)).status == 0
        fkd_ssl.train("train", teacher=net, out="object", **given)
        assert losses("object") == losses("named")
        with_two = fkd_ssl.train("train", teacher=[net, "own_teacher:other"], out="two", **given)
        assert with_two.student.dims == [16, 16]

    def test_a_student_is_a_model_and_a_teacher(self, trained: Any, call: Any) -> None:
        found = json.loads(call(line("knn", model="run", **SETS) + " --json").out)
        assert fkd_ssl.knn(trained, **SETS).top1 == fkd_ssl.knn(trained.student, **SETS, pixels=32).top1 == found["top1"]
        by_run = fkd_ssl.precompute("train", store="a", teacher="run", checkpoint=trained, crops=2, codec="Flat")
        by_object = fkd_ssl.precompute("train", store="b", teacher=trained.student, crops=2, codec="Flat", pixels=32)
        rows = [made.store.targets(made.store.column_names[0], 0, slice(0, 2)) for made in (by_run, by_object)]
        assert np.array_equal(rows[0], rows[1])


class TestObjects:
    def test_another_object_of_the_same_name_is_noticed(self, net: nn.Module) -> None:
        first = fkd_ssl.knn(net, **SETS, out="score")
        assert fkd_ssl.knn(copy.deepcopy(net), **SETS, out="score").values == first.values
        other = copy.deepcopy(net)
        with torch.no_grad():
            other.mix.weight += 1  # type: ignore[operator, union-attr]
        with pytest.raises(RequestError, match=r"score: model changed since the run began"):
            fkd_ssl.knn(other, **SETS, out="score")
        fkd_ssl.knn(lambda x: x.mean((2, 3)), **SETS, pixels=32, out="function")
        again = fkd_ssl.knn(lambda x: x.mean((2, 3)), **SETS, pixels=32, out="function")
        assert again.out == Path("function")
        with pytest.raises(RequestError, match=r"function: model changed since the run began"):
            fkd_ssl.knn(lambda x: x.amax((2, 3)), **SETS, pixels=32, out="function")
        features, labels = np.eye(6, dtype=np.float32), np.arange(6) % 2
        fkd_ssl.knn(train=(features, labels), leave_one_out=True, k=2, out="arrays")
        with pytest.raises(RequestError, match=r"arrays: train changed since the run began"):
            fkd_ssl.knn(train=(2 * features, labels), leave_one_out=True, k=2, out="arrays")

    def test_another_teacher_or_student_is_noticed(self, net: nn.Module) -> None:
        other = copy.deepcopy(net)
        with torch.no_grad():
            other.mix.weight += 1  # type: ignore[operator, union-attr]
        given = {**TRAIN, "targets": "online"}
        fkd_ssl.train("train", teacher=net, out="online", **given)
        with pytest.raises(RequestError, match=r"online: teacher Network changed since the run began"):
            fkd_ssl.train("train", teacher=other, out="online", **given)
        given = {**TRAIN, "store": "store", "out": "own"}
        fkd_ssl.train("train", **{**given, "student": net})
        with pytest.raises(RequestError, match=r"own: student changed since the run began"):
            fkd_ssl.train("train", **{**given, "student": other})

    def test_the_users_module_stays_as_it_is(self, net: nn.Module) -> None:
        net.train()
        before = {key: value.clone() for key, value in net.state_dict().items()}
        fkd_ssl.knn(net, **SETS)
        fkd_ssl.precompute("train", store="new", teacher=net, crops=2)
        fkd_ssl.train("train", store="store", out="own", **{**TRAIN, "student": net})
        assert net.training
        assert all(parameter.requires_grad for parameter in net.parameters())
        assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())

    def test_a_method_does_not_change_the_users_module(self, net: nn.Module) -> None:
        user = nn.Sequential(net, nn.BatchNorm1d(16)).train()
        before = {key: value.clone() for key, value in user.state_dict().items()}
        score = fkd_ssl.knn(user.forward, **SETS, pixels=32)
        assert score.top1 == fkd_ssl.knn(user, **SETS, pixels=32).top1
        assert user.training
        assert all(torch.equal(before[key], value) for key, value in user.state_dict().items())

    @pytest.mark.parametrize(
        ("function", "said"),
        [
            (lambda x: sys.exit(3), "SystemExit: 3"),
            (lambda x: x.flatten(1)[:, :4].to_sparse(), r"gives \[2, 4\] for .*, expected one tensor"),
        ],
    )
    def test_a_function_that_is_no_teacher(self, work: Path, function: Any, said: str) -> None:
        with pytest.raises(FkdError, match=said):
            fkd_ssl.knn(function, **SETS, pixels=32)

    @pytest.mark.parametrize(
        ("arrays", "said"),
        [
            ((np.eye(4), np.arange(4), np.arange(4)), "expected two arrays .*, got 3"),
            ((np.eye(4) * 1j, np.arange(4) % 2), "features: expected real numbers, got complex128"),
            ((np.eye(4).astype(str), np.arange(4) % 2), "features: expected real numbers, got <U"),
            ((np.eye(4).tolist(), np.arange(4) % 2), "train: found a list within a list; expected an ImageSource, or arrays"),
            ((torch.eye(4).to_sparse(), torch.arange(4) % 2), "expected two arrays"),
        ],
    )
    def test_arrays_that_are_no_features(self, arrays: Any, said: str) -> None:
        with pytest.raises(RequestError, match=said):
            fkd_ssl.knn(train=arrays, leave_one_out=True, k=1)

    def test_bfloat16(self) -> None:
        features, labels = torch.eye(6), torch.arange(6) % 2
        scores = [fkd_ssl.knn(train=(kind, labels), leave_one_out=True, k=1) for kind in (features, features.bfloat16())]
        assert scores[0].top1 == scores[1].top1

    @pytest.mark.parametrize(
        ("names", "said"),
        [(["a.png", "a.png"], "1 names are used by several images"), (["e\u0301.png", "b.png"], "not in Unicode's NFC form")],
    )
    def test_names_of_a_source_are_checked(self, net: nn.Module, names: list[str], said: str) -> None:
        class Source(ImageSource):
            def read(self, index: int) -> bytes:
                return Path("train/ash/0.png").read_bytes()

        with pytest.raises(RequestError, match=said):
            fkd_ssl.precompute(Source("mine", names, [0, 0], ["a"]), store="new", teacher=net, crops=2)
        assert not Path("new").exists()

    def test_files_have_the_name_only(self, net: nn.Module) -> None:
        fkd_ssl.knn(net, **SETS, out="score")
        assert runs.read_config("score")["model"] == "object:Network"
        assert json.loads(Path("score/results.json").read_text())["config"]["model"] == "object:Network"
        named = options.Named("object:Network", net)
        assert type(copy.deepcopy(named)) is str
        assert copy.deepcopy(named) == "object:Network"

    def test_a_student_of_ones_own(self, net: nn.Module) -> None:
        trained = fkd_ssl.train("train", store="store", val="val", out="own", **{**TRAIN, "student": net})
        assert trained.knn_top1 is not None
        assert fkd_ssl.train("train", store="store", val="val", out="own", **{**TRAIN, "student": net}).steps == 2
        student = trained.student
        assert not torch.equal(student.backbone.mix.weight, net.mix.weight)  # type: ignore[union-attr, arg-type]
        assert fkd_ssl.knn(trained, **SETS).top1 == fkd_ssl.knn(student, **SETS, pixels=32).top1
        exported = fkd_ssl.export(trained, out="own.safetensors")
        namespace = {"network": copy.deepcopy(net), "safetensors": safetensors}
        exec(exported.load, namespace)  # noqa: S102
        assert torch.equal(namespace["network"].mix.weight, student.backbone.mix.weight)  # type: ignore[union-attr, arg-type]
        with pytest.raises(CheckpointError, match=r"its network is the Python object Network: give it as backbone="):
            fkd_ssl.knn("own", **SETS)
        loaded, pixels = fkd_ssl.load_student("own/checkpoints/last.ckpt", backbone=net)
        assert pixels == 32
        assert torch.equal(loaded.backbone.mix.weight, student.backbone.mix.weight)  # type: ignore[union-attr, arg-type]

    def test_a_classifier_of_ones_own(self, work: Path, net: nn.Module) -> None:
        given = {**TRAIN, "student": net, "head": "classifier", "objective": "soft_ce", "targets": "labels"}
        trained = fkd_ssl.train("train", val="val", out="own", **given)
        assert 0 <= trained.values["top1"] <= 100
        exported = fkd_ssl.export(trained, out="own.safetensors")
        student, _ = eval(exported.load, {"fkd_ssl": fkd_ssl, "network": net})  # noqa: S307
        images = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
        assert torch.equal(student(images), trained.student(images))


class TestInit:
    @pytest.fixture
    def network(self) -> nn.Module:
        torch.manual_seed(0)
        return torchvision.models.squeezenet1_1()

    @pytest.mark.parametrize("kind", ["pth", "safetensors", "module", "nested"])
    def test_a_state_dict_is_where_training_starts(self, work: Path, network: nn.Module, kind: str) -> None:
        given: Any = {"module": network, "safetensors": "init.safetensors"}.get(kind, Path("init.pth"))
        if kind == "safetensors":
            safetensors.torch.save_file(network.state_dict(), given)
        elif kind != "module":
            saved = network.state_dict()
            wrapped = {f"module.{key}": value for key, value in saved.items()}
            torch.save(saved if kind == "pth" else {"state_dict": wrapped, "epoch": 3}, given)
        trained = fkd_ssl.train("train", store="store", out="run", init=given, **{**TRAIN, "lr": 1e-12})
        found = trained.student.backbone.state_dict()
        expected = network.state_dict()
        assert set(found) < set(expected)  # all but the classifier
        for key, value in found.items():
            torch.testing.assert_close(value, expected[key], rtol=0, atol=1e-8)

    def test_timms_weights(self, work: Path) -> None:
        timm = pytest.importorskip("timm")
        network = timm.create_model("resnet10t", pretrained=False)
        torch.save(network.state_dict(), "init.pth")
        given = {**TRAIN, "student": "timm/resnet10t", "lr": 1e-12}
        trained = fkd_ssl.train("train", store="store", out="run", init="init.pth", **given)
        torch.testing.assert_close(trained.student.backbone.state_dict()["conv1.0.weight"], network.conv1[0].weight.detach())

    def test_other_weights_are_another_run(self, work: Path, network: nn.Module) -> None:
        fkd_ssl.train("train", store="store", out="run", init=network, **TRAIN)
        with pytest.raises(RequestError, match=r"run: init changed since the run began"):
            fkd_ssl.train("train", store="store", out="run", init=torchvision.models.squeezenet1_1(), **TRAIN)

    @pytest.mark.parametrize(
        ("student", "said"),
        [
            (
                "resnet18",
                r"init bad\.pth for the student resnet18: its keys do not fit: \d+ missing \(conv1\.weight, .*unexpected",
            ),
            ("squeezenet1_0", r"init bad\.pth for the student squeezenet1_0: its keys do not fit: .* misshapen"),
        ],
    )
    def test_weights_that_do_not_fit(self, work: Path, call: Any, network: nn.Module, student: str, said: str) -> None:
        torch.save(network.state_dict(), "bad.pth")
        with pytest.raises(CheckpointError, match=said):
            fkd_ssl.train("train", store="store", out="run", init="bad.pth", **{**TRAIN, "student": student})
        assert (
            call(line("train", images="train", store="store", out="run", init="bad.pth", **{**TRAIN, "student": student}))[0]
            == 2
        )
        assert not Path("run").exists()

    @pytest.mark.parametrize(
        ("given", "said"),
        [
            ("none.pth", r"--init none\.pth: not found; give a run folder"),
            ("list.pth", r"init list\.pth for the student squeezenet1_1: holds no weights"),
            ({"a": 1}, r"holds no weights, expected a dict of tensors"),
        ],
    )
    def test_what_is_no_state_dict(self, work: Path, given: Any, said: str) -> None:
        torch.save([1, 2], "list.pth")
        with pytest.raises(FkdError, match=said):
            fkd_ssl.train("train", store="store", out="run", init=given, **TRAIN)


@pytest.mark.parametrize(
    ("function", "given", "said"),
    [
        ("knn", {"trian": "x"}, r"^knn: no option 'trian'; did you mean train\?"),
        ("knn", {"json": True}, r"^knn: no option 'json'"),
        ("train", {"images": "train"}, r"^train: out is needed"),
        ("precompute", {"images": "train"}, r"^precompute: store and teacher are needed"),
        ("knn", {**SETS, "metric": "l2"}, r"^knn: metric 'l2': expected 'cosine' or 'euclidean'"),
        ("knn", {**SETS, "draws": "many"}, r"^knn: draws 'many': expected int"),
        ("knn", {**SETS, "leave_one_out": 1}, r"^knn: leave_one_out 1: expected bool"),
        ("knn", {**SETS, "workers": True}, r"^knn: workers True: expected int"),
        ("knn", {**SETS, "out": nn.ReLU()}, r"^knn: out ReLU\(\): expected str or None"),
        ("knn", {**SETS, "seed": -1, "shots": 1}, r"seed -1: must be between 0 and 2\^63 - 1"),
        ("knn", {**SETS, "model": nn.Identity(), "pixels": 32}, r"teacher object:Identity: gives \[2, 3, 32, 32\] .* expected"),
        ("knn", {**SETS, "model": object()}, r"object:object: expected a torch\.nn\.Module or a function, got object"),
        ("knn", {**SETS, "train": nn.ReLU()}, r"object:ReLU: expected images, as a folder or an ImageSource"),
        ("train", {**GIVEN, "student": lambda x: x}, r"expected a torch\.nn\.Module, got function"),
        ("train", {**GIVEN, "student": nn.Flatten(1, 2)}, r"gives no features \[B, F\]"),
        ("export", {"model": nn.ReLU(), "out": "a.safetensors"}, r"object:ReLU: expected a student from fkd_ssl\.train"),
        (
            "compare",
            {"images": "train", "out": "c", "val": "val", "teacher": nn.ReLU()},
            r"teacher object:ReLU: compare trains in other processes",
        ),
        ("precompute", {**GIVEN_TEACHER, "runner": "ray"}, r"--runner ray: other machines cannot receive Python objects"),
    ],
)
def test_what_is_refused(work: Path, function: str, given: dict[str, Any], said: str) -> None:
    with pytest.raises(FkdError, match=said):
        getattr(fkd_ssl, function)(**given)


def test_only_one_argument_goes_without_a_name(work: Path) -> None:
    with pytest.raises(RequestError, match=r"^knn: takes one positional argument, model; pass the other options by name"):
        fkd_ssl.knn("run", "train")
    with pytest.raises(RequestError, match=r"^knn: takes one positional argument, model; pass the other options by name"):
        fkd_ssl.knn("run", model="run")


@pytest.mark.parametrize("verb", api.__all__)
def test_help_teaches(verb: str) -> None:
    """The signature and the docstring have every option of the command line but --json."""
    function = getattr(fkd_ssl, verb)
    fields = {field.name for field in dataclasses.fields(cli.command_of(verb).Config)} - {"json"}
    signature = inspect.signature(function)
    assert set(signature.parameters) == fields
    assert all(f"\n    {name}: " in function.__doc__ for name in fields)
    assert function.__name__ == verb
    assert "--" not in function.__doc__.split("Args:")[0].replace("--nproc", "")
    assert dataclasses.is_dataclass(inspect.signature(function).return_annotation) or verb in ("linear", "retrieve")


def test_results_are_frozen_and_print_what_the_command_line_prints(net: nn.Module, trained: Any, call: Any) -> None:
    score = fkd_ssl.knn(net, **SETS, out="score")
    said = f"{score!r}"
    assert said.startswith("object:Network: kNN-20 at 32 px: top-1 ")
    assert "note: k 20 was reduced to 18" in said
    assert said.endswith("written to score")
    assert score.line == json.loads(Path("score/results.json").read_text())["line"]
    with pytest.raises(dataclasses.FrozenInstanceError):
        score.top1 = 100.0  # type: ignore[misc]
    assert f"{trained!r}\n" == call(line("train", images="train", store="store", out="run", **TRAIN)).out
    assert f"{fkd_ssl.open_store('store')!r}".startswith("Store store: 18 images x 4 crops, 1")
    assert f"{fkd_ssl.open_store('store')!r}".endswith(" kB; columns: make")
    with pytest.raises(TypeError, match=r"a Score without files: pass out= to the function that made it"):
        Path(fkd_ssl.knn(net, **SETS))


def test_a_call_prints_nothing(work: Path, capfd: Any, monkeypatch: Any, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("TQDM_DISABLE", "1")
    with caplog.at_level(logging.INFO, logger="fkd_ssl"):
        fkd_ssl.train("train", store="store", out="run", **TRAIN)
        fkd_ssl.precompute("train", store="new", teacher="own_teacher:make", crops=2)
    said = capfd.readouterr()
    assert (said.out, said.err) == ("", "")
    assert any(record.message.startswith("training squeezenet1_1 on 18 images") for record in caplog.records)
    assert {record.name for record in caplog.records if "squeezenet1_1" in record.message} == {"fkd_ssl"}
