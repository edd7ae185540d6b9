"""Crops: records, recipes and replay."""

from fkd_ssl.crops.digest import replay_digest
from fkd_ssl.crops.recipes import IMPORTED, RECIPES, Recipe, draw, image_key
from fkd_ssl.crops.records import CROP_DTYPE, Records, box_record, centre, unpack, well_formed
from fkd_ssl.crops.replay import replay, replay_into

__all__ = [
    "CROP_DTYPE",
    "IMPORTED",
    "RECIPES",
    "Recipe",
    "Records",
    "box_record",
    "centre",
    "draw",
    "image_key",
    "replay",
    "replay_digest",
    "replay_into",
    "unpack",
    "well_formed",
]
