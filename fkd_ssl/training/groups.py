"""The options of a training in groups. Each group checks its own options; `TrainConfig` checks combinations of groups.

This module does not import torch, so that the command line's help, which is built from these classes, is fast.
"""

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar, Literal

from fkd_ssl.errors import RequestError
from fkd_ssl.options import Named

FROM_DATA: Any = None
"""Default of an option that `defaults.resolve` sets from the data."""


def split(names: str | None) -> list[str]:
    """Splits A,B at commas and strips blanks; raises RequestError if a part is empty."""
    if isinstance(names, Named):
        return list(names.value) if isinstance(names.value, list) else [names]
    parts = [] if names is None else [part.strip() for part in names.split(",")]
    if "" in parts:
        raise RequestError(f"{names!r}: has an empty part; write A,B, without a comma at either end")
    return parts


def checkpoints_of(teacher: str | None, checkpoint: str | None) -> list[str | None]:
    """Splits the checkpoints F,G of the teachers A,B. With a single teacher, the file name may have a comma.

    Raises:
        RequestError: The number of checkpoints differs from the number of several teachers.
    """
    teachers = split(teacher)
    if checkpoint is None or len(teachers) <= 1:
        return [checkpoint] * (len(teachers) or 1)
    files = [part.strip() or None for part in checkpoint.split(",")]
    if len(files) != len(teachers):
        raise RequestError(
            f"checkpoint {checkpoint!r}: {len(files)} for {len(teachers)} teachers ({teacher}); pass one for "
            "each, separated by commas, and leave one empty if its teacher needs none"
        )
    return files


def teacher_precision(config: Any) -> Literal["fp32", "bf16", "fp16"]:
    """Returns the precision of a config's teacher: `teacher_precision`, by default that of the student."""
    same: dict[str, Literal["fp32", "bf16", "fp16"]] = {"32-true": "fp32", "bf16-mixed": "bf16", "16-mixed": "fp16"}
    given: Literal["fp32", "bf16", "fp16"] | None = config.teacher_precision
    return given or same[config.precision]


def check_positive(config: Any, *names: str) -> None:
    """Raises RequestError if one of these numbers is not positive and finite. None is allowed."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not 0 < value < math.inf:
            raise RequestError(f"{name} {value}: must be positive and finite")


def check_not_negative(config: Any, *names: str) -> None:
    """Raises RequestError if one of these numbers is negative or not finite. None is allowed."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not 0 <= value < math.inf:
            raise RequestError(f"{name} {value}: must be at least 0, and finite")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Images and crops."""

    images: str
    """Images: a folder, tars, Parquet files, a list of files, or another source (docs/sources.md). Classes are needed only for
    --targets labels, --calibrate_below and --val."""
    recipe: str = "mocov2"
    """Augmentation that online crops are drawn from: mocov2, s2bnn, swav, fkd or simreg. Stored crops use that of the store."""
    crops_per_image: int = 4
    """M, crops per image in a batch. A larger M decodes fewer images, but makes the crops of a batch more alike."""
    batch_size: int = FROM_DATA
    """Number of crops in a batch, a multiple of crops_per_image; by default 128 for up to 50,000 images, otherwise 256."""
    pixels: int = FROM_DATA
    """Side of the student's crops; by default that of the teacher's crops, and 224 without a teacher."""
    mixup: float = 0.0
    """Mixup of crops and class probabilities: parameter of the Beta distribution, 0.8 in FKD. 0 disables it."""
    cutmix: float = 0.0
    """CutMix: parameter of the Beta distribution, 1 in FKD. 0 disables it. With both, each batch uses one of them at random."""
    scale_boxes: bool = False
    """Scale the stored boxes to the images, which are smaller copies of the store's images (made by fkd-ssl cache)."""
    device_crops: Literal["auto", "on", "off"] = "auto"
    """Whether the GPU makes the crops, so that workers only decode: auto measures which is faster. The pixels are the same."""
    mix_groups: int = FROM_DATA
    """Mix the images of this many tars or Parquet row groups at a time, so that a pass reads each about once; 0 mixes all
    images. By default 16 for remote files, as many as fit in 256 MB for Parquet, and 0 for others."""
    on_unreadable: Literal["stop", "skip"] = "stop"
    """What to do if an image is damaged or changed: stop and name it, or replace it with another image of its batch (skip)."""
    workers: int = 2
    """Processes that read images."""

    EXECUTION: ClassVar[tuple[str, ...]] = ("device_crops", "on_unreadable", "workers")
    PATHS: ClassVar[tuple[str, ...]] = ("images",)

    def __post_init__(self) -> None:
        check_positive(self, "crops_per_image", "batch_size", "pixels")
        check_not_negative(self, "mixup", "cutmix", "workers", "mix_groups")
        if self.pixels is not None and self.pixels > 4096:
            raise RequestError(f"pixels {self.pixels}: must be between 1 and 4096")
        if self.batch_size is not None and self.batch_size % self.crops_per_image:
            raise RequestError(
                f"batch_size {self.batch_size}: counts crops, and must be a multiple of crops_per_image {self.crops_per_image}"
            )


