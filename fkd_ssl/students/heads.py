"""Projection heads: from a backbone's features to the teacher's dimension; they are dropped after training."""

from collections.abc import Callable

from torch import nn

from fkd_ssl.errors import RequestError, did_you_mean


def mocov2(features: int, dim: int) -> nn.Sequential:
    """Linear, ReLU, Linear: F, F, D (arXiv 2003.04297, section 3)."""
    return nn.Sequential(nn.Linear(features, features), nn.ReLU(inplace=True), nn.Linear(features, dim))


def simreg(features: int, dim: int) -> nn.Sequential:
    """SimReg's four layers F, 2F, F, 2F, D, BatchNorm and ReLU after the first and the third (arXiv 2201.05131, section 3).

    Its projection and its prediction of two layers each meet without a non-linearity, as in its code.
    """
    return nn.Sequential(
        nn.Linear(features, 2 * features), nn.BatchNorm1d(2 * features), nn.ReLU(inplace=True),
        nn.Linear(2 * features, features),
        nn.Linear(features, 2 * features), nn.BatchNorm1d(2 * features), nn.ReLU(inplace=True),
        nn.Linear(2 * features, dim),
    )  # fmt: skip


def classifier(features: int, dim: int) -> nn.Sequential:
    """One linear layer to the logits of K classes, which stay as long as they are."""
    return nn.Sequential(nn.Linear(features, dim))


CLASSIFIER = "classifier"
HEADS: dict[str, Callable[[int, int], nn.Sequential]] = {"mocov2": mocov2, "simreg": simreg, CLASSIFIER: classifier}


def make_head(name: str, features: int, dim: int) -> nn.Sequential:
    """A head, F to D; raises RequestError where there is none of that name."""
    if name not in HEADS:
        raise RequestError(f"head {name!r} is unknown; there are {', '.join(HEADS)}{did_you_mean(name, HEADS)}")
    return HEADS[name](features, dim)
