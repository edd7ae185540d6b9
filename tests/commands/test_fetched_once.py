"""A training over remote tars fetches each once in a pass, though the cache holds only some of them."""

import importlib.util
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fkd_ssl.fetching import fetched_folder
from fkd_ssl.images import open_images, scan
from fkd_ssl.images.shrinking import shrink_set
from tests.commands.conftest import write_images
from tests.web_server import WebServer, serving

pytest.importorskip("requests", reason="pip install 'fkd_ssl[remote]'")
SCRIPT = Path(__file__).parents[2] / "benchmarks" / "sources.py"
TARS = 24


@pytest.fixture
def server(work: Path, call: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[WebServer]:
    """A web server with 96 images in 24 tars; the folder `store` has the targets."""
    monkeypatch.setenv("FKD_SSL_CACHE", str(tmp_path / "cache"))
    write_images(work / "many", 32, seed=3)
    line = "precompute --images many --store targets --teacher own_teacher:make --crops 2 --codec Flat --chunk_size 16"
    assert call(line).status == 0
    shrink_set(scan("many"), work / "web", short_side=0, tars=TARS)
    with serving(work / "web") as server:
        yield server


def test_each_tar_is_fetched_once_in_a_pass(server: WebServer, call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two tars are mixed, and the cache holds eight. The benchmark counts the same."""
    names = sorted(path.name for path in Path("web").iterdir())
    assert len(names) == TARS
    pattern = f"{server.url}/{{00000..{TARS - 1:05d}}}.tar"
    source = open_images(pattern)  # makes the index, which fetches all
    for path in fetched_folder().iterdir():
        path.unlink()
    largest = max(path.stat().st_size for path in Path("web").iterdir())
    monkeypatch.setenv("FKD_SSL_CACHE_BYTES", str(8 * largest))
    server.requests.clear()
    line = (
        f"train --images {pattern} --store targets --student squeezenet1_1 --epochs 2 --batch_size 8 --seed 0 "
        "--crops_per_image 2 --pixels 32 --workers 2 --mix_groups 2 --log_every 1 --checkpoint_interval 0 --out run"
    )
    answer = call(line)
    assert answer.status == 0, answer.err
    counted = Counter(path for path, span in server.requests if re.fullmatch(r"bytes=0-[1-9]\d*", span))
    assert counted == dict.fromkeys(names, 1)
    spec = importlib.util.spec_from_file_location("sources_benchmark", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    assert benchmark.fetches(source, batch=4, mix=2, cache=8) == [1] * TARS
