"""The allocator keeps freed memory, so that repeated large allocations cause no page faults."""

import os
import platform
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="sets options of glibc")

BYTES, ROUNDS = 96 << 20, 10  # more than the 32 MiB from which glibc always maps new pages
HUGE_PAGES = BYTES * ROUNDS >> 21  # the fewest page faults of these blocks, if each has new pages
COUNT = f"""
import resource
for k in range({ROUNDS + 2}):
    if k == 2:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    bytearray({BYTES})
print("faults", resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
SET = "from fkd_ssl import allocator\nallocator.keep_freed_memory()"
COMMAND = "from fkd_ssl import cli\ncli.main(['inspect', 'missing'])"
WORKER = f"""
import sys
from fkd_ssl.data.loading import Loader
class Images:
    def __getitem__(self, key):
        exec({COUNT!r}, {{}})
        sys.stdout.flush()
next(iter(Loader(Images(), [[0]], workers=1, collate=len)))
sys.exit()
"""
TASK = """
from fkd_ssl.commands import precompute
try:
    precompute._write_shard(precompute.Config(images="missing", store="store", teacher="mocov2"), 0)
except precompute.RequestError:
    pass
"""
FUNCTION = "import fkd_ssl\ntry:\n    fkd_ssl.pull('missing', out='out')\nexcept fkd_ssl.errors.FkdError:\n    pass"


def faults(start: str, **variables: str) -> int:
    """Returns the page faults of ten large blocks, in a process that has run some code."""
    unset = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_TUNABLES"))}
    done = subprocess.run(
        [sys.executable, "-c", start + COUNT], env={**unset, **variables}, capture_output=True, text=True, check=True
    )
    return int(done.stdout.rsplit("faults ", 1)[1])


@pytest.mark.parametrize("start", [COMMAND, FUNCTION, WORKER, TASK])
def test_commands_functions_and_their_processes_reuse_freed_memory(start):
    assert faults(start) < HUGE_PAGES // 2


@pytest.mark.parametrize("variables", [{"MALLOC_PERTURB_": "0"}, {"GLIBC_TUNABLES": "glibc.malloc.perturb=0"}])
def test_settings_of_the_user_are_kept(variables):
    assert faults(SET, **variables) >= HUGE_PAGES
