"""A comparison that uses an existing store."""

from collections.abc import Sequence
from dataclasses import replace

from fkd_ssl.comparison.config import CompareConfig
from fkd_ssl.crops import Recipe
from fkd_ssl.errors import RequestError
from fkd_ssl.images import ImageSource
from fkd_ssl.store import Store
from fkd_ssl.store.write.columns import Request
from fkd_ssl.store.write.prepare import check_store
from fkd_ssl.targets.info import difference
from fkd_ssl.teachers import Teacher


def use_store(
    config: CompareConfig, store: Store, images: ImageSource, teachers: Sequence[Teacher], recipe: Recipe
) -> CompareConfig:
    """Returns a config with the crops per image, the codec and the crop size of an existing store.

    Args:
        config: The comparison.
        store: The store that it names.
        images: Its training images.
        teachers: Its teachers.
        recipe: Its recipe, which online arms draw crops from.

    Raises:
        RequestError: The store lacks a teacher, or was made from other images, with another teacher or other options.
        StoreError: A column is not complete.
    """
    crops = store.crops_per_image if config.crops is None else config.crops
    check_store(store, images, seed=store.manifest.seed, recipe=recipe, crops=crops)
    codecs, sizes = set(), set()
    for teacher in teachers:
        column = store.column(teacher.info.name)
        column.require_complete()
        codec, pixels = config.codec or column.meta.codec, config.pixels or column.meta.teacher.pixels
        request = Request(name=column.name, teacher=teacher, codec=codec, pixels=pixels, chunk_size=column.meta.chunk_size)
        wanted = {**request.meta(), "replay_digest": column.meta.replay_digest}  # `train` warns of other pixels
        if other := difference(column.meta.to_json(), wanted):
            raise RequestError(f"{column.folder}: this column's {other}; give the same, or leave out --store")
        codecs.add(codec)
        sizes.add(pixels)
    if len(sizes) > 1:
        raise RequestError(f"{store.folder}: its teachers saw crops of {min(sizes)} and {max(sizes)} px; expected one size")
    return replace(config, crops=crops, codec=codecs.pop() if len(codecs) == 1 else None, pixels=sizes.pop())
