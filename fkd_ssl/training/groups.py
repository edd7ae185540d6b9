"""The options of a training, grouped by what they configure. Each group checks its own; `TrainConfig` checks them together.

There is no torch here, since the command line's help is built from these classes.
"""

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar, Literal

from fkd_ssl.errors import RequestError


def split(names: str | None) -> list[str]:
    """The parts of A,B without the blanks around them; raises RequestError if one is empty."""
    parts = [] if names is None else [part.strip() for part in names.split(",")]
    if "" in parts:
        raise RequestError(f"{names!r}: has an empty part; write A,B, without a comma at either end")
    return parts


def checkpoints_of(teacher: str | None, checkpoint: str | None) -> list[str | None]:
    """Each teacher's checkpoint: F,G for A,B; one teacher's file may have a comma in its name.

    Raises:
        RequestError: There are several teachers and another number of checkpoints.
    """
    teachers = split(teacher)
    if checkpoint is None or len(teachers) <= 1:
        return [checkpoint] * (len(teachers) or 1)
    files = [part.strip() or None for part in checkpoint.split(",")]
    if len(files) != len(teachers):
        raise RequestError(
            f"checkpoint {checkpoint!r}: {len(files)} for {len(teachers)} teachers ({teacher}); expected one for each, in "
            "their order, with a comma between them, and nothing for one that needs none"
        )
    return files


def check_positive(config: Any, *names: str) -> None:
    """Raises RequestError if one of these numbers is given and is not positive and finite."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not 0 < value < math.inf:
            raise RequestError(f"{name} {value}: must be positive and finite")


def check_not_negative(config: Any, *names: str) -> None:
    """Raises RequestError if one of these numbers is negative or not finite."""
    for name in names:
        if not 0 <= getattr(config, name) < math.inf:
            raise RequestError(f"{name} {getattr(config, name)}: must be at least 0, and finite")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Images and crops."""

    images: str
    """Folder of images; class folders are needed only for kNN."""
    recipe: str = "mocov2"
    """Augmentation that online crops are drawn from: mocov2, s2bnn, swav or fkd. Stored crops have the store's."""
    crops_per_image: int = 4
    """M, crops read of an image at once. A larger M decodes fewer images, and makes the crops of a batch more alike."""
    batch_size: int = 256
    """Crops in a batch, a multiple of crops_per_image."""
    pixels: int = 224
    """Side of the student's crops."""
    mixup: float = 0.0
    """Mixup of crops and class probabilities: parameter of the Beta distribution, 0.8 in FKD; 0 turns it off."""
    cutmix: float = 0.0
    """CutMix, likewise; 1 in FKD. With both, each batch uses one of them at random."""
    scale_boxes: bool = False
    """The images are smaller copies of the store's (fkd-ssl cache): scale the crops' boxes to them."""
    device_crops: bool = False
    """Workers only decode and the GPU makes the crops, for machines with few CPU cores. The pixels are the same."""
    on_unreadable: Literal["stop", "skip"] = "stop"
    """A damaged or changed image stops the training and is named (stop), or another image of its batch replaces it (skip)."""
    workers: int = 2
    """Processes that read images."""

    EXECUTION: ClassVar[tuple[str, ...]] = ("device_crops", "on_unreadable", "workers")
    PATHS: ClassVar[tuple[str, ...]] = ("images",)

    def __post_init__(self) -> None:
        check_positive(self, "crops_per_image", "batch_size", "pixels")
        check_not_negative(self, "mixup", "cutmix", "workers")
        if self.pixels > 4096:
            raise RequestError(f"pixels {self.pixels}: must lie in 1 to 4096")
        if self.batch_size % self.crops_per_image:
            raise RequestError(
                f"batch_size {self.batch_size}: counts crops, and must be a multiple of crops_per_image {self.crops_per_image}"
            )


