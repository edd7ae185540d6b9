"""Turns names on the command line into networks."""

import copy
import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from fkd_ssl import processes
from fkd_ssl.crops import IMPORTED, RECIPES, Recipe
from fkd_ssl.crops.replay import describe_implementation
from fkd_ssl.errors import FkdError, RequestError, did_you_mean
from fkd_ssl.files import sha256
from fkd_ssl.options import OBJECT, Named
from fkd_ssl.students import CLASSIFIER, EXPORTED, MEAN, STD, Student, load_student
from fkd_ssl.targets import Precision
from fkd_ssl.teachers import Ensemble, Teacher, load_teacher
from fkd_ssl.teachers.own import of_object
from fkd_ssl.teachers.registry import LIBRARIES
from fkd_ssl.teachers.state_dicts import tensors_digest, weights_digest
from fkd_ssl.teachers.tokens import as_tokens, set_grid, split_name
from fkd_ssl.training.groups import checkpoints_of, split
from fkd_ssl.training.monitor import last_checkpoint

RUN = "run"
"""Value of --teacher for a student of `fkd-ssl train`, with its head."""
_PIXELS = 224  # side of the crops of a student that was given as an object


@dataclass(frozen=True, kw_only=True)
class Model:
    """A network to evaluate."""

    name: str
    features: Callable[[Tensor], Tensor]
    """Maps uint8 images [B, 3, P, P] to backbone features [B, F]."""
    map: Callable[[Tensor], Tensor]
    """Maps uint8 images [B, 3, H, W] to the backbone's last map, float32 [B, h, w, F]."""
    pixels: int
    """Side of the images that it was trained at."""
    network: nn.Module
    """The network that `features` runs, in eval mode."""
    details: dict[str, str | None]
    """Entry in results.json: the network, the sha256 of its weights, and a teacher's checkpoint and licence."""

    @property
    def identity(self) -> str:
        """Identifies its features: weights, mean and std, layers and their settings, precision."""
        precision = getattr(self.network, "precision", "fp32")
        saved = self.network.state_dict()  # weights_sha256 covers these, but not mean and std, which are non-persistent buffers
        buffers = {name: value for name, value in self.network.named_buffers() if name not in saved}
        return sha256(f"{self.details['weights_sha256']} {tensors_digest(buffers)} {precision}\n{self.network}".encode())


def device() -> torch.device:
    """The GPU if available, otherwise the CPU; under torchrun the processes of a machine use different GPUs if possible."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", processes.number("LOCAL_RANK", 0) % torch.cuda.device_count())


def describe_machine(*, device_crops: bool = False) -> str:
    """Describes what runs the networks and what makes the crops."""
    where = device()
    name = "on cpu: no CUDA device" if where.type == "cpu" else f"on {where}: {torch.cuda.get_device_name(where)}"
    return f"{name}; {f'crops on {where.type}' if device_crops else describe_implementation()}"


def cpu_threads() -> int:
    """Number of processors that this process may use; under torchrun its share of them."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, count // processes.number("LOCAL_WORLD_SIZE", 1))


def pixels_of(asked: int | None, default: int) -> int:
    """The side of an evaluation's crops; raises RequestError if the requested side is invalid."""
    if asked is not None and not 1 <= asked <= 4096:
        raise RequestError(f"--pixels {asked}: must be between 1 and 4096")
    return default if asked is None else asked


def recipe_of(name: str, min_scale: float | None = None, max_scale: float | None = None) -> Recipe:
    """A recipe by name, optionally with another scale; raises RequestError if the name is unknown."""
    if name == IMPORTED.name:  # the recipe of stores made by import-fkd
        return IMPORTED
    if name not in RECIPES:
        raise RequestError(f"--recipe {name!r} is unknown; expected {', '.join(RECIPES)}{did_you_mean(name, RECIPES)}")
    recipe = RECIPES[name]
    low, high = recipe.scale
    return replace(recipe, scale=(low if min_scale is None else min_scale, high if max_scale is None else max_scale))