@dataclass(frozen=True, kw_only=True)
class TargetsConfig:
    """Source of the targets."""

    targets: Literal["stored", "online", "labels", "relabel"] = "stored"
    """Source of the targets: the --store (stored), a teacher that runs on every batch (online), the class folders of the
    images (labels), or ReLabel's --label_maps (relabel)."""
    store: str | None = None
    """Folder or URL of the store. With --targets online or labels, only its crops are used."""
    column: str | None = None
    """With --targets stored: column of the store; needed only if it has several. A,B uses both."""
    teacher: str | None = None
    """With --targets online: teacher, named as for precompute. A,B uses both; NAME,NAME@tokens need one forward pass."""
    teacher_weights: str | None = None
    """Weight of each teacher in the loss, for instance 2,1. Default: equal."""
    checkpoint: str | None = None
    """Checkpoint of the online teacher; F,G for teachers A,B."""
    teacher_precision: Literal["fp32", "bf16", "fp16"] | None = None
    """Precision of the online teacher; by default that of the student."""
    grid: int | None = None
    """Number of tokens along each side of the crop, for online teachers NAME@tokens; by default 7."""
    teacher_pixels: int | None = None
    """Side of the online teacher's crops; by default --pixels, or the teacher's native size. If it differs from --pixels, each
    crop is made twice."""
    label_maps: str | None = None
    """Folder made by fkd-ssl label-maps, for --targets relabel."""
    label_smoothing: float = 0.0
    """Probability that is spread evenly over all classes, for --targets labels and --calibrate_below."""
    calibrate_below: float | None = None
    """Replace the target with the label of the image if the teacher's largest class probability is below this, as in FerKD."""
    record: str | None = None
    """With --targets online: folder of a store to which the teacher's targets are written, for later students."""
    crops: int | None = None
    """C of the recorded store: a multiple of crops_per_image and at most the epochs; by default as many as possible."""
    codec: str | None = None
    """Codec of recorded targets, as for precompute; by default SQ8, or marginal_smoothing_k5 for class probabilities."""

    PATHS: ClassVar[tuple[str, ...]] = ("store", "checkpoint", "label_maps", "record")

    def __post_init__(self) -> None:
        if self.teacher_pixels is not None and not 1 <= self.teacher_pixels <= 4096:
            raise RequestError(f"teacher_pixels {self.teacher_pixels}: must be between 1 and 4096")
        if not 0 <= self.label_smoothing < 1:
            raise RequestError(f"label_smoothing {self.label_smoothing}: must be at least 0 and below 1")
        if self.label_smoothing and self.targets != "labels" and self.calibrate_below is None:
            raise RequestError(f"label_smoothing {self.label_smoothing}: is for --targets labels, or --calibrate_below")
        if self.calibrate_below is not None and not 0 < self.calibrate_below <= 1:
            raise RequestError(f"calibrate_below {self.calibrate_below}: must be between 0 and 1")
        if (self.targets == "relabel") != (self.label_maps is not None):
            raise RequestError(
                "targets relabel: --label_maps is needed; make them with fkd-ssl label-maps"
                if self.label_maps is None
                else f"label_maps {self.label_maps}: is for --targets relabel"
            )
        unused = {
            "stored": ("teacher", "checkpoint", "teacher_pixels", "teacher_precision", "grid"),
            "online": ("column",),
            "labels": ("column", "teacher", "checkpoint", "teacher_pixels", "teacher_precision", "grid", "calibrate_below"),
            "relabel": ("column", "teacher", "checkpoint", "teacher_pixels", "teacher_precision", "grid", "store"),
        }
        for name in unused[self.targets]:
            if (value := getattr(self, name)) is not None:
                advice = (
                    "name a column of the store with --column"
                    if (self.targets, name) == ("stored", "teacher")
                    else "leave it out"
                )
                raise RequestError(f"{name} {value}: is not used with --targets {self.targets}; {advice}")
        if self.targets == "stored" and not self.store:
            raise RequestError("targets stored: --store is needed; make one with fkd-ssl precompute")
        if self.targets == "online" and not self.teacher:
            raise RequestError("targets online: --teacher is needed, for instance mocov2 with --checkpoint FILE")
        if self.record is None and self.crops is not None:
            raise RequestError(f"crops {self.crops}: is for --record; a store has its own number of crops")
        if self.record is None and self.codec is not None:
            raise RequestError(f"codec {self.codec}: is for --record; a store's targets have their own codec")
        if self.record is not None and (self.targets != "online" or self.store):
            raise RequestError(
                f"record {self.record}: needs --targets online, and no --store: the crops are those of the recorded store"
            )
        if self.record == "":
            raise RequestError("record: the name of the store is empty; leave it out to record nothing")
        self.weights(len(split(self.column or self.teacher)) or 1)
        if self.targets == "online":
            checkpoints_of(self.teacher, self.checkpoint)

    def weights(self, teachers: int) -> list[float]:
        """Each teacher's share of the loss; they sum to 1, so that the learning rate means the same for any number."""
        if self.teacher_weights is None:
            return [1 / teachers] * teachers
        if teachers == 1:
            raise RequestError(f"teacher_weights {self.teacher_weights!r}: there is only one teacher; leave it out")
        try:
            weights = [float(weight) for weight in split(self.teacher_weights)]
        except ValueError:
            weights = []
        if len(weights) != teachers or not all(0 < weight < math.inf for weight in weights):
            raise RequestError(
                f"teacher_weights {self.teacher_weights!r}: expected a positive number for each of the {teachers} teachers "
                f"({self.column or self.teacher}), separated by commas"
            )
        return [weight / sum(weights) for weight in weights]


