"""Whether progress bars are shown: tqdm heeds TQDM_DISABLE only where a bar's `disable` is not given."""

import os


def hidden(*, show: bool) -> bool:
    """A bar's `disable`: True where the caller does not want one or the environment has TQDM_DISABLE."""
    return not show or "TQDM_DISABLE" in os.environ
