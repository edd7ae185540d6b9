"""Commands on a store at a URL: the same results as with the folder."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fkd_ssl.fetching import fetched_folder
from tests.web_server import WebServer, serving

pytest.importorskip("requests", reason="pip install 'fkd_ssl[remote]'")


@pytest.fixture
def server(work: Path, call: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[WebServer]:
    """A web server with the store as URL/set."""
    monkeypatch.setenv("FKD_SSL_CACHE", str(tmp_path / "cache"))
    answer = call("publish store web/set --json")
    assert answer.status == 0
    size = sum(path.stat().st_size for path in Path("store").rglob("*") if path.is_file())
    said = {"url": "web/set", "files": 8, "bytes": size, "sent_files": 8, "sent_bytes": size}
    assert json.loads(answer.out) == said
    assert f"web/set: 8 files, {size / 1000:.1f} kB\n" in answer.err
    with serving(Path("web")) as server:
        yield server


def weights(run: str) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = torch.load(f"{run}/checkpoints/last.ckpt", weights_only=True)["state_dict"]
    return state


@pytest.mark.parametrize("workers", [0, 2])
def test_a_student_of_a_remote_store_is_that_of_the_folder(server: WebServer, call: Any, train_line: str, workers: int) -> None:
    line = train_line.replace("--workers 0", f"--workers {workers}")
    assert call(f"{line} --out local").status == 0
    assert call(f"{line.replace('--store store', f'--store {server.url}/set')} --out far").status == 0
    local, far = weights("local"), weights("far")
    assert local.keys() == far.keys()
    assert all(torch.equal(local[name], far[name]) for name in local)
    fetched = [path for path in server.paths() if path != "set/files.txt"]
    assert len(fetched) == len(set(fetched)) == 8
    assert f"| store | {server.url}/set |" in Path("far/README.md").read_text()
    assert f"store: {server.url}/set\n" in Path("far/config.yaml").read_text()


def test_a_warm_training_fetches_nothing(server: WebServer, call: Any, train_line: str) -> None:
    line = train_line.replace("--store store", f"--store {server.url}/set")
    assert call(f"{line} --out one").status == 0
    server.requests.clear()
    assert call(f"{line} --out two").status == 0
    assert set(server.paths()) == {"set/files.txt"}


def test_inspect_verify_and_show(server: WebServer, call: Any) -> None:
    url = f"{server.url}/set"
    local, far = (json.loads(call(f"inspect {store} --json").out) for store in ("store", url))
    assert {**far, "store": "store"} == local
    assert far["store"] == url
    assert not [path for path in server.paths() if re.search(r"crops/\d+\.npy|codes-\d+\.npy", path)]
    verified = call(f"verify {url} --images train --teacher own_teacher:make --json")
    assert verified.status == 0
    assert json.loads(verified.out)["checked"] == {"files": 5, "images": 18, "crops": 18}
    assert call(f"show {url} --images train --image ash/0.png --out sheet.png").status == 0
    server.always["set/crops/00000.npy"] = "other"
    for path in fetched_folder().iterdir():
        if path.is_file():
            path.unlink()
    damaged = call(f"verify {url}")
    assert damaged.status == 1
    assert f"shard 0: {url}/crops/00000.npy: its sha256 differs from the expected one" in damaged.out


def test_pull_is_subset_of_the_url(server: WebServer, call: Any) -> None:
    answer = call(f"pull {server.url}/set --out part --crops 2")
    assert answer.status == 0
    assert answer.out.startswith("part: 18 images x 2 crops, targets of make; ")
    assert call("verify part --images train").status == 0
    Path("some.txt").write_text("ash/0.png\ncedar/3.png\n")
    pulled = json.loads(call(f"pull {server.url}/set --out some --images some.txt --json").out)
    assert (pulled["images"], pulled["crops_per_image"]) == (2, 4)
    lacks = call(f"pull {server.url}/set --out other --images val")
    assert lacks.status in (0, 2)  # the names of val are also names of train
    Path("some.txt").write_text("ash/0.png\nash/99.png\n")
    lacks = call(f"pull {server.url}/set --out other2 --images some.txt")
    assert lacks.status == 2
    assert "lacks 1 of the requested images, for instance 'ash/99.png'" in lacks.err


def test_a_column_is_recoded_into_a_new_store(server: WebServer, call: Any) -> None:
    assert call(f"recode {server.url}/set --codec SQ8 --out small").status == 0
    assert call("verify small --images train").status == 0
    refused = call(f"recode {server.url}/set --codec SQ8")
    assert refused.status == 2
    assert "cannot be changed at its URL: copy it with fkd-ssl pull, and publish the copy" in refused.err


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("publish store s3://me:very-secret@bucket/set", "s3://bucket/set: a URL with credentials"),
        ("publish {url} web/other", "cannot be changed at its URL"),
        ("publish store {url}", "a web server can be read, but not written"),
        ("publish nothing web/other", "nothing: not a store (no such folder)"),
        ("publish store web/set/crops", "web/set/crops: holds 00000.json, which is not part of this store"),
        ("inspect {url}er", "er: not a published store (files.txt not found); check the URL, and the credentials"),
        ("inspect nonsense://a", "nonsense://: Protocol not known"),
        (
            "precompute --images train --store s3://bucket/set --teacher own_teacher:make",
            "--store: a URL; choose a local folder",
        ),
        (
            "subset store --out s3://bucket/set",
            "--out: a URL; choose a local folder, and send a finished store with fkd-ssl publish",
        ),
        ("verify {url} --repair", "--repair cannot change a store at a URL"),
    ],
)
def test_a_wrong_request(server: WebServer, call: Any, line: str, message: str) -> None:
    answer = call(line.format(url=f"{server.url}/set"))
    assert answer.status == 2
    assert message in answer.err
    assert "secret" not in answer.err
