"""Reading a store while it is being written: the finished rows."""

import numpy as np
import pytest
import torch

from fkd_ssl import StoredCrops, images
from fkd_ssl.crops import RECIPES
from fkd_ssl.data import whole_batch
from fkd_ssl.errors import StoreError
from fkd_ssl.store import manifest, open_store
from fkd_ssl.store.write.precompute import Share, precompute


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(manifest, "ROWS_PER_SHARD", 5)


def write(folder, image_folder, teacher, **options):
    asked = {"crops": 6, "recipe": RECIPES["mocov2"], "pixels": 32, "chunk_size": 7, **options}
    return precompute(images.scan(image_folder), folder, teacher, **asked)


def test_the_rows_that_are_done_are_read(tmp_path, image_folder, new_teacher):
    folder = tmp_path / "store"
    write(folder, image_folder, new_teacher(), codec="Flat", share=Share(index=2, of=5))
    write(folder, image_folder, new_teacher(), codec="Flat", share=Share(index=4, of=5))
    store = open_store(folder)
    with pytest.raises(StoreError, match="3 of 5 shards missing"):
        StoredCrops(store, image_folder)
    data = StoredCrops(store, image_folder, crops_per_image=6, pixels=32, partial=True)
    assert [data[i]["path"] for i in range(len(data))] == [store.paths[row] for row in (*range(10, 15), *range(20, 24))]
    teacher = new_teacher()
    for sample in data:
        view = sample["images"]
        np.testing.assert_allclose(sample["targets"], teacher.embed(view), atol=2e-6)
    loader = torch.utils.data.DataLoader(data, batch_size=4, num_workers=2, collate_fn=whole_batch)
    assert sum(len(batch["paths"]) for batch in loader) == 9


def test_while_it_is_being_written(tmp_path, image_folder, new_teacher):
    """In every state between two forward passes, the rows are correct, and there are more when the store is opened again."""
    folder, writer, reader = tmp_path / "store", new_teacher(), new_teacher()
    real, lengths = writer.embed, []
    early = []

    def embed(views):
        if writer.calls > 21:
            store = open_store(folder)
            try:
                data = StoredCrops(store, image_folder, crops_per_image=2, pixels=32, partial=True)
            except StoreError as error:
                assert "holds no finished targets" in str(error)  # noqa: PT017
            else:
                lengths.append(len(data))
                early.append(data)
                sample = data[len(data) - 1]
                assert (sample["targets"] * reader.embed(sample["images"])).sum(dim=1).min() > 0.999
        return real(views)

    writer.embed = embed
    write(folder, image_folder, writer)
    assert sorted(set(lengths)) == [5, 10, 15, 20]
    assert len(early[0]) == 5  # an opened store does not change
    assert len(StoredCrops(open_store(folder), image_folder, partial=True)) == 24


def test_one_column_behind_the_other(tmp_path, image_folder, new_teacher):
    folder = tmp_path / "store"
    write(folder, image_folder, new_teacher(0, "a"))
    write(folder, image_folder, new_teacher(1, "b"), share=Share(index=1, of=5))
    store = open_store(folder)
    assert len(StoredCrops(store, image_folder, column="a")) == 24
    assert len(StoredCrops(store, image_folder, column="b", partial=True)) == 5
    assert len(StoredCrops(store, image_folder, with_targets=False, partial=True)) == 24


def test_nothing_done_is_said_so(tmp_path, image_folder, new_teacher):
    folder = tmp_path / "store"
    write(folder, image_folder, new_teacher(0, "a"))
    for path in (folder / "targets/a").glob("codes-*"):
        path.unlink()
    with pytest.raises(StoreError, match="holds no finished targets; run fkd-ssl precompute"):
        StoredCrops(open_store(folder), image_folder, partial=True)


def test_skipped_rows_are_left_out(tmp_path, pictures, new_teacher):
    path = pictures / "ash" / "001.jpg"
    path.write_bytes(path.read_bytes()[:700])
    write(tmp_path / "store", pictures, new_teacher(), share=Share(index=0, of=5), skip_unreadable=True)
    data = StoredCrops(open_store(tmp_path / "store"), pictures, partial=True)
    assert len(data) == 4
