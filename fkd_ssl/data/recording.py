"""The crops of a store, block by block, for a training that records its teachers' targets."""

import torch

from fkd_ssl.data.pixels import Batch
from fkd_ssl.data.stored import StoredCrops


class RecordingCrops(StoredCrops):
    """Crops of a store whose targets are being recorded. The arguments are those of StoredCrops.

    Pass p reads crops (p M + 0..M-1) mod C of every image, so the crops used so far are always the first ones. Batches also
    have `places` int64 [B, 2]: each image's row in the store, and the first of its M crops. The sha256 of an image is checked
    in every pass, since its targets are kept.
    """

    _every_pass = True

    def _first(self, pass_: int, i: int) -> int:
        return pass_ * self.crops_per_image % self.store.crops_per_image

    def _targets(self, pairs: list[tuple[int, int]]) -> Batch:
        return {"places": torch.tensor([(int(self._rows[i]), self._first(pass_, i)) for pass_, i in pairs])}
