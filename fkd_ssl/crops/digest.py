"""The replay digest shows whether two machines make the same pixels from the same bytes and records."""

import functools
import hashlib
from importlib import resources
from pathlib import Path

import numpy as np

from fkd_ssl.crops.recipes import RECIPES, draw, image_key
from fkd_ssl.crops.replay import replay
from fkd_ssl.images import decode

DIGEST_RECIPES = ("fkd", "mocov2", "s2bnn", "swav")
"""Fixed, so that a new recipe does not change the digest of the existing stores."""


@functools.cache
def replay_digest(device: str | None = None) -> str:
    """Returns the sha256 of a decoded built-in JPEG and of crops of it: 16 per recipe in `DIGEST_RECIPES`, at 4 sizes each.

    Args:
        device: torch device that makes the crops. Default: the CPU, with `replay`.
    """
    make = replay
    if device is not None:
        from fkd_ssl.crops.device import replay_on

        make = functools.partial(replay_on, device)
    data = resources.files("fkd_ssl.crops").joinpath("digest.jpg").read_bytes()
    image = decode(data, Path("digest.jpg"))
    height, width = image.shape[:2]
    digest = hashlib.sha256(np.ascontiguousarray(image).tobytes())
    for name in DIGEST_RECIPES:
        records = draw(RECIPES[name], image_key(0, f"probe/{name}"), height, width, 0, 16)
        for pixels in (224, 98, 96, 64):
            digest.update(make(image, records, pixels).tobytes())
    return digest.hexdigest()
