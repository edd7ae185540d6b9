"""Commands on a store and images on the Hugging Face Hub."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from fkd_ssl.images import scan
from fkd_ssl.images.shrinking import shrink_set
from tests.commands.test_remote_store import weights
from tests.hub_server import NAME, URL, HubServer, hub

__all__ = ["hub"]  # a fixture


def test_publish_pull_and_train(
    hub: HubServer, work: Path, call: Any, train_line: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The student is that of the folders; the token is in no file, message or log."""
    from huggingface_hub import HfApi

    caplog.set_level(logging.DEBUG)
    published = call(f"publish store {URL}/store")
    assert published.status == 0
    again = call(f"publish store {URL}/store")
    assert "sent 0, 0 bytes" in again.out
    card = hub.files(NAME)["store/README.md"].decode()
    assert f"fkd-ssl pull {URL}/store" in card
    shrink_set(scan("train"), Path("tars"), short_side=0, tars=3)
    HfApi().upload_folder(folder_path="tars", path_in_repo="images", repo_id=NAME, repo_type="dataset")
    hub.read.clear()
    assert call(f"{train_line} --out local").status == 0
    line = train_line.replace("--store store", f"--store {URL}/store").replace("--images train", f"--images {URL}/images/*.tar")
    assert line.count("hf://") == 2
    far = call(f"{line.replace('--workers 0', '--workers 2')} --mix_groups 0 --out far")
    assert far.status == 0, far.err
    local, there = weights("local"), weights("far")
    assert all(torch.equal(local[name], there[name]) for name in local)
    read = [path for path, _ in hub.read if path != "store/files.txt"]
    assert len(read) == len(set(read)) == 8 + 3
    assert call(f"pull {URL}/store --out part --crops 2 --images train").status == 0
    assert call(f"verify part --images {URL}/images/*.tar").status == 0
    said = "".join(one.out + one.err for one in (published, again, far)) + caplog.text
    written = [path for name in ("far", "part") for path in Path(name).rglob("*") if path.is_file()]
    assert not any(b"secret" in path.read_bytes() for path in written)
    assert "secret" not in said + card


def test_a_request_that_is_refused(hub: HubServer, work: Path, call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = call("publish store hf://datasets/me/other")
    assert (missing.status, "create the repository first" in missing.err) == (2, True)
    monkeypatch.setenv("HF_TOKEN", "hf_secret-and-wrong")
    for line in (f"publish store {URL}", f"inspect {URL}", f"verify store --images {URL}/a.tar"):
        answer = call(line)
        assert answer.status in (1, 2)
        assert "Invalid credentials in Authorization header; check the URL, and the credentials in the environm" in answer.err
        assert "secret" not in answer.err
