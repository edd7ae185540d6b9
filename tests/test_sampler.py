"""The order of images: every image once per pass, nothing dropped or padded, any step computed on its own."""

from typing import Any

import numpy as np
import pytest

from fkd_ssl.data.sampler import PassSampler, permutation

Pairs = list[tuple[int, int]]

SIZES = [(24, 8), (10, 4), (7, 3), (5, 5), (9, 2), (3, 1)]


def flat(sampler: PassSampler) -> Pairs:
    return [pair for batch in sampler for pair in batch]


@pytest.mark.parametrize(("length", "batch"), SIZES)
def test_every_image_comes_once_a_pass_in_order_of_passes(length: int, batch: int) -> None:
    pairs = flat(PassSampler(length, batch, 30, seed=0))
    assert len(pairs) == 30 * batch
    whole = len(pairs) // length
    for p in range(whole):
        part = pairs[p * length : (p + 1) * length]
        assert {pass_ for pass_, _ in part} == {p}
        assert sorted(i for _, i in part) == list(range(length))
    rest = pairs[whole * length :]
    assert len({i for _, i in rest}) == len(rest)


def test_batches_are_equal_and_cross_the_borders_of_passes() -> None:
    batches = list(PassSampler(10, 4, 5, seed=0))
    assert [len(batch) for batch in batches] == [4] * 5
    assert [{pass_ for pass_, _ in batch} for batch in batches] == [{0}, {0}, {0, 1}, {1}, {1}]


def test_a_batch_is_a_function_of_seed_and_step() -> None:
    a, b = PassSampler(24, 8, 20, seed=3), PassSampler(24, 8, 20, seed=3)
    forward = [a.batch(step) for step in range(20)]
    backward = [b.batch(step) for step in reversed(range(20))]
    assert forward == backward[::-1]
    assert forward == list(a) == list(a)
    assert forward != list(PassSampler(24, 8, 20, seed=4))


def test_the_order_does_not_depend_on_the_length_of_the_training() -> None:
    assert list(PassSampler(24, 8, 20, seed=0))[:5] == list(PassSampler(24, 8, 5, seed=0))


def test_passes_have_other_orders() -> None:
    orders = [tuple(permutation(0, p, 50).tolist()) for p in range(4)]
    assert len(set(orders)) == 4
    assert tuple(range(50)) not in orders


def test_permutations_are_golden() -> None:
    assert permutation(0, 0, 8).tolist() == GOLDEN[0]
    assert permutation(7, 3, 8).tolist() == GOLDEN[1]


@pytest.mark.parametrize("world", [2, 3, 4])
def test_ranks_interleave_to_the_global_batch(world: int) -> None:
    alone = PassSampler(10, 12, 7, seed=1)
    ranks = [list(PassSampler(10, 12, 7, seed=1, rank=rank, world=world)) for rank in range(world)]
    for step, batch in enumerate(alone):
        parts = [ranks[rank][step] for rank in range(world)]
        assert [pair for pairs in zip(*parts, strict=True) for pair in pairs] == batch


def test_start_resumes() -> None:
    sampler = PassSampler(10, 4, 9, seed=0)
    whole = list(sampler)
    sampler.start = 5
    assert list(sampler) == whole[5:]
    assert len(sampler) == 9


def test_processes_that_do_not_divide_the_batch_are_refused() -> None:
    with pytest.raises(ValueError, match="3 processes do not divide a batch of 8 images"):
        PassSampler(10, 8, 1, seed=0, world=3)


GOLDEN: list[list[int]] = [[5, 2, 1, 4, 7, 6, 3, 0], [4, 7, 0, 1, 2, 6, 5, 3]]


# groups


GROUPS = np.repeat(np.arange(7), [10, 3, 8, 1, 12, 6, 9])  # 49 images


def grouped(**options: Any) -> PassSampler:
    return PassSampler(49, 7, 28, seed=5, groups=GROUPS, **options)


@pytest.mark.parametrize("mix", [1, 2, 3, 7])
def test_each_pass_reads_every_image_once_and_few_groups_at_a_time(mix: int) -> None:
    pairs = flat(grouped(mix=mix))
    for p in range(4):
        images = [i for pass_, i in pairs if pass_ == p]
        assert sorted(images) == list(range(49))
        order = list(dict.fromkeys(GROUPS[images].tolist()))
        windows = [set(order[k : k + mix]) for k in range(0, 7, mix)]
        at = 0
        for window in windows:  # the images of each window of groups are together
            size = int(np.isin(GROUPS, list(window)).sum())
            assert set(GROUPS[images[at : at + size]].tolist()) == window
            at += size
        assert mix == 1 or order != sorted(order)
    first, second = ([i for pass_, i in pairs if pass_ == p] for p in (0, 1))
    assert first != second


def test_the_images_of_mixed_groups_are_in_random_order() -> None:
    images = [i for _, i in flat(grouped(mix=7))]
    changes = np.count_nonzero(np.diff(GROUPS[images]))
    assert changes > 0.7 * len(images)  # 0.83 for independent draws
    assert images == [i for _, i in flat(PassSampler(49, 7, 28, seed=5))]  # all groups at once: the order without groups


def test_a_grouped_batch_is_a_function_of_seed_and_step_and_is_shared_by_ranks() -> None:
    whole = grouped(mix=2)
    again = grouped(mix=2)
    assert [again.batch(step) for step in reversed(range(28))] == list(whole)[::-1]
    ranks = [list(grouped(mix=2, rank=rank, world=7)) for rank in range(7)]
    assert [[batch[0] for batch in step] for step in zip(*ranks, strict=True)] == list(whole)


def test_images_are_announced_100_steps_before_they_are_read() -> None:
    announced: list[int] = []
    sampler = PassSampler(490, 7, 400, seed=0, groups=np.repeat(np.arange(70), 7), mix=3, expect=announced.extend)
    sampler.start = 20
    batches = iter(sampler)
    for read in range(1, 150):
        next(batches)
        assert announced == [i for step in range(20, 120 + read) for _, i in sampler.batch(step)]
