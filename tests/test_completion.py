"""Completion in a shell, as argcomplete asks for it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("argcomplete")


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("fkd-ssl pre", {"pretrain", "precompute"}),
        ("fkd-ssl train --teacher", {"--teacher", "--teacher_weights", "--teacher_pixels", "--teacher_precision"}),
        ("fkd-ssl train --targets ", {"stored", "online", "labels", "relabel"}),
        ("fkd-ssl verify --no", {"--no_repair", "--no_json"}),
    ],
)
def test_verbs_options_and_choices_are_completed(line: str, found: set[str], tmp_path: Path) -> None:
    answer = tmp_path / "answer"
    asked = {"_ARGCOMPLETE": "1", "COMP_LINE": line, "COMP_POINT": str(len(line)), "_ARGCOMPLETE_STDOUT_FILENAME": str(answer)}
    subprocess.run([sys.executable, "-m", "fkd_ssl"], env={**os.environ, **asked}, check=True, timeout=60)
    assert {word.strip() for word in answer.read_text().split("\013")} == found