def teacher_of(name: str, checkpoint: str | None, precision: Precision = "fp32", grid: int | None = None) -> Teacher:
    """Loads a teacher onto `device()`: `run`, a teacher of fkd_ssl.teachers.load_teacher, or the mean A+B of two.

    Raises:
        RequestError: `load_teacher` raises it, or the checkpoints of A+B are not given as F+G.
    """
    return load_each([(name, checkpoint)], precision, grid)[0]


def load_each(asked: Sequence[tuple[str, str | None]], precision: Precision, grid: int | None) -> list[Teacher]:
    """Loads teachers with their checkpoints as `teacher_of`. NAME and NAME@tokens share the network, which is loaded once."""
    loaded: dict[tuple[str, str | None], Teacher] = {}
    teachers = []
    for name, checkpoint in asked:
        base, tokens = (name, False) if isinstance(name, Named) else split_name(name)
        if (base, checkpoint) not in loaded:
            loaded[base, checkpoint] = _load(base, checkpoint, precision).to(device())
        teacher = loaded[base, checkpoint]
        teachers.append(as_tokens(teacher) if tokens else teacher)
    set_grid(teachers, grid)
    return teachers


def _load(name: str, checkpoint: str | None, precision: Precision) -> Teacher:
    if isinstance(name, Named):
        return _object_teacher(name, checkpoint, precision)
    names = [part.strip() for part in name.split("+")]
    if len(names) == 1:
        return _one_teacher(name, checkpoint, precision)
    files = [None] * len(names) if checkpoint is None else [part.strip() or None for part in checkpoint.split("+")]
    if "" in names or len(files) != len(names):
        raise RequestError(
            f"teacher {name}, checkpoint {checkpoint}: expected A+B and a checkpoint for each, F+G; leave one "
            "empty if its teacher needs none"
        )
    return Ensemble([_one_teacher(one, file, precision) for one, file in zip(names, files, strict=True)])


def teachers_of(names: str, checkpoints: str | None, precision: Precision = "fp32", grid: int | None = None) -> list[Teacher]:
    """Loads the teachers A,B with their checkpoints F,G; a second teacher of the same name gets the suffix -2.

    Raises:
        RequestError: `teacher_of` raises it, or a teacher is given twice with the same checkpoint.
    """
    asked = list(zip(split(names), checkpoints_of(names, checkpoints), strict=True))
    if len(set(asked)) < len(asked):
        raise RequestError(f"teacher {names}: a teacher is named twice")
    teachers = load_each(asked, precision, grid)
    taken: Counter[str] = Counter()
    for teacher in teachers:
        name = teacher.info.name
        taken[name] += 1
        if taken[name] > 1:
            teacher.info = replace(teacher.info, name=f"{name}-{taken[name]}")
    return teachers


def compile_teachers(teachers: Sequence[Teacher], sides: Sequence[int], crops: int) -> None:
    """Compiles the networks of teachers for batches of `crops` crops; raises RequestError if torch.compile fails."""
    for teacher, side in zip(teachers, sides, strict=True):
        teacher.compile()
        try:
            teacher.embed(torch.zeros(crops, 3, side, side, dtype=torch.uint8).contiguous(memory_format=torch.channels_last))
        except FkdError as error:
            reason = " ".join(str(error.__cause__ or error).splitlines()[:2])  # the second line has the compiler's error
            raise RequestError(f"--compile: teacher {teacher.info.name}: {reason}; run without --compile") from error


def _one_teacher(name: str, checkpoint: str | None, precision: Precision) -> Teacher:
    if name != RUN:
        return load_teacher(name, checkpoint=checkpoint, precision=precision)
    if checkpoint is None:
        raise RequestError(
            f"teacher {RUN}: --checkpoint is needed: a run folder of fkd-ssl train, a .ckpt of one, or an exported classifier"
        )
    path = Path(checkpoint)
    student, pixels = student_of(checkpoint, "--checkpoint")
    if path.suffix == EXPORTED and student.spec.get("head") != CLASSIFIER:
        raise RequestError(f"teacher {RUN}: {checkpoint} is an export without the projection head; pass the run folder")
    if path.suffix == EXPORTED:
        run = path.resolve().with_suffix("")
    else:
        run = path.resolve().parents[1] if path.is_file() else path.resolve()  # RUN/checkpoints/last.ckpt
    return _student_teacher(student, pixels, re.sub(r"[^A-Za-z0-9._-]", "-", run.name), path.name, precision)