@dataclass(frozen=True, kw_only=True)
class StudentConfig:
    """Network to train."""

    student: str = "resnet18"
    """A classifier of torchvision, timm/NAME, reactnet or reactnet_step1; a projection head replaces its last layers."""
    head: str = "mocov2"
    """Projection head: mocov2 (2 layers) or simreg (4 layers with BatchNorm); classifier (linear) for class probabilities."""
    stem: Literal["standard", "small"] = "standard"
    """First layers: small, for images of 32 or 64 px, has a 3 x 3 convolution with stride 1 and no max-pooling after it."""
    width: float = 1.0
    """Multiplier of the number of channels, for reactnet and torchvision's mobilenets."""
    drop_path: float = 0.0
    """Stochastic depth: rate at which the last block is skipped, 0.1 for instance; only for timm students."""
    init: str | None = None
    """Initial weights: a run, a checkpoint or an exported file; a state_dict of torchvision or timm (.pth, .safetensors), whose
    classifier is ignored. reactnet can start from a reactnet_step1."""

    PATHS: ClassVar[tuple[str, ...]] = ("init",)

    def __post_init__(self) -> None:
        check_positive(self, "width")
        if not 0 <= self.drop_path < 1:
            raise RequestError(f"drop_path {self.drop_path}: must be at least 0 and below 1")


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """Loss between the student's output and the targets."""

    objective: str = FROM_DATA
    """For embeddings: feature_kl (S2-BNN, the default), cosine (SimReg), queue_kl (SEED), prototype_ce (SwAV; needs a SwAV
    teacher) or relational (similarities within the batch). For class probabilities: soft_ce (FKD, the default) or
    soft_ce+discriminator (MEAL V2). For tokens: token_cosine (the default) or token_relations (cosines between positions). Give
    settings in parentheses and weights as factors: "feature_kl + 0.5*queue_kl(queue=4096)"; the documentation lists them. With
    columns of several kinds, each uses the terms for its kind."""


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Optimiser, learning rate schedule and number of epochs."""

    optimizer: Literal["adam", "adamw", "sgd", "lars"] = "adam"
    """Optimiser; S2-BNN uses adam."""
    lr: float = FROM_DATA
    """Peak learning rate; it is not scaled with the batch size. By default, for adam and adamw, it depends on the objective for
    up to 50,000 images, and is 3e-4 otherwise (S2-BNN)."""
    weight_decay: float = 0.0
    """Weight decay of the weights of convolutions and linear layers."""
    decay_all: bool = False
    """Apply the weight decay to biases, normalisation parameters, position embeddings and class tokens too, as the codes of
    SEED, SimReg and FKD do with SGD."""
    layer_decay: float | None = None
    """Multiply the learning rate by this from each layer to the one before it, 0.75 for instance, to fine-tune a timm student
    from --init."""
    momentum: float = 0.9
    """Momentum of sgd and lars."""
    epochs: float = 100
    """Number of epochs. One epoch is one crop of every image, regardless of crops_per_image."""
    warmup_epochs: float = FROM_DATA
    """Epochs of linear warm-up; by default a thirtieth of the epochs for up to 50,000 images, otherwise 0."""
    lr_decay: str = "cosine"
    """Schedule of the learning rate after the warm-up: cosine or linear (S2-BNN), both to zero, or the epochs after which it is
    divided by 10, for instance 120,240. In a YAML file, quote a single number."""
    single_crop_epochs: float = 0.0
    """Number of epochs at the end whose batches have one crop per image, as in FKD."""
    clip: float | None = None
    """Maximum norm of the gradient."""
    ema: float | None = None
    """Decay of a moving average of the weights, for instance 0.999. The average is then scored and exported."""

    def __post_init__(self) -> None:
        check_positive(self, "lr", "epochs", "clip")
        check_not_negative(self, "weight_decay", "momentum", "single_crop_epochs")
        if self.warmup_epochs is not None:
            check_not_negative(self, "warmup_epochs")
            if self.warmup_epochs >= self.epochs:
                raise RequestError(f"warmup_epochs {self.warmup_epochs}: must be fewer than epochs {self.epochs}")
        if self.layer_decay is not None and not 0 < self.layer_decay < 1:
            raise RequestError(f"layer_decay {self.layer_decay}: must be between 0 and 1")
        if self.optimizer == "lars" and not self.weight_decay:
            raise RequestError("optimizer lars: scales only weights with weight decay; pass --weight_decay, or --optimizer sgd")
        if self.ema is not None and not 0 < self.ema < 1:
            raise RequestError(f"ema {self.ema}: must be between 0 and 1; 0.999 averages about the last thousand steps")
        if self.drops and self.drops[-1] >= self.epochs:
            raise RequestError(f"lr_decay {self.lr_decay}: the last one must come before epochs {self.epochs:g}")
        if self.single_crop_epochs > self.epochs:
            raise RequestError(f"single_crop_epochs {self.single_crop_epochs}: must be at most epochs {self.epochs}")

    @property
    def drops(self) -> list[float]:
        """The epochs in `lr_decay`; empty for cosine and linear."""
        if self.lr_decay in ("cosine", "linear"):
            return []
        try:
            drops = [float(epoch) for epoch in split(self.lr_decay)]
        except ValueError:
            drops = [-1.0]
        if not all(a < b for a, b in pairwise([0, *drops, math.inf])):
            raise RequestError(f"lr_decay {self.lr_decay!r}: expected cosine, linear, or increasing epochs such as 120,240")
        return drops


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Run folder, seed, devices and precision."""

    out: str
    """Run folder for config.yaml, inputs.json, metrics.csv, results.json and checkpoints/. Repeat the command to resume."""
    seed: int = 0
    """Seed of the initial weights, the order of images and the online crops."""
    devices: int = 1
    """Number of processes on this machine, one per GPU if there are GPUs; torchrun overrides it."""
    accumulate: int = 1
    """Split each batch into this many parts and accumulate their gradients, if a batch does not fit into memory."""
    sync_batchnorm: bool = False
    """Synchronise BatchNorm over all processes (GPUs only)."""
    compile: bool = False
    """Compile the student's backbone and the online teacher (torch.compile)."""
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = "32-true"
    """Precision of the student, in Lightning's terms."""

    checkpoint_interval: float = 60.0
    """Minimum seconds between checkpoints, which are saved at the end of an epoch. The last step is always saved."""

    EXECUTION: ClassVar[tuple[str, ...]] = ("devices", "checkpoint_interval")
    PATHS: ClassVar[tuple[str, ...]] = ("out",)

    def __post_init__(self) -> None:
        check_positive(self, "devices", "accumulate")
        check_not_negative(self, "checkpoint_interval")


@dataclass(frozen=True, kw_only=True)
class LoggingConfig:
    """Logging and scores during training."""

    log_every: int = 20
    """Steps per line of metrics.csv."""
    logger: Literal["tensorboard", "wandb", "mlflow"] | None = None
    """Also log the lines of metrics.csv to this tool; install it with the extra of the same name."""
    val: str | None = None
    """Folder of labelled test images, for kNN scores during training."""
    knn_every: float = 5
    """Number of epochs between kNN scores, if --val is given; the last epoch is always scored."""
    knn_k: int = 20
    """Number of neighbours of kNN."""

    PATHS: ClassVar[tuple[str, ...]] = ("val",)

    def __post_init__(self) -> None:
        check_positive(self, "log_every", "knn_every", "knn_k")
