"""Whether to show progress bars. tqdm reads TQDM_DISABLE only if `disable` is not given."""

import os


def bar_disabled(*, show: bool) -> bool:
    """Returns a bar's `disable`: True if `show` is False or TQDM_DISABLE is set."""
    return not show or "TQDM_DISABLE" in os.environ
