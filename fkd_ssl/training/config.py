"""What a training run is made of: groups of options, and what they must fulfil together."""

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
    """A student distilled from a teacher, over stored targets or online.

    Stored and online differ in where a batch's crops and targets come from, and in nothing else. In a YAML file the options
    stand under the names of their groups; on the command line and in code their own names are enough.
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
        if self.batch_size % (self.crops_per_image * self.accumulate):
            raise RequestError(
                f"accumulate {self.accumulate}: does not divide the {self.batch_size // self.crops_per_image} images of a batch"
            )
        if self.record is not None:
            self._check_record(self.record)

    @property
    def recorded_crops(self) -> int:
        """C of a store that is recorded."""
        return self._whole_passes if self.crops is None else self.crops

    @property
    def _whole_passes(self) -> int:
        """Crops of every image that the training sees in whole passes."""
        return math.floor(self.epochs / self.crops_per_image) * self.crops_per_image

    def _check_record(self, record: str) -> None:
        if self.single_crop_epochs:
            raise RequestError("record: single_crop_epochs would leave gaps in the crops of a store; leave one of them out")
        if self.scale_boxes:
            raise RequestError("record: scale_boxes would store targets of other crops than the store's; leave it out")
        store, run = Path(record).resolve(), Path(self.out).resolve()
        if store == run or store in run.parents or run in store.parents:
            raise RequestError(
                f"record {record}, out {self.out}: a store and a run are folders of their own, none in the other"
            )
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
