"""Several teachers at once, and several processes with shares of the shards: the same bytes as one after another."""

import threading

import numpy as np
import pytest

from fkd_ssl import images
from fkd_ssl.crops import RECIPES
from fkd_ssl.errors import ImageAccessError, ImageError, RequestError
from fkd_ssl.store import manifest, open_store
from fkd_ssl.store.maintain.verify import verify
from fkd_ssl.store.write import rows, work
from fkd_ssl.store.write.creation import create_store
from fkd_ssl.store.write.precompute import Share, precompute


def make(folder, image_folder, teachers, **options):
    asked = {"crops": 6, "recipe": RECIPES["mocov2"], "pixels": 32, "chunk_size": 7, **options}
    return precompute(images.scan(image_folder), folder, teachers, **asked)


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(manifest, "ROWS_PER_SHARD", 5)


@pytest.fixture
def pair(new_teacher):
    return [new_teacher(0, "a"), new_teacher(1, "b")]


@pytest.fixture
def counted(monkeypatch):
    """How often images were decoded and crops replayed."""
    counts = {"decodes": 0, "crops": 0}
    lock, decode, replay = threading.Lock(), rows.decode, rows.replay_into

    def counting_decode(data, path):
        with lock:
            counts["decodes"] += 1
        return decode(data, path)

    def counting_replay(views, image, records):
        with lock:
            counts["crops"] += len(records)
        replay(views, image, records)

    monkeypatch.setattr(rows, "decode", counting_decode)
    monkeypatch.setattr(rows, "replay_into", counting_replay)
    return counts


@pytest.fixture
def one_by_one(tmp_path, image_folder, new_teacher, tree):
    """A store of two columns, one teacher at a time."""
    make(tmp_path / "single", image_folder, new_teacher(0, "a"))
    make(tmp_path / "single", image_folder, new_teacher(1, "b"), pixels=40)
    return tree(tmp_path / "single")


@pytest.mark.parametrize(("sides", "replays"), [((32, 32), 1), ((32, 40), 2)])
def test_two_teachers_at_once_decode_once(tmp_path, image_folder, pair, new_teacher, tree, counted, sides, replays):
    summary = make(tmp_path / "both", image_folder, pair, pixels=list(sides))
    assert counted["decodes"] == 2 * 24  # the codec's sample, which is all of it here, and the shards
    assert counted["crops"] == 2 * 24 * 6 * replays
    assert summary.crops == 2 * 24 * 6
    for teacher, pixels in zip((new_teacher(0, "a"), new_teacher(1, "b")), sides, strict=True):
        make(tmp_path / "single", image_folder, teacher, pixels=pixels)
    assert tree(tmp_path / "both") == tree(tmp_path / "single")
    assert verify(open_store(tmp_path / "both")).problems == []


def test_crops_made_on_a_device_give_the_same_store(tmp_path, pictures, pair, tree, counted):
    sides = (32, 40)
    (pictures / "ash" / "2.png").write_bytes(b"no picture")  # a skipped one too
    make(tmp_path / "usual", pictures, pair, pixels=list(sides), skip_unreadable=True)
    counted["crops"] = 0
    make(tmp_path / "device", pictures, pair, pixels=list(sides), skip_unreadable=True, device="cpu")
    assert counted["crops"] == 0
    assert tree(tmp_path / "device") == tree(tmp_path / "usual")


def test_names_are_given_one_each(tmp_path, image_folder, pair):
    make(tmp_path / "store", image_folder, pair, column=["x", "y"])
    assert open_store(tmp_path / "store").column_names == ["x", "y"]


@pytest.mark.parametrize(("names", "pixels"), [(["x"], 32), (["x", "x"], 32), (["x", "y"], [32]), ("x", 32)])
def test_names_and_sizes_that_do_not_go_with_the_teachers_are_refused(tmp_path, image_folder, pair, names, pixels):
    with pytest.raises(RequestError, match=r"2 teachers, columns .*: each teacher needs one size and one name of a column"):
        make(tmp_path / "store", image_folder, pair, column=names, pixels=pixels)
    assert not (tmp_path / "store").exists()


class PulledError(Exception):
    pass


