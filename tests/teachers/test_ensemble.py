"""Ensembles: the mean of several classifiers' probabilities."""

from typing import Any

import pytest
import torch
from torch import nn

from fkd_ssl.errors import RequestError
from fkd_ssl.teachers import Ensemble, Teacher
from fkd_ssl.teachers.dense import DenseTeacher


def classifier(name: str, seed: int, **about: Any) -> Teacher:
    torch.manual_seed(seed)
    dim = about.pop("dim", 5)
    backbone = nn.Sequential(nn.Conv2d(3, 6, 5), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    usual = {"pixels": 32, "kind": "distribution", "licence": "mine", "checkpoint": f"{name}.pth", "checkpoint_sha256": name}
    return Teacher(
        backbone,
        nn.Linear(6, dim),
        name=name,
        shape=(dim,),
        feature_dim=6,
        network=f"net {name}",
        source=name,
        **{**usual, **about},
    )


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_it_is_the_mean_of_the_members_with_their_own_preprocessing(images: torch.Tensor) -> None:
    a, b = classifier("a", 0), classifier("b", 1, mean=(0.5, 0.5, 0.5), std=(0.2, 0.3, 0.4), licence="theirs")
    ensemble = Ensemble([a, b])
    expected = torch.zeros(4, 5)
    for teacher in (a, b):
        floats = (images / 255 - torch.tensor(teacher.info.mean).view(3, 1, 1)) / torch.tensor(teacher.info.std).view(3, 1, 1)
        logits = teacher.head(teacher.backbone(floats))
        expected += (logits.exp() / logits.exp().sum(dim=1, keepdim=True)) / 2
    found = ensemble.embed(images)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.sum(dim=1), torch.ones(4))
    assert (ensemble.info.name, ensemble.info.spec.size, ensemble.info.spec.kind, ensemble.info.pixels) == (
        "a-and-b",
        5,
        "distribution",
        32,
    )
    assert (ensemble.info.mean, ensemble.info.std) == ((0, 0, 0), (1, 1, 1))  # crops come as they are
    assert ensemble.info.network == "mean probabilities of: net a; net b"
    assert (ensemble.info.licence, ensemble.info.source, ensemble.info.checkpoint) == ("mine; theirs", "a + b", "a.pth + b.pth")
    assert ensemble.features(images).shape == (4, ensemble.feature_dim) == (4, 12)


def test_what_members_have_in_common_it_has() -> None:
    ensemble = Ensemble([classifier("a", 0), classifier("b", 1)])
    assert ensemble.info.mean == classifier("a", 0).info.mean
    assert ensemble.info.licence == "mine"
    assert ensemble.info.checkpoint_sha256 != Ensemble([classifier("b", 1), classifier("a", 0)]).info.checkpoint_sha256
    assert len(str(ensemble.info.checkpoint_sha256)) == 64
    assert Ensemble([classifier("a", 0), classifier("b", 1, checkpoint_sha256=None)]).info.checkpoint_sha256 is None


@pytest.mark.parametrize(
    ("about", "message"),
    [
        (
            {"kind": "embedding"},
            r"teacher a \+ b: b gives embeddings, and only class probabilities can be averaged; separate the teachers",
        ),
        ({"dim": 4}, r"teacher a \+ b: a has 5 classes, b has 4; the teachers of an ensemble must have the same"),
        ({"pixels": 64}, r"a sees 32 px and b 64 px; store a column of each with --codec full .* fkd-ssl recode --column A,B"),
    ],
)
def test_what_has_no_mean_is_refused(about: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        Ensemble([classifier("a", 0), classifier("b", 1, **about)])


def test_it_has_no_logits_at_each_place() -> None:
    with pytest.raises(RequestError, match=r"teacher a-and-b: .* label maps need a network that ends in global average"):
        DenseTeacher(Ensemble([classifier("a", 0), classifier("b", 1)]))
