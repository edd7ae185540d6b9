"""Progress bars. tqdm reads TQDM_DISABLE only if `disable` is not given."""

import os
from typing import Any

from tqdm import tqdm


def bar_disabled(*, show: bool) -> bool:
    """Returns a bar's `disable`: True if `show` is False or TQDM_DISABLE is set."""
    return not show or "TQDM_DISABLE" in os.environ


def advance_done(bar: "tqdm[Any]", count: int) -> None:
    """Advances a bar by work of an earlier session, which does not count for the bar's rate and time left."""
    bar.n += count
    if not bar.disable:
        bar.initial += count
        bar.last_print_n += count
        bar.refresh()
