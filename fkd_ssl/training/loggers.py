"""Loggers by name; they also receive the lines of metrics.csv."""

import os
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from pytorch_lightning import loggers as lightning
from pytorch_lightning.loggers import Logger

from fkd_ssl.errors import RequestError

_LOGGERS: dict[str, Callable[[Path], Logger]] = {
    "tensorboard": lambda folder: lightning.TensorBoardLogger(folder, name="", version="tensorboard"),
    "wandb": lambda folder: lightning.WandbLogger(name=folder.name, save_dir=folder),
    # a local database, since MLflow no longer accepts folders, or the server in the environment variable
    "mlflow": lambda folder: lightning.MLFlowLogger(
        run_name=folder.name,
        tracking_uri=os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{folder.resolve()}/mlflow.db",
        artifact_location=None if "MLFLOW_TRACKING_URI" in os.environ else str(folder.resolve() / "mlartifacts"),
    ),
}


def check_logger(name: str) -> None:
    """Raises RequestError if the package of a logger is not installed; it has the same name as the logger."""
    if find_spec(name) is None:
        raise RequestError(f"logger {name}: {name} is not installed: pip install 'fkd_ssl[{name}]'")


def make_logger(name: str, folder: Path) -> Logger:
    """Makes Lightning's logger `name` for a run folder."""
    return _LOGGERS[name](folder)
