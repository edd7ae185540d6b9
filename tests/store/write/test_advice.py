from typing import Any

import pytest

from fkd_ssl.errors import RequestError
from fkd_ssl.store.maintain.recode import recode
from fkd_ssl.store.write import advice
from fkd_ssl.targets import TargetSpec


@pytest.mark.parametrize(
    ("dim", "codec"), [(128, "SQ8"), (128, "Flat"), (512, "SQ8"), (2048, "OPQ16,PQ16x8"), (2048, "PCA256,SQ8"), (1024, "SQ4")]
)
def test_small_codes_need_no_advice(dim: int, codec: str) -> None:
    assert advice.on_size(TargetSpec("embedding", (dim,)), codec, 10**9) is None


@pytest.mark.parametrize(
    ("dim", "codec", "size", "whole"),
    [
        (2048, "SQ8", 2048, "1.1 TB"),
        (8192, "SQ8", 8192, "4.2 TB"),
        (513, "SQ8", 513, "273.1 GB"),
        (512, "Flat", 2048, "1.1 TB"),
    ],
)
def test_large_ones_are_told_with_what_would_be_smaller(dim: int, codec: str, size: int, whole: str) -> None:
    """ImageNet's 1,281,167 images x 400 crops; a record is 20 bytes."""
    crops = 1_281_167 * 400
    said = advice.on_size(TargetSpec("embedding", (dim,)), codec, crops)
    assert said is not None
    assert f"D = {dim} take {size} bytes per crop ({whole} in all) in {codec};" in said
    assert "--codec RR256,SQ8 (random projection) or PCA256,SQ8 takes 256 bytes per crop (141.4 GB in all)" in said


def test_precompute_says_it(make_store: Any, tiny_teacher: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    make_store(tmp_path / "small", log=lines.append)
    assert not [line for line in lines if line.startswith("note: targets of D")]
    monkeypatch.setattr(advice, "on_size", lambda target, codec, crops: f"advice on {target} {codec} {crops}")
    make_store(tmp_path / "store", codec="SQ8", log=lines.append)
    assert "advice on D = 16 SQ8 96" in lines


def test_a_codec_that_cannot_be_is_refused() -> None:
    with pytest.raises(RequestError, match=r"codec 'SQ9': not supported"):
        advice.on_size(TargetSpec("embedding", (2048,)), "SQ9", 1)


@pytest.mark.parametrize("codec", ["OPQ16,PQ16x8", "SQ8"])
def test_the_codecs_of_tokens_are_listed_with_their_bytes(codec: str) -> None:
    assert advice.on_size(TargetSpec("tokens", (7, 7, 384)), codec, 10**6) == (
        "note: 7 x 7 tokens, D = 384: bytes per crop (in all) by codec: Flat 75,264 (75.3 GB), SQ8 18,816 (18.8 GB), "
        f"SQ4 9,408 (9.4 GB), OPQ16,PQ16x8 784 (804.0 MB); this column is in {codec}"
    )


def test_a_codec_that_loses_much_is_warned_of(make_store: Any, tiny_teacher: Any, tmp_path: Any) -> None:
    """The warning has the measured cosine of the smallest codec that is better; other columns get none."""
    lines: list[str] = []
    store = make_store(tmp_path / "low", codec="PCA4,SQ8", log=lines.append)
    kept = store.column().meta.fidelity["cosine_mean"]
    assert 0.5 < kept < 0.9
    high = make_store(tmp_path / "high", codec="SQ8", log=lines.append)
    better = high.column().meta.fidelity["cosine_mean"]
    assert [line for line in lines if line.startswith("warning: ")] == [loss_warning(kept, better)]


def test_recode_warns_of_a_codec_that_loses_much(make_store: Any, tiny_teacher: Any, tmp_path: Any) -> None:
    lines: list[str] = []
    store = make_store(tmp_path / "store", codec="SQfp16")
    columns = [recode(store, codec, column="tiny", log=lines.append) for codec in ("SQ8", "PCA4,SQ8")]
    better, kept = (column.meta.fidelity["cosine_mean"] for column in columns)
    assert lines == [loss_warning(kept, better)]


def loss_warning(kept: float, better: float) -> str:
    """The warning for PCA4,SQ8, which is not good enough, where SQ8 is."""
    return (
        "warning: tiny: in PCA4,SQ8, with 4 bytes per crop, the mean cosine of decoded to original embeddings is only "
        f"{kept:.3f}; in SQ8, with 16 bytes, it is {better:.3f}. To store that instead, stop now, and repeat the command with "
        "--codec SQ8 and another store or column"
    )
