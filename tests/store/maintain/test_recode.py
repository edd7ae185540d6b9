"""A column in another codec, without the teacher."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from fkd_ssl import files, images
from fkd_ssl.crops import replay
from fkd_ssl.errors import RequestError, StoreError
from fkd_ssl.store import manifest, open_store
from fkd_ssl.store.column import cosine_to_teacher
from fkd_ssl.store.maintain import recode as recodes
from fkd_ssl.store.maintain.recode import recode
from fkd_ssl.store.maintain.subset import subset
from fkd_ssl.store.maintain.verify import verify
from fkd_ssl.teachers import Ensemble, Teacher
from tests.store import made


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(manifest, "ROWS_PER_SHARD", 5)


@pytest.fixture
def source(tmp_path, make_store, tiny_teacher):
    tiny_teacher.info = replace(
        tiny_teacher.info, arrays={"prototypes": np.random.default_rng(0).normal(size=(30, 16)).astype(np.float32)}
    )
    return make_store(tmp_path / "source", crops=12, teacher=tiny_teacher)


def decoded(store, name):
    return np.stack([store.targets(name, row, slice(None)) for row in range(24)])


def said_now(store, root, teacher):
    """Returns the teacher's targets of every crop: [24, C, 16]."""
    views = [replay(images.read_image(root / path), store.crops(r, slice(None)), 32) for r, path in enumerate(store.paths)]
    return np.stack([teacher.embed(torch.from_numpy(v)).numpy() for v in views])


@pytest.mark.parametrize("codec", ["SQ4", "SQfp16", "Flat", "PCA8,SQ8"])
def test_codes_are_the_new_codecs_of_the_decoded_targets(tmp_path, source, tree, image_folder, new_teacher, codec):
    before = tree(source.folder)
    column = recode(source, codec)
    assert column.name == f"tiny-{codec.replace(',', '-')}"
    after = tree(source.folder)
    assert {name: after[name] for name in before} == before
    assert all(name.startswith(f"targets/{column.name}/") for name in set(after) - set(before))
    old = decoded(source, "tiny")
    encoded = column.codec.encode(old.reshape(-1, 16)).reshape(24, 12, -1)
    np.testing.assert_array_equal(np.stack([column.codes(row, slice(None)) for row in range(24)]), encoded)
    np.testing.assert_array_equal(column.array("teacher-prototypes"), source.column("tiny").array("teacher-prototypes"))
    assert (column.meta.codec, column.meta.teacher) == (codec, source.column("tiny").meta.teacher)
    found = decoded(column.store, column.name)
    cosines = (found * said_now(source, image_folder, new_teacher())).sum(axis=2) / np.linalg.norm(found, axis=2)
    f = column.meta.fidelity
    to_source = (found * old).sum(axis=2) / np.linalg.norm(found, axis=2) / np.linalg.norm(old, axis=2)
    allowed = 2e-3 + abs(1 - float(to_source.mean()))  # the recorded value was measured on a ninth of them
    assert f["cosine_mean"] == pytest.approx(float(to_source.mean()), abs=allowed)
    assert (f["source_codec"], f["source_cosine_mean"]) == ("SQ8", source.column("tiny").meta.fidelity["cosine_mean"])
    assert cosine_to_teacher(column.meta, "cosine_mean") == pytest.approx(float(cosines.mean()), abs=allowed)
    report = verify(column.store, images.scan(image_folder), new_teacher(), column=column.name)
    assert report.problems == []


def test_from_lossless_targets_it_is_what_precompute_writes(tmp_path, make_store):
    """Except for the last bits of targets, since the codec's sample was computed in other chunks than the shards."""
    lossless = make_store(tmp_path / "flat", crops=12, codec="Flat")
    column = recode(lossless, "SQ8")
    direct = make_store(tmp_path / "direct", crops=12).column()
    assert column.meta.fidelity["cosine_mean"] == pytest.approx(direct.meta.fidelity["cosine_mean"], abs=1e-5)
    ours, theirs = (np.stack([c.codes(row, slice(None)) for row in range(24)]).astype(int) for c in (column, direct))
    assert np.abs(ours - theirs).max() <= 1
    assert (ours == theirs).mean() > 0.999