@dataclass(frozen=True, kw_only=True)
class TargetsConfig:
    """Where the targets come from."""

    targets: Literal["stored", "online", "labels", "relabel"] = "stored"
    """Where the targets come from: the --store, a teacher that runs on every batch (online), the images' class folders
    (labels), or ReLabel's --label_maps (relabel)."""
    store: str | None = None
    """Store made by precompute. With --targets online or labels only its crops are used."""
    teacher: str | None = None
    """With --targets stored, the column of the store if there are several; with online, the teacher as precompute takes it.
    A,B for two."""
    teacher_weights: str | None = None
    """Weight of each teacher in the loss, as 2,1; equal by default."""
    checkpoint: str | None = None
    """Checkpoint of the online teacher; F,G for teachers A,B."""
    teacher_pixels: int | None = None
    """Side of the online teacher's crops, if it differs: each crop is then made twice."""
    label_maps: str | None = None
    """Folder made by fkd-ssl label-maps, for --targets relabel."""
    label_smoothing: float = 0.0
    """Share of a label's probability that is spread over all classes, for --targets labels and --calibrate_below."""
    calibrate_below: float | None = None
    """Crops whose largest class probability is below this get their image's label as the target, as in FerKD."""
    record: str | None = None
    """With --targets online: a store that the teacher's targets are written to, for later students."""
    crops: int | None = None
    """C of a recorded store: a multiple of crops_per_image, at most the epochs; by default as many as possible."""
    codec: str | None = None
    """Codec of recorded targets, as precompute takes it; SQ8 by default, marginal_smoothing_k5 for class probabilities."""

    PATHS: ClassVar[tuple[str, ...]] = ("store", "checkpoint", "label_maps", "record")

    def __post_init__(self) -> None:
        if self.teacher_pixels is not None and not 1 <= self.teacher_pixels <= 4096:
            raise RequestError(f"teacher_pixels {self.teacher_pixels}: must lie in 1 to 4096")
        if not 0 <= self.label_smoothing < 1:
            raise RequestError(f"label_smoothing {self.label_smoothing}: must lie in 0 to 1, below 1")
        if self.label_smoothing and self.targets != "labels" and self.calibrate_below is None:
            raise RequestError(f"label_smoothing {self.label_smoothing}: is for --targets labels, or --calibrate_below")
        if self.calibrate_below is not None and not 0 < self.calibrate_below <= 1:
            raise RequestError(f"calibrate_below {self.calibrate_below}: a probability, must lie in 0 to 1")
        if (self.targets == "relabel") != (self.label_maps is not None):
            raise RequestError(
                "targets relabel: --label_maps is needed; make them with fkd-ssl label-maps"
                if self.label_maps is None
                else f"label_maps {self.label_maps}: they are for --targets relabel"
            )
        unused = {
            "labels": ("teacher", "checkpoint", "teacher_pixels", "calibrate_below"),
            "relabel": ("teacher", "checkpoint", "teacher_pixels", "store"),
        }
        for name in unused.get(self.targets, ()):
            if getattr(self, name) is not None:
                raise RequestError(f"{name} {getattr(self, name)}: --targets {self.targets} has none; leave it out")
        if self.targets == "stored" and not self.store:
            raise RequestError("targets stored: --store is needed; make one with fkd-ssl precompute")
        if self.targets == "online" and not self.teacher:
            raise RequestError("targets online: --teacher is needed, for instance mocov2 with --checkpoint FILE")
        if self.record is None and self.crops is not None:
            raise RequestError(f"crops {self.crops}: it is for --record; a store has its own number of crops")
        if self.record is None and self.codec is not None:
            raise RequestError(f"codec {self.codec}: it is for --record; a store's targets have their own codec")
        if self.record is not None and (self.targets != "online" or self.store):
            raise RequestError(
                f"record {self.record}: needs --targets online, and no --store: the crops are those of the recorded store"
            )
        if self.record == "":
            raise RequestError("record: an empty name for a store; leave it out to record nothing")
        self.weights(len(self.teachers) or 1)
        if self.targets == "online":
            checkpoints_of(self.teacher, self.checkpoint)

    @property
    def teachers(self) -> list[str]:
        """The teachers by name; none where the only column of a store is meant."""
        return split(self.teacher)

    def weights(self, teachers: int) -> list[float]:
        """Each teacher's share of the loss; they sum to 1, so that the learning rate means the same for any number."""
        if self.teacher_weights is None:
            return [1 / teachers] * teachers
        if teachers == 1:
            raise RequestError(f"teacher_weights {self.teacher_weights!r}: there is one teacher; name several as --teacher A,B")
        try:
            weights = [float(weight) for weight in split(self.teacher_weights)]
        except ValueError:
            weights = []
        if len(weights) != teachers or not all(0 < weight < math.inf for weight in weights):
            raise RequestError(
                f"teacher_weights {self.teacher_weights!r}: expected a positive number for each of the {teachers} teachers "
                f"({self.teacher}), with commas between them"
            )
        return [weight / sum(weights) for weight in weights]


