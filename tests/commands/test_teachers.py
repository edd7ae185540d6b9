"""`teachers` and `teachers fetch`: the list, the files in the cache, the text before a download."""

import functools
import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from torchvision.models import resnet18

from fkd_ssl.teachers import PRESETS, load_teacher

NAME = "swav_r50_800ep"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FKD_SSL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of an HTTP server; the preset NAME is a ResNet-18 in it, in SwAV's layout."""
    folder = tmp_path / "served"
    folder.mkdir()
    state = {f"module.{key}": value for key, value in resnet18(weights=None).state_dict().items() if not key.startswith("fc.")}
    norm = torch.nn.BatchNorm1d(16).state_dict()
    state |= {"module.projection_head.0.weight": torch.ones(16, 512), "module.projection_head.0.bias": torch.ones(16)}
    state |= {f"module.projection_head.1.{key}": value for key, value in norm.items()}
    state |= {"module.projection_head.3.weight": torch.ones(128, 16), "module.projection_head.3.bias": torch.ones(128)}
    torch.save({**state, "module.prototypes.weight": torch.ones(30, 128)}, folder / "swav.pth.tar")
    quiet = type("Quiet", (SimpleHTTPRequestHandler,), {"log_message": lambda *args: None})
    http = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(quiet, directory=str(folder)))
    threading.Thread(target=http.serve_forever, args=(0.01,), daemon=True).start()
    url = f"http://127.0.0.1:{http.server_port}/swav.pth.tar"
    monkeypatch.setitem(PRESETS, NAME, replace(PRESETS[NAME], network="resnet18", prototypes=30, url=url))
    yield folder
    http.shutdown()
    http.server_close()


def test_the_list_says_what_is_here(call: Any, cache: Path) -> None:
    status, out, err = call("teachers")
    assert (status, err) == (0, "")
    assert "licence of the weights" in out
    assert f"Cache folder: {cache} " in out
    rows = {line.split()[0]: line.split()[1] for line in out.splitlines()[: 1 + len(PRESETS)]}
    assert rows == {"preset": "downloaded", **dict.fromkeys(PRESETS, "no")}
    cache.mkdir()
    (cache / PRESETS[NAME].file).touch()
    (cache / f"{PRESETS['mocov2_r50_200ep'].file}.0a1b2c3d.part").touch()
    lines = call("teachers").out.splitlines()
    assert [line.split()[:2] for line in lines if line.startswith((NAME, "mocov2_r50_200ep"))][:2] == [
        ["mocov2_r50_200ep", "partly"],
        [NAME, "yes"],
    ]


def test_json(call: Any, cache: Path, tmp_path: Path) -> None:
    cache.mkdir()
    (cache / PRESETS[NAME].file).touch()
    presets = json.loads(call("teachers --json").out)
    assert list(presets) == list(PRESETS)
    assert presets["mocov2_r50_800ep"]["dim"] == 128
    assert all(preset["licence"] and preset["url"].startswith("https://") for preset in presets.values())
    assert presets[NAME]["here"] == str(cache / "swav_800ep_pretrain.pth.tar")
    assert presets["mocov2_r50_800ep"]["here"] is None
    assert json.loads(call("teachers --json", cache=tmp_path / "other").out)[NAME]["here"] is None


def test_fetch_says_the_licence_and_makes_the_name_enough(call: Any, cache: Path, served: Path) -> None:
    status, out, err = call(f"teachers fetch {NAME}")
    assert status == 0
    assert err.index("licence of the weights: CC BY-NC 4.0") < err.index("http://127.0.0.1")
    assert f"{cache}/swav.pth.tar: downloaded, " in out
    assert "loads as resnet18, MLP 512-16-128 with BatchNorm, 30 prototypes; use it as --teacher swav_r50_800ep" in out
    assert load_teacher(NAME).info.checkpoint == "swav.pth.tar"
    (served / "swav.pth.tar").unlink()
    said = call(f"teachers fetch {NAME}")
    assert "already downloaded" in said.out
    about = json.loads(call(f"teachers fetch {NAME} --json").out)
    assert (about["path"], about["downloaded"]) == (str(cache / "swav.pth.tar"), False)
    assert "CC BY-NC" in about["licence"]


def test_fetch_into_another_folder(call: Any, served: Path, tmp_path: Path) -> None:
    status, _, err = call(f"teachers fetch {NAME}", cache=tmp_path / "other")
    assert status == 0
    assert f"set FKD_SSL_CACHE={tmp_path}/other in the environment, so that --teacher {NAME} finds it" in err
    assert (tmp_path / "other" / "swav.pth.tar").is_file()


def test_a_web_page_is_no_checkpoint(call: Any, cache: Path, served: Path) -> None:
    (served / "swav.pth.tar").write_text("<html>sign in first</html>")
    status, _, err = call(f"teachers fetch {NAME}")
    assert status == 2
    assert "cannot be read as a checkpoint" in err
    assert not list(cache.glob("*.part"))
    assert not list(cache.glob("*.tar"))


def test_another_network_is_refused(call: Any, cache: Path, served: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PRESETS, NAME, replace(PRESETS[NAME], network="resnet50"))
    status, _, err = call(f"teachers fetch {NAME}")
    assert status == 2
    assert "holds a resnet18, MLP" in err
    assert not list(cache.glob("*.tar"))


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("teachers fetch", "expected fkd-ssl teachers fetch NAME"),
        ("teachers list swav_r50_800ep", "expected fkd-ssl teachers fetch NAME"),
        ("teachers fetsh swav_r50_800ep", "no action 'fetsh'; did you mean fetch?"),
        ("teachers fetch swav_r50w3_400ep", "no preset 'swav_r50w3_400ep'; did you mean swav_r50w"),
    ],
)
def test_what_is_refused(call: Any, line: str, said: str) -> None:
    status, out, err = call(line)
    assert (status, out) == (2, "")
    assert said in err


def test_a_server_that_is_gone(call: Any, cache: Path, served: Path) -> None:
    (served / "swav.pth.tar").unlink()
    status, _, err = call(f"teachers fetch {NAME}")
    assert status == 1
    assert "the server answers 404" in err
    assert f"put it at {cache}/swav.pth.tar, or pass it as --checkpoint" in err
