"""export through the command line, and loading of its files."""

from pathlib import Path
from typing import Any

import pytest


def test_a_run_is_exported_scored_and_started_from(work: Path, call: Any, train_line: str) -> None:
    assert call(f"{train_line} --out run --ema 0.5").status == 0
    status, out, err = call("export --model run --out student.safetensors")
    assert status == 0
    assert out.startswith("model = torchvision.models.squeezenet1_1(); ")
    assert "student.safetensors: load it, for normalised floats [B, 3, 32, 32], with" in err
    scores = [
        call(f"knn --model {model} --train train --val val --k 3 --workers 0").out for model in ("run", "student.safetensors")
    ]
    assert scores[0].partition(":")[2] == scores[1].partition(":")[2] != ""
    status, _, err = call(f"{train_line} --out second --init student.safetensors")
    assert status == 0
    assert "| started from | student.safetensors |" in (work / "second/README.md").read_text()


def test_what_cannot_be_is_refused(work: Path, call: Any, train_line: str) -> None:
    assert call(f"{train_line} --out run").status == 0
    for line, said in (
        ("export --model nowhere --out f.safetensors", "--model nowhere: no such run or checkpoint"),
        ("export --model nowhere --out no/f.safetensors", "no/f.safetensors: the folder no was not found; make it, or choose"),
        ("export --model nowhere --out no/f.onnx", "no/f.onnx: the folder no was not found; make it, or choose another --out"),
        ("export --model run --out f.safetensors --layout timm", "timm has no network identical to squeezenet1_1"),
        (f"{train_line} --out other --init nowhere", "--init nowhere: not found; give a run folder"),
        (f"{train_line} --out other --init run --student resnet18", "init: these weights are not those of resnet18"),
    ):
        status, out, err = call(line.replace("--student squeezenet1_1 ", "") if "resnet18" in line else line)
        assert (status, out) == (2, "")
        assert said in err
        assert not (work / "other").exists()


def test_the_card_says_what_was_trained_from_what(work: Path, call: Any, train_line: str) -> None:
    assert call(f"{train_line} --out run --val val --knn_k 3 --objective feature_kl+0.5*relational").status == 0
    text = (work / "run/README.md").read_text()
    for line in (
        "# squeezenet1_1, distilled from make",
        "| source | own_teacher:make |",
        "| licence | not stated |",
        "| recipe | mocov2 |",
        "| crops per image | 4 |",
        "| objective | feature_kl+0.5*relational |",
        "kNN-3 top-1, at the end",
        'student, pixels = fkd_ssl.load_student("run/checkpoints/last.ckpt")',
    ):
        assert line in text, line
    assert "| sha256 of column make | " in text
    assert str(work) not in text


def test_the_card_of_an_online_run(work: Path, call: Any, train_line: str) -> None:
    line = train_line.replace("--store store ", "")
    assert call(f"{line} --out run --targets online --teacher own_teacher:make --recipe s2bnn").status == 0
    text = (work / "run/README.md").read_text()
    assert "| drawn | anew for every batch |" in text
    assert "| recipe | s2bnn |" in text
    assert "| none yet | `fkd-ssl knn` and `fkd-ssl linear` score it |" in text


def test_a_run_is_exported_to_onnx(work: Path, call: Any, train_line: str) -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    assert call(f"{train_line} --out run").status == 0
    status, out, err = call("export --model run --out student.onnx --pixels 64")
    assert status == 0
    assert out == 'features, map = onnxruntime.InferenceSession("student.onnx").run(None, {"images": images})\n'
    assert "student.onnx: ONNX opset 18; run it, for uint8 RGB [B, 3, 64, 64], with" in err
    for line, said in (
        ("export --model run --out s.onnx --layout timm", "--layout is for .safetensors"),
        ("export --model run --out s.safetensors --pixels 64", "--pixels is for .onnx"),
        ("export --model run --out s.onnx --pixels 0", "--pixels 0: must be between 1 and 4096"),
        ("export --model run --out s.pt", "expected a .safetensors or .onnx file; write --out s.safetensors"),
    ):
        status, out, err = call(line)
        assert (status, out) == (2, "")
        assert said in err
