from typing import Any

import pytest

from fkd_ssl.pretraining.method import queue_length


@pytest.mark.parametrize("method", ["mocov2", "swav"])
def test_the_queue_is_a_multiple_of_the_batch_and_at_most_half_of_the_images(method: str, make_config: Any) -> None:
    asked = make_config(method=method, batch_size=8, queue=64)
    assert queue_length(asked, 128) == 64
    with pytest.warns(UserWarning, match=r"queue 64: shortened to 48, a multiple of batch_size 8 and at most half of the 100"):
        assert queue_length(asked, 100) == 48
    with pytest.warns(UserWarning, match=r"queue 60: shortened to 56"):
        assert queue_length(make_config(method=method, queue=60), 1000) == 56
    with pytest.warns(UserWarning, match=r"queue 64: shortened to 8"):
        assert queue_length(asked, 9) == 8


def test_swav_can_do_without_a_queue(make_config: Any) -> None:
    assert queue_length(make_config(method="swav", queue=0), 100) == 0