def test_what_was_lost_twice_is_no_reason_to_doubt_the_teacher(source, image_folder, new_teacher):
    """SQ4 of SQ4 of SQ8, and Flat of that: verify allows the total loss of all of them, and still detects another teacher."""
    recode(source, "SQ4", column="tiny", to="a")
    recode(source, "SQ4", column="a", to="b")
    column = recode(source, "Flat", column="b", to="c")
    f = column.meta.fidelity
    assert (f["cosine_mean"], f["source_cosine_mean"]) == (
        pytest.approx(1, abs=1e-6),
        pytest.approx(sum(source.column(name).meta.fidelity["cosine_mean"] for name in ("tiny", "a", "b")) - 2, abs=1e-9),
    )
    assert verify(column.store, images.scan(image_folder), new_teacher(), column="c").problems == []
    assert verify(column.store, images.scan(image_folder), new_teacher(1), column="c").problems


def test_into_a_store_of_its_own(tmp_path, source, tree, image_folder, new_teacher):
    before = tree(source.folder)
    column = recode(source, "SQ4", out=tmp_path / "small")
    assert tree(source.folder) == before
    small = open_store(tmp_path / "small")
    assert small.column_names == ["tiny"]
    assert column.meta.codec == small.column().meta.codec == "SQ4"
    assert {name: data for name, data in tree(tmp_path / "small").items() if not name.startswith("targets")} == {
        name: data for name, data in before.items() if not name.startswith("targets")
    }
    report = verify(small, images.scan(image_folder), new_teacher())
    assert (report.problems, report.checked["crops"]) == ([], 24)
    assert recode(source, "SQ4", out=tmp_path / "small").digest == column.digest


class PulledError(Exception):
    pass


@pytest.mark.parametrize("calls", [1, 2, 4, 6])
@pytest.mark.parametrize("out", [None, "small"])
def test_a_killed_one_appears_not_at_all_and_goes_on(tmp_path, source, make_store, tree, monkeypatch, calls, out):
    place = {} if out is None else {"out": tmp_path / out}
    expected = recode(source, "SQ4", column="tiny", to="whole", **({} if out is None else {"out": tmp_path / "other"}))
    real, done = recodes.files.write_json, []

    def write_json(path, value):
        done.append(path)
        if len(done) == calls:
            raise PulledError
        real(path, value)

    with monkeypatch.context() as patch:
        patch.setattr(recodes.files, "write_json", write_json)
        with pytest.raises(PulledError):
            recode(source, "SQ4", column="tiny", to="new", **place)
    assert open_store(source.folder).column_names == (["tiny", "whole"] if out is None else ["tiny"])
    assert not (tmp_path / "small").exists()
    column = recode(source, "SQ4", column="tiny", to="new", **place)
    assert tree(column.folder) == tree(expected.folder)
    assert verify(open_store(source.folder)).problems == []


@pytest.fixture
def killed_behind_meta(monkeypatch):
    """killed_behind_meta(store, codec, ...) recodes and is stopped before the first sidecar."""
    real = recodes.files.write_json

    def write_json(path, value):
        if path.name.startswith("codes"):
            raise PulledError
        real(path, value)

    def begin(*arguments, **options):
        with monkeypatch.context() as patch:
            patch.setattr(recodes.files, "write_json", write_json)
            with pytest.raises(PulledError):
                recode(*arguments, **options)

    return begin


def test_another_codec_that_was_begun_is_refused(source, killed_behind_meta):
    killed_behind_meta(source, "SQ4", to="new")
    with pytest.raises(RequestError, match="holds an unfinished recoding of tiny to SQ4, not of tiny to SQ6; delete that"):
        recode(source, "SQ6", to="new")


@pytest.mark.parametrize("other", [{"teacher": 5}, {"codec": "Flat"}, {"chunk_size": 8}, {"arrays": 1}])
@pytest.mark.parametrize("out", [None, "small"])
def test_another_column_that_was_begun_is_refused(tmp_path, source, make_store, new_teacher, killed_behind_meta, other, out):
    """Two teachers' codes in one column could not be detected: each shard's sidecar would be correct."""
    teacher = new_teacher(other.get("teacher", 0), "tiny")
    teacher.info = replace(
        teacher.info,
        arrays={"prototypes": np.random.default_rng(other.get("arrays", 0)).normal(size=(30, 16)).astype(np.float32)},
    )
    options = {key: value for key, value in other.items() if key in ("codec", "chunk_size")}
    store = make_store(source.folder, crops=12, teacher=teacher, column="other", **options)
    place = {"to": "new"} | ({} if out is None else {"out": tmp_path / out})
    killed_behind_meta(store, "SQ4", column="tiny", **place)
    with pytest.raises(
        RequestError, match=r"new: holds an unfinished recoding of tiny to SQ4, not of other to SQ4; delete that folder"
    ):
        recode(store, "SQ4", column="other", **place)
    recode(store, "SQ4", column="tiny", **place)
    with pytest.raises(RequestError, match=r"its column '.*' is not other in SQ4"):
        recode(store, "SQ4", column="other", **place)


