"""The initial weights of a student, `--init`."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from fkd_ssl import checkpoints
from fkd_ssl.errors import RequestError
from fkd_ssl.options import Named
from fkd_ssl.students import EXPORTED, STUDENT_KEY, Student, load_student, make_backbone
from fkd_ssl.teachers import state_dicts
from fkd_ssl.training.config import TrainConfig
from fkd_ssl.training.monitor import last_checkpoint

_CLASSIFIERS = ("fc", "classifier", "heads", "head", "aux1", "aux2", "AuxLogits")  # layers that a backbone does not have


def initial_weights(config: TrainConfig) -> dict[str, Tensor] | None:
    """Reads the initial weights of the student, by the names of `Student`; None without `init`.

    A run, one of its checkpoints or an exported file also has weights of the heads. A state_dict of torchvision or timm has
    those of the backbone; its classifier is ignored.

    Raises:
        RequestError: The file is missing.
        CheckpointError: The file is not a state_dict, or its keys or shapes are not those of the student's backbone.
    """
    if config.init is None:
        return None
    given = config.init.value if isinstance(config.init, Named) else _read(Path(config.init))
    if isinstance(given, Student):
        return given.state_dict()
    if isinstance(given, nn.Module):
        given = given.state_dict()
    if not isinstance(given, Mapping):
        raise RequestError(f"init {config.init}: expected a file, a torch.nn.Module or a state_dict")
    where = f"init {config.init} for the student {config.student}"
    backbone, _ = make_backbone(config.student, stem=config.stem, width=config.width)
    found = state_dicts.for_network(state_dicts.find(given, where), backbone, where)
    own = backbone.state_dict()
    state_dicts.load_into(
        backbone, {key: value for key, value in found.items() if key in own or key.split(".")[0] not in _CLASSIFIERS}, where
    )
    return {f"backbone.{key}": value for key, value in backbone.state_dict().items()}


def _read(path: Path) -> Student | Mapping[str, Tensor]:
    """Reads a student or a state_dict."""
    if path.is_dir():
        path = last_checkpoint(path)
    if not path.is_file():
        raise RequestError(
            f"--init {path}: not found; give a run folder, a .ckpt of one, a file of fkd-ssl export, or a state_dict of "
            "torchvision or timm"
        )
    saved = checkpoints.load(path)
    loaded = checkpoints.metadata(path) if path.suffix == EXPORTED else saved
    if isinstance(loaded, Mapping) and STUDENT_KEY in loaded:
        return load_student(path)[0]
    return saved if isinstance(saved, Mapping) else {}
