"""FKD's last epochs: a batch has one crop of an image, so that the last BatchNorm statistics are not of similar crops."""

import copy

from torch.utils.data import Dataset

from fkd_ssl.data import Batch, Crops, Samples
from fkd_ssl.training.sampler import Pairs, PassSampler


class LastSingle(Dataset[Batch]):
    """M crops of an image, and one crop of an image in the passes that the sampler names (FKD, arXiv 2112.01528, its code).

    Both count the crops of an image in the same way, so that every crop is used once before any is used twice.

    Args:
        data: The crops.
        sampler: The sampler of the training.
    """

    def __init__(self, data: Crops, sampler: PassSampler) -> None:
        self.data = data
        self.one = copy.copy(data)
        self.one.crops_per_image = 1
        self.sampler = sampler

    def __len__(self) -> int:
        return len(self.data)

    def __getitems__(self, indices: Pairs) -> Samples:
        """As `Crops.__getitems__`; all indices are of one kind of pass."""
        data = self.one if self.sampler.is_single(indices[0][0]) else self.data
        return data.__getitems__([*indices])
