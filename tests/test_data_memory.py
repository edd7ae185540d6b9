"""Memory blocks of batches are reused when no tensor uses them any more, and not before."""

import gc
import multiprocessing
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset, get_worker_info

from fkd_ssl.crops import RECIPES
from fkd_ssl.data import FreshCrops, Loader, memory, whole_batch
from fkd_ssl.images import scan

SIZE = 3 * 64 * 64


@pytest.fixture(autouse=True)
def own_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_pool", memory._Pool())


def address_of_a_new_one(*shape: int) -> int:
    return memory.empty(*shape).data_ptr()


class TestInOneProcess:
    def test_a_block_is_used_again(self) -> None:
        assert address_of_a_new_one(4, SIZE) == address_of_a_new_one(4, SIZE)
        assert address_of_a_new_one(4, SIZE) == address_of_a_new_one(2, 2 * SIZE)
        assert len(memory._pool.blocks) == 1

    @pytest.mark.parametrize(
        "shown",
        [
            pytest.param(lambda tensor: tensor, id="itself"),
            pytest.param(lambda tensor: tensor[1:2], id="a slice"),
            pytest.param(lambda tensor: tensor.view(2, 2, SIZE).permute(1, 0, 2), id="a permuted view"),
            pytest.param(lambda tensor: tensor[0].numpy(), id="an array"),
            pytest.param(lambda tensor: memoryview(tensor.numpy()), id="a buffer"),
            pytest.param(lambda tensor: tensor.untyped_storage(), id="its storage"),
            pytest.param(lambda tensor: torch.from_dlpack(tensor), id="by dlpack"),
        ],
    )
    def test_but_not_while_something_shows_it(self, shown: Any) -> None:
        tensor = memory.empty(4, SIZE)
        address, kept = tensor.data_ptr(), shown(tensor)
        del tensor
        gc.collect()
        other = memory.empty(4, SIZE)
        assert other.data_ptr() != address
        del kept
        gc.collect()
        assert address_of_a_new_one(4, SIZE) == address

    def test_sizes_that_differ_little_share_and_others_do_not_pile_up(self) -> None:
        assert address_of_a_new_one(1000) == address_of_a_new_one(1020)
        for size in range(1, 40):
            memory.empty(size * 1000)
        assert len(memory._pool.blocks) == 1

    def test_two_sizes_in_turn_keep_their_blocks(self) -> None:
        first = [memory.empty(SIZE), memory.empty(4 * SIZE)]
        addresses = [tensor.data_ptr() for tensor in first]
        del first
        for _ in range(3):
            pair = [memory.empty(SIZE), memory.empty(4 * SIZE)]
            assert [tensor.data_ptr() for tensor in pair] == addresses
            del pair

    def test_any_number_can_be_kept(self) -> None:
        kept = [memory.empty(SIZE).fill_(k) for k in range(3 * memory._MAX_BLOCKS)]
        assert len({tensor.data_ptr() for tensor in kept}) == len(kept)
        assert all((tensor == k).all() for k, tensor in enumerate(kept))
        assert len(memory._pool.blocks) == memory._MAX_BLOCKS

    def test_threads_never_share_a_block(self) -> None:
        wrong: list[int] = []

        def work(k: int) -> None:
            for _ in range(200):
                tensor = memory.empty(SIZE).fill_(k)
                wrong.extend([k] * int((tensor != k).any()))

        threads = [threading.Thread(target=work, args=(k,)) for k in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong

    def test_no_bytes_at_all(self) -> None:
        assert memory.empty(0, 3).shape == (0, 3)


class Numbers(Dataset[Any]):
    """Batch k is filled with k, and contains the number of blocks of its process."""

    def __getitems__(self, indices: list[int]) -> Any:
        images = memory.empty(len(indices), 64, 64, 3)
        images[:] = torch.tensor(indices, dtype=torch.uint8)[:, None, None, None]
        return {"images": images.permute(0, 3, 1, 2), "blocks": len(memory._pool.blocks), "worker": get_worker_info().id}

    def __len__(self) -> int:
        return 240


def batches(*, workers: int) -> Iterator[Any]:
    keys = [list(range(8 * k, 8 * k + 8)) for k in range(30)]
    return iter(Loader(Numbers(), keys, workers=workers, collate=lambda batch: batch))


def right(k: int, images: torch.Tensor) -> bool:
    expected = torch.arange(8 * k, 8 * k + 8, dtype=torch.uint8)[:, None, None, None].expand(8, 3, 64, 64)
    return torch.equal(images, expected) and images.is_contiguous(memory_format=torch.channels_last)


class TestFromAWorker:
    @pytest.mark.parametrize("workers", [1, 2])
    def test_few_blocks_go_round(self, workers: int) -> None:
        blocks = 0
        for k, batch in enumerate(batches(workers=workers)):
            assert right(k, batch["images"])
            blocks = max(blocks, batch["blocks"])
        assert blocks <= 2 + 3  # in transit, in use by the reader, and in use by the worker

    def test_batches_that_are_kept_stay_as_they_are(self) -> None:
        kept = [batch["images"] for batch in batches(workers=2)]
        assert all(right(k, images) for k, images in enumerate(kept))

    def test_a_part_that_is_kept_stays_as_it_is(self) -> None:
        kept = [batch["images"][3, 1].numpy() for batch in batches(workers=1)]
        assert all((part == 8 * k + 3).all() for k, part in enumerate(kept))

    def test_from_a_spawned_one(self, image_folder: Path) -> None:
        """A spawned process shares nothing with its parent; teacher_images are a second block of each batch."""
        data = FreshCrops(scan(image_folder), RECIPES["mocov2"], crops_per_image=2, pixels=32, teacher_pixels=48)
        here, there = (Loader(data, [[(0, 0), (1, 1)], [(0, 2)]], workers=workers, collate=whole_batch) for workers in (0, 1))
        there.multiprocessing_context = "spawn"
        for a, b in zip(here, there, strict=True):
            assert torch.equal(a["images"], b["images"])
            assert torch.equal(a["teacher_images"], b["teacher_images"])

    @pytest.mark.parametrize("first", ["images", "teacher_images"])
    def test_plans_of_two_sizes_share_their_images_until_both_are_freed(self, image_folder: Path, first: str) -> None:
        options: dict[str, Any] = {"pixels": 32, "teacher_pixels": 48, "decode_only": True}
        data = FreshCrops(scan(image_folder), RECIPES["mocov2"], crops_per_image=2, **options)
        batch = next(iter(Loader(data, [[(0, 0), (1, 1)]], workers=1, collate=whole_batch)))
        block = memory._leases[batch["images"].sources.data_ptr()].block
        del batch[first]
        gc.collect()
        assert block[-1] == memory._IN_USE
        batch.clear()
        gc.collect()
        assert block[-1] == memory._FREE

    def test_a_forked_process_frees_nothing(self) -> None:
        """It has copies of the objects and shares the memory."""
        loader = batches(workers=1)
        images = next(loader)["images"]
        (lease,) = [lease for lease in memory._leases.values() if lease.block.data_ptr() == images.data_ptr()]
        child = os.fork()
        if child == 0:
            del images
            gc.collect()
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        assert lease.block[-1] == memory._IN_USE
        block = lease.block
        del images, lease
        gc.collect()
        assert block[-1] == memory._FREE
        assert all(right(k + 1, batch["images"]) for k, batch in enumerate(loader))

    def test_a_forked_process_has_blocks_of_its_own(self) -> None:
        memory.empty(SIZE)
        context = multiprocessing.get_context("fork")
        reader, writer = context.Pipe(duplex=False)
        process = context.Process(target=lambda: writer.send((memory.empty(SIZE).shape, len(memory._pool.blocks))))
        process.start()
        assert reader.recv() == ((SIZE,), 1)
        process.join()
        assert len(memory._pool.blocks) == 1