def _object_teacher(name: Named, checkpoint: str | None, precision: Precision) -> Teacher:
    """The teacher that is a Python object."""
    if checkpoint is not None:
        raise RequestError(f"teacher {name}: already has its weights; leave out checkpoint")
    if isinstance(name.value, Student):
        student = copy.deepcopy(name.value)
        return _student_teacher(student, name.pixels or _PIXELS, name.removeprefix(OBJECT), None, precision)
    return of_object(name, precision)


def _student_teacher(student: Student, pixels: int, name: str, checkpoint: str | None, precision: Precision) -> Teacher:
    """A student with its head as a teacher."""
    if not isinstance(student.dims[0], int):
        raise RequestError(f"teacher {name}: its first head is for tokens; only a head for vectors can be a teacher")
    return Teacher(
        student.backbone,
        student.head,
        name=name,
        shape=(student.dim,),
        feature_dim=student.feature_dim,
        network=", ".join(f"{key} {value}" for key, value in student.spec.items()),
        pixels=pixels,
        mean=MEAN,
        std=STD,
        source="fkd-ssl train",
        checkpoint=checkpoint,
        checkpoint_sha256=weights_digest(student),
        precision=precision,
        kind="distribution" if student.spec.get("head") == CLASSIFIER else "embedding",
    )


def model_of(spec: str, checkpoint: str | None = None) -> Model:
    """Loads a model: a run folder, one of its checkpoints, an exported file, or a teacher.

    A teacher is NAME, LIBRARY/NAME or module:function. The prefix `teacher:` is needed only if a file or folder has its name.

    Raises:
        RequestError: `spec` has another form.
    """
    if isinstance(spec, Named) and isinstance(spec.value, Student):
        student = copy.deepcopy(spec.value).to(device()).eval()
        return _model(spec, student, spec.pixels or _PIXELS, {"network": type(student.backbone).__name__})
    path = Path(spec)
    is_teacher = spec.startswith((OBJECT, "teacher:")) or spec.partition("/")[0] in LIBRARIES or ":" in spec
    if is_teacher and (spec.startswith("teacher:") or not path.exists()):
        teacher = teacher_of(spec if isinstance(spec, Named) else spec.removeprefix("teacher:"), checkpoint)
        info = teacher.info
        details = {
            "network": info.network,
            "normalisation": info.normalisation,
            "checkpoint": info.checkpoint,
            "checkpoint_sha256": info.checkpoint_sha256,
            "licence": info.licence,
        }
        return _model(spec, teacher, info.pixels, details)
    if checkpoint is not None:
        raise RequestError("--checkpoint is for --model teacher:NAME; for a run, pass its .ckpt file as --model")
    student, pixels = student_of(spec)
    student = student.to(device())
    return _model(spec, student, pixels, {"network": type(student.backbone).__name__})


def student_of(spec: str, option: str = "--model") -> tuple[Student, int]:
    """Loads the student of a run folder, a checkpoint or an exported file; returns it and the side of its crops.

    Raises:
        RequestError: The file does not exist; the message names `option`.
        CheckpointError: The file is not a student.
    """
    if isinstance(spec, Named):
        if not isinstance(spec.value, Student):
            raise RequestError(f"{option} {spec}: expected a student from fkd_ssl.train or fkd_ssl.load_student")
        return spec.value, spec.pixels or _PIXELS
    path = Path(spec)
    if path.is_dir():
        path = last_checkpoint(path)
    if not path.is_file():
        raise RequestError(
            f"{option} {spec}: no such run or checkpoint (looked for {path}); give a run folder, a .ckpt of one, or a file of "
            f"fkd-ssl export{', or teacher:NAME with --checkpoint' if option == '--model' else ''}"
        )
    return load_student(path)


def _model(spec: str, network: Student | Teacher, pixels: int, details: dict[str, str | None]) -> Model:
    details = {"name": spec, **details, "weights_sha256": weights_digest(network)}
    return Model(name=spec, features=network.features, map=network.map, pixels=pixels, network=network, details=details)