def test_the_same_column_of_other_crops_is_not_taken_for_it(tmp_path, source):
    recode(subset(source, tmp_path / "part", crops=11), "SQ4", out=tmp_path / "small")
    with pytest.raises(RequestError, match=r"small: its column '.*' is not tiny in SQ4"):
        recode(source, "SQ4", out=tmp_path / "small")


def test_what_is_there_is_left(source, tree):
    recode(source, "SQ4")
    before = tree(source.folder)
    assert recode(source, "SQ4", column="tiny").name == "tiny-SQ4"
    for options in ({"codec": "SQ6", "to": "tiny-SQ4"}, {"codec": "SQ8", "to": "tiny"}):
        with pytest.raises(RequestError, match=r"its column '.*' is not tiny in SQ.; choose another --to or --out"):
            recode(source, column="tiny", **options)
    with pytest.raises(RequestError, match=r"use only letters, digits, '\.', '_' and '-'"):
        recode(source, "SQ6", column="tiny", to="a/b")
    with pytest.raises(RequestError, match="codec 'SQ5': not supported"):
        recode(source, "SQ5", column="tiny")
    assert tree(source.folder) == before


def test_a_codec_that_needs_more_targets_is_refused_and_nothing_is_left(tmp_path, source, tree):
    before = tree(tmp_path)
    for place in ({}, {"out": tmp_path / "small"}):
        with pytest.raises(RequestError, match=r"codec PQ4x8 needs at least 9984 targets for its training; there are 256 "):
            recode(source, "PQ4x8", **place)
    assert tree(tmp_path) == before
    assert not list(tmp_path.rglob(".unfinished-*"))


def test_a_codec_that_leaves_nothing_is_refused(tmp_path, make_store, tree):
    """SQ4 of a single target: its range has no width."""
    store = make_store(tmp_path / "one", crops=1, limit=1, codec="Flat")
    before = tree(tmp_path)
    with pytest.raises(
        RequestError, match=r"codec SQ4 loses too much: after training on 1 target, the mean cosine of .*\(SQ8, SQfp16, Flat\)"
    ):
        recode(store, "SQ4")
    assert tree(tmp_path) == before
    assert not list(tmp_path.rglob(".unfinished-*"))
    with pytest.raises(RequestError, match=r"codec SQ4 loses too much.* choose a larger codec"):
        make_store(tmp_path / "other", crops=1, limit=1, codec="SQ4")


def test_a_damaged_or_unfinished_source_is_refused(source, tree):
    path = source.folder / "targets/tiny/codes-00002.npy"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(StoreError, match=r"codes-00002\.npy: damaged"):
        recode(source, "SQ4")
    path.with_suffix(".json").unlink()
    with pytest.raises(StoreError, match="1 of 5 shards missing"):
        recode(open_store(source.folder), "SQ4")
    assert open_store(source.folder).column_names == ["tiny"]


@pytest.mark.parametrize("spec", ["full", "marginal_renorm_k3"])
def test_codes_of_a_skipped_image_are_not_decoded(tmp_path, spec):
    """A recording training leaves them zero, which is not a valid code of class probabilities."""
    made.make(tmp_path / "store", (spec,))
    store = open_store(tmp_path / "store")
    shard, within = store.locate(made.SKIPPED)
    path = manifest.codes_file(store.folder, spec, shard)
    codes = np.load(path)
    codes[within] = 0
    values = files.read_json(path.with_suffix(".json"))
    for old in (path, path.with_suffix(".json")):
        old.unlink()
    files.write_json(path.with_suffix(".json"), {**values, "file": files.write_npy(path, codes)})
    column = recode(open_store(store.folder), "hard")
    rows = [row for row in range(len(made.PATHS)) if row != made.SKIPPED]
    for row in rows:
        exact = store.targets(spec, row, slice(None)).argmax(axis=1)
        assert (column.store.targets(column.name, row, slice(None)).argmax(axis=1) == exact).all()


