import json
import stat

import numpy as np
import pytest

from fkd_ssl import files
from fkd_ssl.errors import RequestError, StoreError
from fkd_ssl.eval import indexes


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "own"))


def vectors(n: int, seed: int = 0):
    generator = np.random.default_rng(seed)
    return (generator.normal(size=(20, 32))[generator.integers(0, 20, n)] + 0.4 * generator.normal(size=(n, 32))).astype("f4")


def test_the_curve_is_what_a_sort_of_all_products_says() -> None:
    gallery, queries = vectors(600), vectors(30, seed=1)
    rows = indexes.curve(gallery, queries, seconds=0)
    assert {row["index"] for row in rows} == set(indexes.KINDS)
    built = {kind: indexes.build(gallery, kind) for kind in indexes.KINDS}
    for row in rows:
        _, found = built[row["index"]].search(queries, 10, row["effort"])
        order = np.argsort(-indexes.normalised(queries).astype("f8") @ indexes.normalised(gallery).astype("f8").T, axis=1)
        expected = np.mean([len(set(a) & set(b[:10])) / 10 for a, b in zip(found.tolist(), order.tolist(), strict=True)])
        assert row["recall"] == pytest.approx(100 * expected, abs=0.5)
        assert row["queries_per_second"] > 0
    most = {kind: max(row["recall"] for row in rows if row["index"] == kind) for kind in indexes.KINDS}
    assert most["exact"] == 100
    assert most["hnsw"] > 99
    assert most["ivfflat"] == 100  # all lists are looked into
    assert 30 < most["ivfpq"] < 100
    size = {row["index"]: row["bytes_per_vector"] for row in rows}
    assert size["exact"] == 128
    assert size["hnsw"] > size["ivfflat"] > 128 > size["ivfpq"]


@pytest.mark.parametrize("kind", indexes.KINDS)
def test_what_is_saved_is_found_again(tmp_path, kind: str) -> None:
    gallery, queries, folder = vectors(300), vectors(5, seed=1), tmp_path / "index"
    index = indexes.build(gallery, kind)
    names = [f"{row} a.png" for row in range(300)]
    indexes.save(index, folder, labels=np.arange(300), images=names, about={"note": "mine"})
    loaded, labels, images, about = indexes.load(folder)
    assert (labels.tolist(), images, about["note"]) == (list(range(300)), names, "mine")
    assert about["ours"]
    for one, other in zip(index.search(queries, 5), loaded.search(queries, 5), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5)
    with pytest.raises(RequestError, match="index: exists; choose another folder"):
        indexes.save(index, folder, labels=np.arange(300), images=names, about={})


def test_a_strangers_index_is_built_again_and_never_read(tmp_path, monkeypatch) -> None:
    import faiss

    folder = tmp_path / "index"
    gallery = vectors(300)
    indexes.save(indexes.build(gallery, "hnsw"), folder, labels=np.arange(300), images=["x"] * 300, about={})
    key = tmp_path / "own/fkd_ssl/index.key"
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    read = []
    real = faiss.deserialize_index
    monkeypatch.setattr(faiss, "deserialize_index", lambda data: read.append(1) or real(data))
    indexes.load(folder)
    assert read == [1]
    for change in ("another user", "another byte", "no file"):
        if change == "another user":
            monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "others"))
        elif change == "another byte":
            monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "own"))
            with (folder / "index.faiss").open("r+b") as file:
                file.write(b"evil")
        else:
            (folder / "index.faiss").unlink()
        loaded, _, _, about = indexes.load(folder)
        assert not about["ours"]
        assert loaded.search(gallery[:9], 1)[1].ravel().tolist() == list(range(9))
    assert read == [1]


def test_damage_is_named(tmp_path) -> None:
    folder = tmp_path / "index"
    with pytest.raises(RequestError, match="no saved index"):
        indexes.load(folder)
    indexes.save(indexes.build(vectors(30), "exact"), folder, labels=np.arange(30), images=["x"] * 30, about={})
    (folder / "images.txt").write_text("/etc/passwd\n" * 30)
    assert not indexes.load(folder)[3]["ours"]
    (folder / "images.txt").write_text("one\n")
    with pytest.raises(RequestError, match=r"images.txt: 1 names for 30 vectors"):
        indexes.load(folder)
    about = json.loads((folder / "index.json").read_text())
    (folder / "index.json").unlink()
    files.write_json(folder / "index.json", {**{k: v for k, v in about.items() if k != "sha256"}, "kind": "lsh"})
    with pytest.raises(RequestError, match=r"describes no index that is known here .kind 'lsh'"):
        indexes.load(folder)
    (folder / "index.json").write_text(json.dumps({**about, "n": 3}))
    with pytest.raises(StoreError, match=r"index.json: altered"):
        indexes.load(folder)


def test_galleries_that_are_too_small() -> None:
    assert indexes.build(vectors(40), "ivfpq").search(vectors(2), 3)[1].shape == (2, 3)
    with pytest.raises(RequestError, match="index ivfpq: 7 images in the gallery; product quantisation needs at least 16"):
        indexes.build(vectors(7), "ivfpq")
    with pytest.raises(RequestError, match="index 'lsh': expected exact, hnsw, ivfflat, ivfpq"):
        indexes.build(vectors(7), "lsh")