@dataclass(frozen=True, kw_only=True)
class StudentConfig:
    """The network that is trained."""

    student: str = "resnet18"
    """A classifier of torchvision, timm/NAME, reactnet or reactnet_step1; its classifier is replaced by a projection head."""
    head: str = "mocov2"
    """Projection head: mocov2 (2 layers) or simreg (4 layers with BatchNorm); classifier (linear) for class probabilities."""
    stem: Literal["standard", "small"] = "standard"
    """small is for images of 32 or 64 px: the first convolution is 3 x 3 with stride 1, without max-pooling."""
    width: float = 1.0
    """Multiplier of the channels of reactnet and of torchvision's mobilenets."""
    init: str | None = None
    """Run, checkpoint or exported file that the student's weights start from; reactnet starts from a reactnet_step1."""

    PATHS: ClassVar[tuple[str, ...]] = ("init",)

    def __post_init__(self) -> None:
        check_positive(self, "width")


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """The loss between the student's output and the targets."""

    objective: str = "feature_kl"
    """feature_kl (S2-BNN's), cosine (SimReg's), queue_kl (SEED's), prototype_ce (SwAV's, from a SwAV teacher's prototypes),
    relational (within the batch); for class probabilities soft_ce (FKD's), or soft_ce+discriminator (MEAL V2's). Their settings
    are in parentheses, and sums have weights: "feature_kl + 0.5*queue_kl(queue=4096)". The documentation lists the settings."""


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """The optimizer, and how long it runs."""

    optimizer: Literal["adam", "adamw", "sgd", "lars"] = "adam"
    """adam is S2-BNN's."""
    lr: float = 3e-4
    """Peak learning rate, for this batch size."""
    weight_decay: float = 0.0
    """Weight decay of weights; biases and norms have none."""
    momentum: float = 0.9
    """Momentum of sgd and lars."""
    epochs: float = 100
    """One epoch is one crop of every image, so the amount of training does not depend on crops_per_image."""
    warmup_epochs: float = 0.0
    """Epochs of linear warm-up; a cosine to zero follows."""
    lr_drops: str | None = None
    """Epochs after which the learning rate is divided by 10, instead of the cosine, as 120,240. In a YAML file, quote a
    single one."""
    single_crop_epochs: float = 0.0
    """Last epochs, in which a batch has one crop of an image, as in FKD."""
    clip: float | None = None
    """Maximum norm of the gradient."""
    ema: float | None = None
    """Decay of a moving average of the weights, for instance 0.999; the average is then scored and exported."""

    def __post_init__(self) -> None:
        check_positive(self, "lr", "epochs", "clip")
        check_not_negative(self, "weight_decay", "momentum", "warmup_epochs", "single_crop_epochs")
        if self.optimizer == "lars" and not self.weight_decay:
            raise RequestError(
                "optimizer lars: lightly's scales only weights that have a weight_decay: give one, or --optimizer sgd"
            )
        if self.ema is not None and not 0 < self.ema < 1:
            raise RequestError(f"ema {self.ema}: must lie between 0 and 1; 0.999 averages about the last thousand steps")
        if self.warmup_epochs >= self.epochs:
            raise RequestError(f"warmup_epochs {self.warmup_epochs}: must be fewer than epochs {self.epochs}")
        if self.drops and self.drops[-1] >= self.epochs:
            raise RequestError(f"lr_drops {self.lr_drops}: the last one must come before epochs {self.epochs:g}")
        if self.single_crop_epochs > self.epochs:
            raise RequestError(f"single_crop_epochs {self.single_crop_epochs}: must be at most epochs {self.epochs}")

    @property
    def drops(self) -> list[float]:
        """Epochs of `lr_drops`."""
        try:
            drops = [float(epoch) for epoch in split(self.lr_drops)]
        except ValueError:
            drops = [-1.0]
        if not all(a < b for a, b in pairwise([0, *drops, math.inf])):
            raise RequestError(f"lr_drops {self.lr_drops!r}: expected epochs in their order, as 120,240")
        return drops


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Where and how the training runs."""

    out: str
    """Run folder: config.yaml, inputs.json, metrics.csv, results.json, checkpoints/. The same options and inputs resume it."""
    seed: int = 0
    """Seed of the initial weights, the order of images and the online crops."""
    devices: int = 1
    """Processes on this machine, one for each GPU if there are any; torchrun overrides it."""
    accumulate: int = 1
    """Parts that a batch is run in if it does not fit into memory; their gradients are added up."""
    sync_batchnorm: bool = False
    """Synchronize BatchNorm over all processes; GPUs only."""
    compile: bool = False
    """Compile the student's backbone (torch.compile)."""
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = "32-true"
    """Precision of the student, as in Lightning."""

    EXECUTION: ClassVar[tuple[str, ...]] = ("devices",)
    PATHS: ClassVar[tuple[str, ...]] = ("out",)

    def __post_init__(self) -> None:
        check_positive(self, "devices", "accumulate")


@dataclass(frozen=True, kw_only=True)
class LoggingConfig:
    """What is measured and logged during training."""

    log_every: int = 20
    """Steps per line of metrics.csv."""
    logger: Literal["tensorboard", "wandb", "mlflow"] | None = None
    """Also log the lines of metrics.csv there; its package is the extra of the same name."""
    val: str | None = None
    """Folder of labelled test images for kNN during training."""
    knn_every: float = 5
    """Epochs between kNN scores, if --val is given; the last epoch is always scored."""
    knn_k: int = 20
    """Neighbours of kNN."""

    PATHS: ClassVar[tuple[str, ...]] = ("val",)

    def __post_init__(self) -> None:
        check_positive(self, "log_every", "knn_every", "knn_k")
