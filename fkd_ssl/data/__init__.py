"""Data sets of crops: stored crops with their targets, or fresh crops."""

from fkd_ssl.data.crops import Crops
from fkd_ssl.data.fresh import FreshCrops
from fkd_ssl.data.loading import Loader
from fkd_ssl.data.pixels import Batch, replay_on_device
from fkd_ssl.data.recording import RecordingCrops
from fkd_ssl.data.relabelled import RelabelledCrops
from fkd_ssl.data.sampler import PassSampler
from fkd_ssl.data.samples import Samples, whole_batch
from fkd_ssl.data.stored import StoredCrops, scaled

__all__ = [
    "Batch",
    "Crops",
    "FreshCrops",
    "Loader",
    "PassSampler",
    "RecordingCrops",
    "RelabelledCrops",
    "Samples",
    "StoredCrops",
    "replay_on_device",
    "scaled",
    "whole_batch",
]
