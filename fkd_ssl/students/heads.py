"""Projection heads, which map backbone features to the teacher's dimension; they are dropped after training."""

from collections.abc import Callable

from torch import nn

from fkd_ssl.errors import RequestError, did_you_mean


def mocov2(features: int, dim: int) -> nn.Sequential:
    """Linear, ReLU, Linear: F, F, D (arXiv 2003.04297, section 3)."""
    return nn.Sequential(nn.Linear(features, features), nn.ReLU(inplace=True), nn.Linear(features, dim))


def simreg(features: int, dim: int) -> nn.Sequential:
    """SimReg's four layers F, 2F, F, 2F, D, with BatchNorm and ReLU after layers 1 and 3 (arXiv 2201.05131, section 3).

    These are a projection and a prediction of two layers each, without a non-linearity between them, as in SimReg's code.
    """
    return nn.Sequential(
        nn.Linear(features, 2 * features),
        nn.BatchNorm1d(2 * features),
        nn.ReLU(inplace=True),
        nn.Linear(2 * features, features),
        nn.Linear(features, 2 * features),
        nn.BatchNorm1d(2 * features),
        nn.ReLU(inplace=True),
        nn.Linear(2 * features, dim),
    )


def classifier(features: int, dim: int) -> nn.Sequential:
    """One linear layer to the unnormalised logits of K classes."""
    return nn.Sequential(nn.Linear(features, dim))


CLASSIFIER = "classifier"
HEADS: dict[str, Callable[[int, int], nn.Sequential]] = {"mocov2": mocov2, "simreg": simreg, CLASSIFIER: classifier}


def make_head(name: str, features: int, dim: int) -> nn.Sequential:
    """Makes a head from F to D; raises RequestError if the name is unknown."""
    if name not in HEADS:
        raise RequestError(f"head {name!r} is unknown; expected {', '.join(HEADS)}{did_you_mean(name, HEADS)}")
    return HEADS[name](features, dim)
