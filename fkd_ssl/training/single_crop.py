"""FKD's last epochs: one crop per image in a batch, so that the final BatchNorm statistics do not come from similar crops."""

import copy

from torch.utils.data import Dataset

from fkd_ssl.data import Batch, Crops, Samples
from fkd_ssl.data.sampler import Pairs, PassSampler


class SingleCropPasses(Dataset[Batch]):
    """M crops per image, or one crop per image in the sampler's single-crop passes (as in the code of FKD, arXiv 2112.01528).

    Both kinds of pass count the crops of an image in the same way, so that every crop is used once before any is used twice.

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
        """Like `Crops.__getitems__`; all indices must be of one kind of pass."""
        data = self.one if self.sampler.is_single(indices[0][0]) else self.data
        return data.__getitems__([*indices])
