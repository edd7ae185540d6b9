import math

import numpy as np
import pytest

from fkd_ssl.errors import RequestError
from fkd_ssl.eval import stats


@pytest.mark.parametrize(
    ("correct", "n", "low", "high"),
    # statsmodels.stats.proportion.proportion_confint(method="wilson"), z = 1.959964, printed to four digits
    [(0, 10, 0.0, 27.7533), (8, 10, 49.0162, 94.3318), (10, 10, 72.2467, 100.0), (50, 100, 40.3832, 59.6168)],
)
def test_wilson_known_values(correct: int, n: int, low: float, high: float) -> None:
    assert stats.wilson(correct, n, z=1.959963985) == pytest.approx((low, high), abs=2e-4)


@pytest.mark.parametrize(("correct", "n"), [(1, 7), (30, 77), (2400, 2500)])
def test_wilson_ends_are_where_the_score_test_turns(correct: int, n: int) -> None:
    """By definition, the ends are the proportions p whose score test of correct / n gives exactly z."""
    for limit in stats.wilson(correct, n, z=1.7):
        p = limit / 100
        assert abs(correct / n - p) / math.sqrt(p * (1 - p) / n) == pytest.approx(1.7, rel=1e-9)


def test_wilson_refuses_nonsense() -> None:
    with pytest.raises(RequestError, match="got 0 of 0"):
        stats.wilson(0, 0)
    with pytest.raises(RequestError, match="got 5 of 4"):
        stats.wilson(5, 4)
    with pytest.raises(RequestError, match="z must not be negative, got -1"):
        stats.wilson(1, 4, z=-1)


def arms(generator, seeds: int, images: int, base: float, shift: float):
    """Two arms that share each image's difficulty, with accuracies `base` and `base` + `shift`."""
    hard = generator.uniform(size=images)
    noise = generator.normal(0, 0.1, size=(2, seeds, images))
    return hard + noise[0] < base + shift, hard + noise[1] < base


def test_identical_arms_differ_by_nothing() -> None:
    arm = np.random.default_rng(0).uniform(size=(3, 200)) < 0.7
    assert stats.paired_bootstrap(arm, arm, draws=200) == (0.0, 0.0, 0.0)


def test_the_interval_covers_a_shift_as_often_as_it_says() -> None:
    generator = np.random.default_rng(0)
    covered = 0
    for trial in range(60):
        a, b = arms(generator, seeds=3, images=300, base=0.5, shift=0.08)
        difference, low, high = stats.paired_bootstrap(a, b, draws=300, seed=trial)
        assert difference == pytest.approx(100 * (a.mean() - b.mean()))
        assert low < difference < high
        covered += low <= 8 <= high
    assert covered >= 49  # 54 of 60 at 90 percent, less two deviations


def test_pairing_narrows_the_interval_and_seeds_widen_it() -> None:
    generator = np.random.default_rng(1)
    a, b = arms(generator, seeds=3, images=400, base=0.5, shift=0.05)
    _, low, high = stats.paired_bootstrap(a, b)
    _, far_low, far_high = stats.paired_bootstrap(a, b[:, generator.permutation(400)])
    assert high - low < 0.6 * (far_high - far_low)
    uneven = a.copy()
    uneven[0] = True  # one seed is far better
    _, wide_low, wide_high = stats.paired_bootstrap(uneven, b)
    assert wide_high - wide_low > 3 * (high - low)


def test_one_seed_is_the_textbook_bootstrap() -> None:
    """With one seed, the deviation over images is that of a mean of n, in closed form."""
    a, b = arms(np.random.default_rng(2), seeds=1, images=1000, base=0.5, shift=0.02)
    _, low, high = stats.paired_bootstrap(a[0], b[0], draws=4000)
    expected = 2 * 1.6449 * 100 * (a[0].astype(float) - b[0]).std() / math.sqrt(1000)
    assert high - low == pytest.approx(expected, rel=0.06)
    assert stats.paired_bootstrap(a, b, draws=4000) == stats.paired_bootstrap(a[0], b[0], draws=4000)
    assert stats.paired_bootstrap(b, a)[0] == -stats.paired_bootstrap(a, b)[0]