@pytest.mark.parametrize("calls", [1, 10, 22, 24, 26, 33, 44])
def test_stopped_and_resumed_with_one_column_ahead(
    tmp_path, image_folder, one_by_one, new_teacher, tree, counted, monkeypatch, calls
):
    """A run with one teacher is stopped; then both teachers continue, each from its own position, and see no crop twice."""
    first = new_teacher(0, "a")
    real = first.embed

    def embed(views):
        if first.calls == calls - 1:
            raise PulledError
        return real(views)

    first.embed = embed
    with pytest.raises(PulledError):
        make(tmp_path / "store", image_folder, first)
    pair = [new_teacher(0, "a"), new_teacher(1, "b")]
    make(tmp_path / "store", image_folder, pair, pixels=[32, 40])
    assert tree(tmp_path / "store") == one_by_one
    assert first.calls + pair[0].calls == 21 + 24
    assert pair[1].calls == 21 + 24


def test_stopped_together_each_goes_on_from_where_it_is(tmp_path, image_folder, one_by_one, new_teacher, tree):
    seen = {"a": 0, "b": 0}
    for stop in (5, 30, 50, 63, 80, 10**6):
        pair = [new_teacher(0, "a"), new_teacher(1, "b")]
        left = [stop - sum(seen.values())]
        for teacher in pair:

            def embed(views, teacher=teacher, real=teacher.embed, left=left):
                if left[0] == 0:
                    raise PulledError
                left[0] -= 1
                seen[teacher.info.name] += 1
                return real(views)

            teacher.embed = embed
        try:
            make(tmp_path / "store", image_folder, pair, pixels=[32, 40])
        except PulledError:
            continue
    assert tree(tmp_path / "store") == one_by_one
    assert seen == {"a": 45, "b": 45}


def test_what_is_done_is_not_decoded_again(tmp_path, image_folder, new_teacher, counted):
    """30 crops a shard in chunks of 7: stopped after three of them, rows 0 to 2 are done and row 3 is read again."""
    first = new_teacher()
    real = first.embed

    def embed(views):
        if first.calls == 21 + 5 + 3:
            raise PulledError
        return real(views)

    first.embed = embed
    with pytest.raises(PulledError):
        make(tmp_path / "store", image_folder, first)
    counted.update(decodes=0, crops=0)
    second = new_teacher()
    make(tmp_path / "store", image_folder, second)
    assert first.calls + second.calls == 21 + 24
    assert counted["decodes"] == 24 - 5 - 3
    assert counted["crops"] == (24 - 5) * 6 - 21


def test_a_column_that_another_process_writes_is_left_to_it(tmp_path, image_folder, pair, tree):
    make(tmp_path / "store", image_folder, pair)
    whole = tree(tmp_path / "store")
    for name in "ab":
        for path in (tmp_path / "store" / "targets" / name).glob("codes-00001.*"):
            path.unlink()
    column = open_store(tmp_path / "store").column("a")
    with work.open_work(work.shard_file(manifest.codes_file(tmp_path / "store", "a", 1)), column.digest, unit=16, crops=1):
        summary = make(tmp_path / "store", image_folder, pair)
        assert (summary.busy, summary.crops) == ([1], 30)
    assert make(tmp_path / "store", image_folder, pair).busy == []
    assert tree(tmp_path / "store") == whole


def test_lost_crops_are_drawn_again_without_the_teacher(tmp_path, image_folder, tiny_teacher, tree):
    make(tmp_path / "store", image_folder, tiny_teacher)
    whole, calls = tree(tmp_path / "store"), tiny_teacher.calls
    for path in (tmp_path / "store" / "crops").glob("00002.*"):
        path.unlink()
    make(tmp_path / "store", image_folder, tiny_teacher)
    assert tiny_teacher.calls == calls
    assert tree(tmp_path / "store") == whole


def test_what_a_killed_process_could_not_remove_is_removed(tmp_path, image_folder, tiny_teacher, tree):
    make(tmp_path / "store", image_folder, tiny_teacher)
    whole = tree(tmp_path / "store")
    for name in (".work-tiny-sample", "tiny/.work-codes-00003"):
        for suffix in ("", ".json"):
            (tmp_path / "store" / "targets" / f"{name}{suffix}").write_bytes(b"half")
    make(tmp_path / "store", image_folder, tiny_teacher)
    assert tree(tmp_path / "store") == whole


# shares