class TestMean:
    """The mean of several teachers' class probabilities, from existing columns."""

    K = 7

    @pytest.fixture
    def two(self, tmp_path, make_store, image_folder):
        for name, seed in (("a", 0), ("b", 1)):
            make_store(tmp_path / "two", crops=4, teacher=self.classifier(name, seed), codec="full", column=name)
        return open_store(tmp_path / "two")

    def classifier(self, name, seed, classes=K):
        torch.manual_seed(seed)
        layers = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(2), torch.nn.Flatten(), torch.nn.Linear(12, classes))
        return Teacher(
            layers,
            torch.nn.Identity(),
            name=name,
            shape=(classes,),
            network=f"net {name}",
            pixels=32,
            kind="distribution",
            licence=f"licence {name}",
            source=f"source {name}",
        )

    @pytest.mark.parametrize("codec", ["full", "marginal_smoothing_k3", "hard"])
    def test_it_is_what_an_ensemble_would_have_stored(self, two, codec, tmp_path, make_store, image_folder):
        column = recode(two, codec, column=["a", "b"])
        assert column.name == f"a-and-b-{codec}"
        ensemble = Ensemble([self.classifier("a", 0), self.classifier("b", 1)])
        direct = make_store(tmp_path / "direct", crops=4, teacher=ensemble, codec=codec)
        ours, theirs = decoded(column.store, column.name), decoded(direct, "a-and-b")
        np.testing.assert_allclose(ours, theirs, atol=1e-3)  # two roundings to float16
        exact = said_now(two, image_folder, ensemble)
        distances = np.abs(ours - exact).sum(axis=2) / 2
        f = column.meta.fidelity
        assert distances.mean() <= f["total_variation_mean"] * 1.2  # measured on a part of them
        assert f["source_codec"] == "full + full"
        assert column.meta.teacher.network == direct.column().meta.teacher.network == "mean probabilities of: net a; net b"
        assert column.meta.teacher.licence == "licence a; licence b"
        assert verify(column.store, images.scan(image_folder), ensemble, column=column.name).problems == []

    def test_a_second_call_finds_it_and_another_order_is_another_mean(self, two, tree):
        recode(two, "full", column=["a", "b"], to="mean")
        before = tree(two.folder)
        recode(two, "full", column=["a", "b"], to="mean")
        assert tree(two.folder) == before
        with pytest.raises(RequestError, match="its column 'mean' is not b-and-a in full"):
            recode(two, "full", column=["b", "a"], to="mean")
        with pytest.raises(RequestError, match="its column 'mean' is not a in full"):
            recode(two, "full", column="a", to="mean")

    def test_into_a_store_of_its_own(self, two, tmp_path):
        column = recode(two, "full", column=["a", "b"], out=tmp_path / "mean")
        assert column.store.column_names == ["a-and-b"]
        expected = (decoded(two, "a") + decoded(two, "b")) / 2
        np.testing.assert_allclose(decoded(column.store, "a-and-b"), expected, atol=5e-4)

    def test_what_has_no_mean_is_refused(self, two, tmp_path, make_store, tiny_teacher, tree):
        folder = tmp_path / "two"
        make_store(folder, crops=4, teacher=self.classifier("c", 2, classes=9), codec="full", column="c")
        make_store(folder, crops=4, teacher=tiny_teacher, codec="Flat", column="d")
        before = tree(folder)
        store = open_store(folder)
        for names, message in (
            (["a", "c"], "column a,c: c has class probabilities, D = 9; a mean is taken of class probabilities of the"),
            (["a", "d"], "column a,d: d has embeddings, D = 16; a mean is taken of class probabilities"),
            (["d", "a"], "column d,a: d has embeddings, D = 16; a mean is taken of class probabilities"),
            (["a", "a"], "column a,a: a column is named twice"),
            ([], r"column \[\]: expected the name of a column"),
        ):
            with pytest.raises(RequestError, match=message):
                recode(store, "full", column=names, to="mean")
        assert tree(folder) == before
