"""Run by `runpy` in a process of its own: one precompute that may be killed. The test sets OPTIONS."""

import importlib.util
import json
import os
import resource
import signal
import time
from pathlib import Path
from typing import Any

from fkd_ssl import images
from fkd_ssl.crops import RECIPES
from fkd_ssl.errors import FkdError
from fkd_ssl.store import manifest
from fkd_ssl.store.write import work
from fkd_ssl.store.write.precompute import precompute

spec = importlib.util.spec_from_file_location("shared_conftest", Path(__file__).parents[1] / "conftest.py")
assert spec is not None
assert spec.loader is not None
shared: Any = importlib.util.module_from_spec(spec)
spec.loader.exec_module(shared)

options: dict[str, Any] = dict(globals()["OPTIONS"])
kill_at = options.pop("kill_at", None)
if "rows_per_shard" in options:
    manifest.ROWS_PER_SHARD = options.pop("rows_per_shard")
if "journal_seconds" in options:
    work.SECONDS_BETWEEN_JOURNALS = options.pop("journal_seconds")
before = resource.getrlimit(resource.RLIMIT_FSIZE)
if "file_limit" in options:
    resource.setrlimit(resource.RLIMIT_FSIZE, (options.pop("file_limit"), before[1]))
report = options.pop("report", None)
pause = options.pop("pause", 0.0)
teacher = shared.TinyTeacher()
if pause:
    embed = teacher.embed
    teacher.embed = lambda views: time.sleep(pause) or embed(views)


def killing(function: Any, calls: int) -> Any:
    """Returns `function`, except that its call number `calls` never returns."""
    done = 0

    def call(*arguments: Any) -> Any:
        nonlocal done
        done += 1
        if done == calls:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments)

    return call


if kill_at is not None:
    what, calls = kill_at
    if what == "embed":
        teacher.embed = killing(teacher.embed, calls)
    else:
        setattr(os, what, killing(getattr(os, what), calls))

image_set = images.scan(options.pop("images"))
asked = {"crops": 6, "recipe": RECIPES["mocov2"], "pixels": 32, "chunk_size": 7, **options}
status = 0
try:
    summary = precompute(image_set, asked.pop("folder"), teacher, **asked)
    result = {"crops": summary.crops, "busy": summary.busy, "embedded": teacher.crops_seen}
except OSError as error:
    result, status = {"error": str(error), "errno": error.errno}, 3
except FkdError as error:
    result, status = {"error": str(error)}, 3
if report:
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    Path(report).write_text(json.dumps(result))
os._exit(status)
