"""ReLabel's label maps: the k largest logits of a classifier at each place of every image, made once and pooled per crop."""

from fkd_ssl.relabel.generate import MapSummary, generate
from fkd_ssl.relabel.maps import LabelMaps

__all__ = ["LabelMaps", "MapSummary", "generate"]