def test_bootstrap_refuses_nonsense() -> None:
    arm = np.ones((2, 4), dtype=bool)
    with pytest.raises(RequestError, match=r"expected two arms of one shape \[seeds, images\], got \[2, 4\] and \[2, 3\]"):
        stats.paired_bootstrap(arm, arm[:, :3])
    with pytest.raises(RequestError, match="b: expected one boolean for each image, got int64"):
        stats.paired_bootstrap(arm, np.ones((2, 4), dtype=np.int64))
    with pytest.raises(RequestError, match=r"a: expected a non-empty array \[seeds, images\], got \[0, 4\]"):
        stats.paired_bootstrap(arm[:0], arm[:0])
    with pytest.raises(RequestError, match="level must be between 0 and 1, got 90"):
        stats.paired_bootstrap(arm, arm, level=90)
    with pytest.raises(RequestError, match="draws must be at least 1, got 0"):
        stats.paired_bootstrap(arm, arm, draws=0)


def test_more_seeds_known_values() -> None:
    """Differences of -1, 1 and 3 points, each of other images, so that images contribute nothing: variance 4, mean 1."""
    a, base = np.zeros((3, 1000), dtype=bool), np.zeros((3, 1000), dtype=bool)
    base[0, :10], a[1, 10:20], a[2, 20:50] = True, True, True
    # z^2 = 2.7055; h = max(1, 1.5 - 1) = 1; 2.7055 x 4 / 1 = 10.8: 11 seeds, of which there are 3
    assert stats.paired_bootstrap(a, base)[0] == pytest.approx(1)
    assert stats.more_seeds(a, base) == 8
    # h = max(1, 3 - 1) = 2: 2.7 seeds, of which there are 3
    assert stats.more_seeds(a, base, margin=3) == 1
    # z^2 = 0.4549 at 50 percent: 1.8 seeds
    assert stats.more_seeds(a, base, level=0.5) == 1


def test_more_seeds_is_symmetric_and_two_for_one_seed() -> None:
    a, b = arms(np.random.default_rng(3), seeds=3, images=2000, base=0.5, shift=0.0)
    assert stats.more_seeds(a, b) == stats.more_seeds(b, a)
    assert stats.more_seeds(a[0], b[0]) == 2


def test_more_seeds_is_none_if_the_images_are_too_few() -> None:
    """The arms are right about other images, whatever the seed: no seed changes that."""
    one = np.random.default_rng(4).uniform(size=50) < 0.5
    other = np.random.default_rng(5).permutation(one)
    noise = np.random.default_rng(6).uniform(size=(4, 50)) < 0.02
    assert stats.more_seeds(np.tile(one, (4, 1)) ^ noise, np.tile(other, (4, 1))) is None


def test_about_so_many_seeds_make_it_conclusive() -> None:
    """Arms whose seeds spread by 2 points: half of the intervals with as many seeds as it says are conclusive, or more."""

    def draw(generator: np.random.Generator, seeds: int) -> tuple[np.ndarray, np.ndarray]:
        hard, shifts = generator.uniform(size=4000), generator.normal(0, 0.02, size=(seeds, 1))
        return hard + generator.normal(0, 0.02, size=(seeds, 4000)) < 0.5 + shifts, np.tile(hard < 0.5, (seeds, 1))

    generator = np.random.default_rng(0)
    needed = [stats.more_seeds(*draw(generator, 5)) for _ in range(15)]
    total = 5 + int(np.median([n for n in needed if n is not None]))
    assert 5 < total < 40
    conclusive = 0
    for _ in range(20):
        _, low, high = stats.paired_bootstrap(*draw(generator, total), draws=200)
        conclusive += stats.equal(low, high) or low > 0 or high < 0
    assert conclusive >= 8


def test_equal_needs_the_whole_interval_inside() -> None:
    assert stats.equal(-1.5, 1.5)
    assert not stats.equal(-1.51, 0.0)
    assert not stats.equal(0.0, 1.51)
    assert stats.equal(-1.9, 1.9, margin=2)
    with pytest.raises(RequestError, match="expected low <= high, got 1 and -1"):
        stats.equal(1, -1)
    with pytest.raises(RequestError, match="got nan"):
        stats.equal(math.nan, 1)
