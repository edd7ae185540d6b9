"""metrics.csv: written whole, and read back."""

from pathlib import Path
from typing import Any

import pytest
import torch

from fkd_ssl.training.recorder import FIELDS, Recorder, read_metrics


def test_an_empty_cell_is_none(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("step,loss,knn_top1\n4,2.5,\n4,,50.0\n")
    assert read_metrics(tmp_path / "metrics.csv") == [
        {"step": 4, "loss": 2.5, "knn_top1": None},
        {"step": 4, "loss": None, "knn_top1": 50.0},
    ]


def test_a_state_is_continued_and_later_lines_are_forgotten(tmp_path: Path) -> None:
    def make() -> Recorder:
        return Recorder(tmp_path / "metrics.csv", every=2, batch_size=8, images=16)

    first = make()
    first.seconds, first.waited = 3.0, 1.0
    first._lines = [dict.fromkeys(FIELDS, 1)]
    first._sums = torch.tensor([5.0, 4.0, 2.0])
    first._write()
    state: dict[str, Any] = first.state_dict()
    second = make()
    second.load_state_dict(state)
    assert (second.seconds, second.waited) == (3.0, 1.0)
    assert second._sums.tolist() == [5.0, 4.0, 2.0]
    second._write()
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.csv")] == [1.0]


def test_the_header_is_what_the_design_promises(tmp_path: Path) -> None:
    Recorder(tmp_path / "metrics.csv", every=2, batch_size=8, images=16)._write()
    assert (tmp_path / "metrics.csv").read_text() == "step,epoch,crops,seconds,loss,kl,lr,wait,knn_top1\n"
    assert read_metrics(tmp_path / "metrics.csv") == []


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"metrics\.csv"):
        read_metrics(tmp_path / "metrics.csv")
