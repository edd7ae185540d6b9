"""ReLabel's label maps: a classifier's logits at each place of every image, the k largest; made once, pooled for any crop."""

from fkd_ssl.relabel.generate import MapSummary, generate
from fkd_ssl.relabel.maps import LabelMaps

__all__ = ["LabelMaps", "MapSummary", "generate"]