def test_shares_in_any_order_and_then_others_make_the_same_store(tmp_path, image_folder, new_teacher, tree):
    make(tmp_path / "whole", image_folder, new_teacher())
    summary = make(tmp_path / "store", image_folder, new_teacher(), share=Share(index=2, of=3))
    assert (summary.crops, summary.busy, summary.left) == (30, [], [0, 1, 3, 4])  # shard 2 of 5
    assert open_store(tmp_path / "store").column().missing_shards == [0, 1, 3, 4]
    assert make(tmp_path / "store", image_folder, new_teacher(), share=Share(index=0, of=2)).left == [1, 3]
    assert make(tmp_path / "store", image_folder, new_teacher(), share=Share(index=1, of=2)).left == []
    assert tree(tmp_path / "store") == tree(tmp_path / "whole")


def test_one_that_helps_does_its_own_first_and_then_the_rest(tmp_path, image_folder, new_teacher, monkeypatch):
    order = []
    real = work.shard_file

    def noting(path):
        order.append(int(path.stem[-5:]))
        return real(path)

    monkeypatch.setattr(work, "shard_file", noting)
    summary = make(tmp_path / "store", image_folder, new_teacher(), share=Share(index=1, of=2, steal=True))
    assert order == [1, 3, 0, 2, 4]
    assert (summary.left, summary.busy) == ([], [])


@pytest.mark.parametrize(("index", "of"), [(-1, 2), (2, 2), (0, 0)])
def test_impossible_shares_are_refused(index, of):
    with pytest.raises(RequestError, match=rf"--shards {index}/{of}: expected i/n with i from 0 to n - 1"):
        Share(index=index, of=of)


# images that are gone


def test_a_folder_that_vanishes_is_no_reason_to_skip(tmp_path, pictures, new_teacher, tree, image_folder):
    """Otherwise the images of an unmounted folder would be recorded as unreadable."""
    teacher = new_teacher()
    real = teacher.embed

    def embed(views):
        if teacher.calls == 25 and pictures.exists():
            pictures.rename(pictures.with_name("away"))
        return real(views)

    teacher.embed = embed
    with pytest.raises(ImageAccessError, match=r"No such file or directory; restore the file, its permissions or its disk"):
        make(tmp_path / "store", pictures, teacher, skip_unreadable=True)
    pictures.with_name("away").rename(pictures)
    make(tmp_path / "store", pictures, new_teacher(), skip_unreadable=True)
    make(tmp_path / "whole", image_folder, new_teacher())
    assert tree(tmp_path / "store") == tree(tmp_path / "whole")
    assert len(open_store(tmp_path / "store")) == 24


def test_a_picture_that_shrinks_is_no_reason_to_skip(tmp_path, pictures, new_teacher):
    create_store(tmp_path / "store", images.scan(pictures), seed=0, recipe=RECIPES["mocov2"], crops=6, skip_unreadable=True)
    path = pictures / "ash" / "001.jpg"
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(ImageError, match=r"ash/001\.jpg: changed since the store was made"):
        make(tmp_path / "store", pictures, new_teacher(), skip_unreadable=True)


def test_a_sample_with_unreadable_pictures_resumes_too(tmp_path, pictures, new_teacher, tree):
    for name in ("ash/001.jpg", "birch/004.jpg", "cedar/000.jpg"):
        (pictures / name).write_bytes((pictures / name).read_bytes()[:700])
    make(tmp_path / "whole", pictures, new_teacher(), skip_unreadable=True)
    expected = new_teacher()
    for calls in (3, 7, 12, 17):
        teacher = new_teacher()
        real = teacher.embed

        def embed(views, teacher=teacher, real=real, calls=calls):
            if teacher.calls + expected.calls == calls:
                raise PulledError
            return real(views)

        teacher.embed = embed
        with pytest.raises(PulledError):
            make(tmp_path / "store", pictures, teacher, skip_unreadable=True)
        expected.calls += teacher.calls
    last = new_teacher()
    make(tmp_path / "store", pictures, last, skip_unreadable=True)
    assert expected.calls + last.calls == 18 + 24  # 21 pictures x 6 crops in chunks of 7, then all 24 rows
    assert tree(tmp_path / "store") == tree(tmp_path / "whole")
    assert np.isin([1], open_store(tmp_path / "store").skipped(0))
