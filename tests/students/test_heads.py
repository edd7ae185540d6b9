"""Projection heads, against NumPy."""

import numpy as np
import pytest
import torch

from fkd_ssl.students import Student, make_head


def test_mocov2s_has_two_layers() -> None:
    head = make_head("mocov2", 6, 3).double()
    w = {key: value.numpy() for key, value in head.state_dict().items()}
    x = np.random.default_rng(0).normal(size=(5, 6))
    hidden = np.maximum(x @ w["0.weight"].T + w["0.bias"], 0)
    np.testing.assert_allclose(head(torch.from_numpy(x)).detach(), hidden @ w["2.weight"].T + w["2.bias"], rtol=1e-10)


def test_simregs_has_four_layers_with_batch_norm() -> None:
    head = make_head("simreg", 6, 3).double()
    w = {key: value.numpy() for key, value in head.state_dict().items()}
    assert [w[f"{k}.weight"].shape for k in (0, 3, 4, 7)] == [(12, 6), (6, 12), (12, 6), (3, 12)]
    x = np.random.default_rng(0).normal(size=(5, 6))

    def normalised(y: np.ndarray) -> np.ndarray:
        return np.maximum((y - y.mean(axis=0)) / np.sqrt(y.var(axis=0) + 1e-5), 0)

    y = normalised(x @ w["0.weight"].T + w["0.bias"]) @ w["3.weight"].T + w["3.bias"]
    y = normalised(y @ w["4.weight"].T + w["4.bias"]) @ w["7.weight"].T + w["7.bias"]
    np.testing.assert_allclose(head(torch.from_numpy(x)).detach(), y, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("head", ["mocov2", "simreg"])
def test_a_student_has_one_for_each_teacher(head: str) -> None:
    student = Student("squeezenet1_1", 8, 24, head=head)
    assert student.dims == [8, 24]
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    assert [tuple(e.shape) for e in student.embeddings(images)] == [(3, 8), (3, 24)]


def test_a_student_says_what_makes_it_again() -> None:
    assert Student("squeezenet1_1", 8).spec == {"name": "squeezenet1_1"}
    narrow = Student("reactnet", 8, head="simreg", stem="small", width=0.25)
    assert narrow.spec == {"name": "reactnet", "head": "simreg", "stem": "small", "width": 0.25}
    name, *options = narrow.spec
    again = Student(narrow.spec[name], 8, **{key: narrow.spec[key] for key in options})
    again.load_state_dict(narrow.state_dict())
