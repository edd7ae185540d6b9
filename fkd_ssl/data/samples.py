"""Batches of a data set of crops, and the collate function that returns them without a copy."""

from collections.abc import Sequence
from typing import Any, overload

from torch import Tensor

from fkd_ssl.crops.device import CropPlan
from fkd_ssl.data.pixels import Batch
from fkd_ssl.errors import RequestError

Targets = Tensor | dict[str, Tensor]  # one teacher's, or those of several teachers by name


class Samples(Sequence[Batch]):
    """A batch as a list of its images. Each item is a view of the tensors in `batch`."""

    def __init__(self, batch: Batch, crops_per_image: int) -> None:
        self.batch = batch
        self._m = crops_per_image

    def __len__(self) -> int:
        return len(self.batch["paths"])

    @overload
    def __getitem__(self, index: int) -> Batch: ...

    @overload
    def __getitem__(self, index: slice) -> list[Batch]: ...

    def __getitem__(self, index: int | slice) -> Batch | list[Batch]:
        if isinstance(index, slice):
            return [self[k] for k in range(*index.indices(len(self)))]
        if isinstance(self.batch["images"], CropPlan):
            raise RequestError("decode_only gives whole batches: pass collate_fn=whole_batch to the DataLoader")
        k, m = range(len(self))[index], self._m
        stacked = [key for key in ("images", "teacher_images", "targets") if key in self.batch]
        crops: Batch = {key: _rows_of(self.batch[key], slice(k * m, (k + 1) * m)) for key in stacked}
        return {**crops, "label": int(self.batch["labels"][k]), "path": self.batch["paths"][k]}


def _rows_of(stacked: Targets, rows: slice) -> Targets:
    return {name: part[rows] for name, part in stacked.items()} if isinstance(stacked, dict) else stacked[rows]


def whole_batch(samples: Any) -> Batch:
    """Returns the batch of `Crops.__getitems__` unchanged, with `images` [B M, 3, P, P]; for `collate_fn` of a DataLoader."""
    batch: Batch = samples.batch
    return batch
