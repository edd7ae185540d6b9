"""Fast knowledge distillation of self-supervised teachers into small models.

Importing this package is fast: its names are imported when they are first used (PEP 562).
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_MODULES = {"crops", "data", "errors", "eval", "images", "objectives", "results", "store", "students", "teachers", "training"}
_VERBS = (
    "compare",
    "export",
    "features",
    "knn",
    "linear",
    "precompute",
    "publish",
    "pull",
    "retrieve",
    "segment",
    "show",
    "train",
    "verify",
)
_NAMES = {
    **dict.fromkeys(_VERBS, "fkd_ssl.api"),
    "open_store": "fkd_ssl.store",
    "replay": "fkd_ssl.crops",
    "StoredCrops": "fkd_ssl.data",
    "load_student": "fkd_ssl.students",
}

if TYPE_CHECKING:
    from fkd_ssl.api import compare as compare
    from fkd_ssl.api import export as export
    from fkd_ssl.api import features as features
    from fkd_ssl.api import knn as knn
    from fkd_ssl.api import linear as linear
    from fkd_ssl.api import precompute as precompute
    from fkd_ssl.api import publish as publish
    from fkd_ssl.api import pull as pull
    from fkd_ssl.api import retrieve as retrieve
    from fkd_ssl.api import segment as segment
    from fkd_ssl.api import show as show
    from fkd_ssl.api import train as train
    from fkd_ssl.api import verify as verify
    from fkd_ssl.crops.replay import replay as replay
    from fkd_ssl.data import StoredCrops as StoredCrops
    from fkd_ssl.store import open_store as open_store
    from fkd_ssl.students import load_student as load_student


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"fkd_ssl.{name}")
    if name in _NAMES:
        return getattr(importlib.import_module(_NAMES[name]), name)
    raise AttributeError(f"module 'fkd_ssl' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES, *_NAMES})
