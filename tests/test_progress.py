"""Progress bars of resumed work."""

import io
import time

import pytest
from tqdm import tqdm

from fkd_ssl.progress import advance_done


def test_the_rate_counts_only_the_work_of_this_session() -> None:
    with tqdm(total=1_000_000, file=io.StringIO(), mininterval=0, disable=False) as bar:
        advance_done(bar, 999_000)
        assert bar.n == 999_000
        for _ in range(20):
            time.sleep(0.01)
            bar.update(1)
        about = bar.format_dict
        assert 0 < about["rate"] < 200
        assert about["n"] - about["initial"] == 20
        assert bar.n == 999_020


@pytest.mark.parametrize("count", [0, 7])
def test_a_bar_that_is_disabled(count: int) -> None:
    with tqdm(total=9, disable=True) as bar:
        advance_done(bar, count)
        assert bar.n == count
