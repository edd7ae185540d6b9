"""Loggers by name: where the lines of metrics.csv go beside the file itself."""

from collections.abc import Callable
from pathlib import Path

from pytorch_lightning import loggers as lightning
from pytorch_lightning.loggers import Logger

from fkd_ssl.errors import RequestError

_LOGGERS: dict[str, Callable[[Path], Logger]] = {
    "tensorboard": lambda folder: lightning.TensorBoardLogger(folder, name="", version="tensorboard"),
    "wandb": lambda folder: lightning.WandbLogger(name=folder.name, save_dir=folder, id=None),
    "mlflow": lambda folder: lightning.MLFlowLogger(run_name=folder.name, save_dir=str(folder / "mlruns")),
}


def make_logger(name: str, folder: Path) -> Logger:
    """A logger of Lightning's for a run's folder; raises RequestError where its package is not installed."""
    try:
        return _LOGGERS[name](folder)
    except ModuleNotFoundError as error:
        raise RequestError(f"logger {name}: {error}: pip install 'fkd_ssl[{name}]'") from error
