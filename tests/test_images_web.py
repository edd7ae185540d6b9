"""Tars on a web server."""

from pathlib import Path

import pytest

from fkd_ssl import fetching
from fkd_ssl.errors import FetchError, ImageAccessError, RequestError
from fkd_ssl.images import open_images, scan
from tests.test_images_shards import contents, write_tar
from tests.web_server import serving

pytest.importorskip("requests", reason="pip install 'fkd_ssl[remote]'")


def test_tars_of_a_web_server(image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FKD_SSL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(fetching, "PAUSE", 0.001)
    named = list(contents(scan(image_folder)).items())
    (tmp_path / "web").mkdir()
    for k in range(3):
        write_tar(tmp_path / "web" / f"{k}.tar", dict(named[8 * k : 8 * k + 8]))
    with serving(tmp_path / "web") as server:
        server.harms["1.tar"] = ["drop", "500", "cut"]
        source = open_images(f"{server.url}/{{0..2}}.tar")
        assert source.digest() == scan(image_folder).digest()
        assert source.mix_groups == 16
        server.requests.clear()
        assert open_images(f"{server.url}/{{0..2}}.tar").digest() == source.digest()
        assert {span for _, span in server.requests} == {"bytes=0-0"}  # only sizes and versions
        with pytest.raises(RequestError, match=r"a web server does not list its files; name them, for instance with \{000"):
            open_images(f"{server.url}/*.tar")
        with pytest.raises(ImageAccessError, match=r"/9\.tar: not found; check the URL"):
            open_images(f"{server.url}/9.tar")
        server.always["0.tar"] = "endless"
        with pytest.raises(RequestError, match=r"0\.tar: not a file of a known size"):
            open_images(f"{server.url}/0.tar")
        server.always["0.tar"] = "403"
        with pytest.raises(FetchError, match=r"0\.tar: status 403: Forbidden; check the URL, and the credentials"):
            open_images(f"{server.url}/0.tar")
