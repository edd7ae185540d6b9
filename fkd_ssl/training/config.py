"""The config of a training run: groups of options, and the checks that involve several groups."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from fkd_ssl.errors import RequestError
from fkd_ssl.training.groups import (
    DataConfig,
    EngineConfig,
    LoggingConfig,
    ObjectiveConfig,
    OptimizerConfig,
    StudentConfig,
    TargetsConfig,
)


@dataclass(frozen=True, kw_only=True)
class TrainConfig(DataConfig, TargetsConfig, StudentConfig, ObjectiveConfig, OptimizerConfig, EngineConfig, LoggingConfig):
    """Config of a student's training, from stored or online targets.

    Stored and online training differ only in where the crops and targets of a batch come from. In a YAML file the options are
    nested under the names of their groups; on the command line and in code they are not.
    """

    GROUPS: ClassVar = {
        "data": DataConfig,
        "targets": TargetsConfig,
        "student": StudentConfig,
        "objective": ObjectiveConfig,
        "optimizer": OptimizerConfig,
        "engine": EngineConfig,
        "logging": LoggingConfig,
    }

    def __post_init__(self) -> None:
        for group in (DataConfig, TargetsConfig, StudentConfig, OptimizerConfig, EngineConfig, LoggingConfig):
            group.__post_init__(self)
        if self.batch_size is not None and self.batch_size % (self.crops_per_image * self.accumulate):
            raise RequestError(
                f"accumulate {self.accumulate}: does not divide the {self.batch_size // self.crops_per_image} images of a batch"
            )
        if self.layer_decay is not None and not self.student.startswith("timm/"):
            raise RequestError(f"layer_decay {self.layer_decay}: only for students of timm, not {self.student!r}")
        if self.record is not None:
            self._check_record(self.record)

    @property
    def recorded_crops(self) -> int:
        """C of a store to record."""
        return self._whole_passes if self.crops is None else self.crops

    @property
    def _whole_passes(self) -> int:
        """Number of crops of every image that the training uses in complete passes."""
        return math.floor(self.epochs / self.crops_per_image) * self.crops_per_image

    def _check_record(self, record: str) -> None:
        if self.single_crop_epochs:
            raise RequestError("record: single_crop_epochs would leave gaps in the crops of a store; leave one of them out")
        if self.scale_boxes:
            raise RequestError("record: scale_boxes would store targets of other crops than the store's; leave it out")
        store, run = Path(record).resolve(), Path(self.out).resolve()
        if store == run or store in run.parents or run in store.parents:
            raise RequestError(f"record {record}, out {self.out}: must be two folders, neither inside the other")
        if not self._whole_passes:
            raise RequestError(
                f"record: {self.epochs:g} epochs are less than one pass of crops_per_image {self.crops_per_image}: train "
                "longer, or choose fewer crops_per_image"
            )
        if not 1 <= self.recorded_crops <= self._whole_passes or self.recorded_crops % self.crops_per_image:
            raise RequestError(
                f"crops {self.crops}: must be a multiple of crops_per_image {self.crops_per_image}, at most "
                f"{self._whole_passes}: that is how many crops of every image {self.epochs:g} epochs record"
            )
