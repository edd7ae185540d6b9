"""The notebooks of examples/ run: their code cells in order, in one namespace, as Jupyter runs them."""

import ast
import json
from pathlib import Path
from typing import Any

import pytest
import torch

NOTEBOOKS = sorted((Path(__file__).parents[2] / "examples").rglob("*.ipynb"))


def run(notebook: Path) -> list[Any]:
    """Runs the code cells of a notebook; returns what each cell displays, the value of its last expression."""
    names: dict[str, Any] = {"__name__": "__main__"}
    shown = []
    for cell in json.loads(notebook.read_text())["cells"]:
        if cell["cell_type"] != "code":
            continue
        assert cell["outputs"] == []
        tree = ast.parse("".join(cell["source"]))
        last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, str(notebook), "exec"), names)  # noqa: S102
        if isinstance(last, ast.Expr):
            shown.append(eval(compile(ast.Expression(last.value), str(notebook), "eval"), names))  # noqa: S307
    return shown


def test_there_is_one() -> None:
    assert [path.name for path in NOTEBOOKS] == ["quickstart.ipynb"]


@pytest.mark.slow
def test_the_quickstart_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    _, teacher, _, sheet, trained, student, linear, nearest, shapes, exported, features = run(NOTEBOOKS[0])
    assert teacher.top1 > 70
    assert teacher.baselines
    assert sheet._repr_png_().startswith(b"\x89PNG")
    assert trained.knn_top1 == student.top1
    assert student.top1 > max(student.baselines.values()) + 15
    assert linear.top1 > 50
    assert len(nearest.nearest) == 6
    assert shapes["images"][-2:] == (48, 48)
    assert exported.out == Path("quickstart/student.safetensors")
    assert features == (1, 128)
