from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from fkd_ssl.errors import CheckpointError
from fkd_ssl.teachers import load_teacher

STD = (0.228, 0.224, 0.225)


@pytest.mark.parametrize(("width", "batch_norm", "prefix"), [(1, True, "module."), (2, False, "")])
def test_embedding_is_the_forward_written_out(
    width: int, batch_norm: bool, prefix: str, kit: SimpleNamespace, crops: Any, write: Any
) -> None:
    state = kit.fill(kit.swav(width=width, batch_norm=batch_norm, prefix=prefix))
    teacher = load_teacher("swav", checkpoint=write(state))
    torch.testing.assert_close(teacher.embed(crops).double(), kit.swav_target(state, crops, prefix), rtol=0, atol=1e-5)
    wide = "" if width == 1 else f"w{width}"
    words = " with BatchNorm" if batch_norm else ""
    assert teacher.info.network == f"resnet18{wide}, MLP {512 * width}-96-128{words}, 30 prototypes"
    assert (teacher.info.spec.size, teacher.feature_dim, teacher.info.std) == (128, 512 * width, STD)
    prototypes = teacher.info.arrays["prototypes"]
    assert prototypes.dtype == np.float32
    np.testing.assert_array_equal(prototypes, state[f"{prefix}prototypes.weight"].numpy())


def test_mocos_layout_is_refused_and_named(kit: SimpleNamespace, write: Any) -> None:
    with pytest.raises(CheckpointError, match=r"not SwAV's layout.*looks like MoCo's: pass --teacher mocov2"):
        load_teacher("swav", checkpoint=write(kit.hollow(kit.moco())))


def test_a_bare_resnet_is_not_taken_without_its_head(kit: SimpleNamespace, write: Any) -> None:
    with pytest.raises(CheckpointError, match=r"not SwAV's layout: no key projection_head\.\*"):
        load_teacher("swav", checkpoint=write(kit.hollow(kit.body("resnet18"))))


def test_several_sets_of_prototypes_are_refused(kit: SimpleNamespace, write: Any) -> None:
    shapes = kit.swav()
    del shapes["module.prototypes.weight"]
    shapes |= {f"module.prototypes.prototypes{k}.weight": (30, 128) for k in range(3)}
    with pytest.raises(CheckpointError, match=r"several sets of prototypes, like DeepCluster-v2 and SeLa-v2"):
        load_teacher("swav", checkpoint=write(kit.hollow(shapes)))


@pytest.mark.parametrize(
    ("key", "shape", "message"),
    [
        ("prototypes.weight", (30, 64), r"prototypes\.weight \[30, 64\], expected floats \[K, 128\]"),
        ("prototypes.bias", (30,), r"1 unexpected \(prototypes\.bias\)"),
        ("projection_head.1.running_var", (95,), r"projection_head: .*1\.running_var float32 \[95\], expected float32 \[96\]"),
        ("fc.weight", (1000, 512), r"1 unexpected \(fc\.weight\)"),
    ],
)
def test_keys_that_do_not_fit_are_named(
    key: str, shape: tuple[int, ...], message: str, kit: SimpleNamespace, write: Any
) -> None:
    with pytest.raises(CheckpointError, match=message):
        load_teacher("swav", checkpoint=write(kit.hollow({**kit.swav(), f"module.{key}": shape})))


def test_prototypes_that_no_student_can_predict_are_refused(kit: SimpleNamespace, write: Any) -> None:
    with pytest.raises(CheckpointError, match=r"prototypes\.weight \[0, 128\], expected floats \[K, 128\]"):
        load_teacher("swav", checkpoint=write(kit.hollow(kit.swav(prototypes=0))))
    state = kit.hollow(kit.swav())
    state["module.prototypes.weight"] = torch.full((30, 128), torch.nan)
    with pytest.raises(CheckpointError, match="its prototypes hold NaN or infinity"):
        load_teacher("swav", checkpoint=write(state))
