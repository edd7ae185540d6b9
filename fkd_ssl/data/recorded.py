"""The crops of a store block by block, for a training that records what its teachers say of them."""

import hashlib
from typing import Any

import torch

from fkd_ssl.data.pixels import Batch
from fkd_ssl.data.stored import StoredCrops
from fkd_ssl.errors import ImageError
from fkd_ssl.images import UInt8Array, decode, read_bytes


class RecordedCrops(StoredCrops):
    """Crops of a store whose targets are yet to be recorded; arguments as of StoredCrops.

    Pass p reads crops (p M + 0..M-1) mod C of every image, so what was used of an image is always its first crops. Batches
    also bring `places` int64 [B, 2]: each image's row of the store, and the first of its M crops. An image must have the
    sha256 that the store has of it.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._checksums: dict[int, bytes] = {}

    def _first(self, pass_: int, i: int) -> int:
        return pass_ * self.crops_per_image % self.store.crops_per_image

    def _read(self, i: int, path: str) -> UInt8Array:
        data = read_bytes(path)
        if hashlib.sha256(data).digest() != self._checksum(int(self._rows[i])):
            raise ImageError(f"{path}: changed since the store's crops were made; restore it or record another store")
        return decode(data, path)

    def _checksum(self, row: int) -> bytes:
        shard, within = self.store.locate(row)
        if shard not in self._checksums:
            own = self.store.crops_sidecar(shard)["images"]
            self._checksums[shard] = bytes.fromhex("".join(checksum or "0" * 64 for checksum in own))
        return self._checksums[shard][32 * within : 32 * within + 32]

    def _more(self, pairs: list[tuple[int, int]]) -> Batch:
        return {"places": torch.tensor([(int(self._rows[i]), self._first(pass_, i)) for pass_, i in pairs])}
