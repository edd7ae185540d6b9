"""Evaluation of any callable that maps crops to features: kNN, linear probes, retrieval, and intervals of differences.

Names are loaded when they are first used (PEP 562), so that `--help` does not load faiss and the probes.
"""

import importlib
from typing import TYPE_CHECKING, Any

_MODULES = {
    "baselines",
    "cache",
    "features",
    "grids",
    "held_out",
    "indexes",
    "iou",
    "knn",
    "linear",
    "logreg",
    "maps",
    "masks",
    "online",
    "retrieval",
    "scores",
    "search",
    "segmentation",
    "stats",
    "sweep",
}
_NAMES = {
    "extract": "fkd_ssl.eval.features",
    "knn_predict": "fkd_ssl.eval.knn",
    "more_seeds": "fkd_ssl.eval.stats",
    "OnlineKNN": "fkd_ssl.eval.online",
    "OnlineLinear": "fkd_ssl.eval.online",
    "paired_bootstrap": "fkd_ssl.eval.stats",
    "wilson": "fkd_ssl.eval.stats",
}

if TYPE_CHECKING:
    from fkd_ssl.eval.features import extract as extract
    from fkd_ssl.eval.knn import knn_predict as knn_predict
    from fkd_ssl.eval.online import OnlineKNN as OnlineKNN
    from fkd_ssl.eval.online import OnlineLinear as OnlineLinear
    from fkd_ssl.eval.stats import more_seeds as more_seeds
    from fkd_ssl.eval.stats import paired_bootstrap as paired_bootstrap
    from fkd_ssl.eval.stats import wilson as wilson


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"fkd_ssl.eval.{name}")
    if name in _NAMES:
        return getattr(importlib.import_module(_NAMES[name]), name)
    raise AttributeError(f"module 'fkd_ssl.eval' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES, *_NAMES})
