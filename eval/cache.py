"""Cache of features: a folder of memory-mapped .npy files, keyed by model, images and transform.

CACHE/KEY/ has `about.json` (the data that the key is a digest of), `labels.npy` int64 [N], `features.npy` float32 [N, D],
`baselines.npy` float32 [N, baselines.DIM], and `done.json` (the sha256 of these arrays), written last; until then it has parts
of 2048 images. Several processes can fill one entry. Each part is computed by the process that holds its lock. The lock ends
with the process, so another one continues if a process is killed, and no image is computed twice. NumPy alone can read the
arrays.

Legend: `N` images, `D` feature dimension, `P` pixels.
"""

import hashlib
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from fkd_ssl import files, locks
from fkd_ssl.arrays import Float32Array, Int64Array
from fkd_ssl.crops.digest import replay_digest
from fkd_ssl.errors import FkdError, ImageError, StoreError
from fkd_ssl.eval import baselines
from fkd_ssl.eval.features import Model, checked, extract_rows, frozen
from fkd_ssl.images import ImageSource
from fkd_ssl.progress import advance_done, bar_disabled

ROWS = 2048
VERSION = 2
_TOLERANCE = 0.01  # allowed relative difference of a model's outputs; TF32, bfloat16 and another machine stay below it


def transform_of(pixels: int) -> dict[str, Any]:
    """The evaluation transform, for cache keys and results."""
    return {"resize": round(8 / 7 * pixels), "centre_crop": pixels, "pixels_sha256": replay_digest()}


def cached(
    model: Model,
    images: ImageSource,
    *,
    folder: Path,
    identity: str,
    pixels: int,
    batch_size: int = 256,
    workers: int = 2,
    progress: bool = True,
    desc: str = "features",
    skipped: set[str] | None = None,
) -> tuple[Float32Array, Float32Array, Int64Array, Path]:
    """Like `extract_rows`, but maps features that are stored in the cache, and stores those that it computes.

    Args:
        model: uint8 [B, 3, P, P] -> float [B, D].
        images: Of any sizes.
        folder: CACHE; made if it is missing.
        identity: Identifies the model, for instance a digest of its weights, layers and preprocessing.
        pixels: P.
        batch_size: Images the model gets at once.
        workers: Processes that decode.
        progress: Show a bar on standard error.
        desc: Title of the bar.
        skipped: As in `extract`. Also collects messages for images that an earlier call skipped.

    Returns:
        Features float32 [N, D] and those of the baselines, mapped and read-only; indices of the images int64 [N]; and the
        entry's folder.

    Raises:
        StoreError: An entry is damaged, or was made by a model of the same identity with other outputs.
        RequestError, ImageError, FkdError: As `extract`.
    """
    inputs = {"version": VERSION, "model": identity, "images": images.digest(), "n": len(images), **transform_of(pixels)}
    entry = folder / files.sha256(files.canonical(inputs))[:20]
    entry.mkdir(parents=True, exist_ok=True)
    files.remove_leftovers(entry)
    files.write_json(entry / "about.json", {**inputs, "classes": images.classes})
    _check_outputs(model, entry, images, pixels)
    parts = [entry / f"part-{row // ROWS:06d}.npy" for row in range(0, len(images), ROWS)]
    with tqdm(total=len(parts), desc=desc, unit="part", file=sys.stderr, disable=bar_disabled(show=progress)) as bar:
        while not (entry / "done.json").exists():
            advance_done(bar, sum(part.exists() for part in parts) - int(bar.n))
            busy = False
            for number, part in enumerate(parts):
                if part.exists():
                    continue
                with locks.locked(part.with_name(f".lock-{number:06d}")) as ours:
                    busy |= not ours
                    if not ours or part.exists() or (entry / "done.json").exists():
                        continue
                    rows = np.arange(number * ROWS, min((number + 1) * ROWS, len(images)))
                    subset = images.subset(rows)
                    files.write_npy(part, _part(model, subset, pixels, batch_size, workers, skip=skipped is not None))
                    bar.update()
            if busy:
                time.sleep(0.2)  # other processes compute the rest
            elif not (entry / "done.json").exists():
                _assemble(entry, parts, images)
    done = files.read_json(entry / "done.json")
    unreadable = done.get("unreadable", [])
    if not isinstance(unreadable, list) or not all(type(row) is int and 0 <= row < len(images) for row in unreadable):
        raise StoreError(f"{entry / 'done.json'}: invalid list of unreadable images; delete the folder {entry}")
    messages = [f"{images.where(row)}: could not be read when its features were computed" for row in unreadable]
    if messages and skipped is None:
        raise ImageError(messages[0])
    count = len(images) - len(unreadable)
    features = files.map_npy(entry / "features.npy", np.dtype(np.float32), (count, None))
    baseline = files.map_npy(entry / "baselines.npy", np.dtype(np.float32), (count, baselines.DIM))
    for name in ("features", "baselines", "labels"):
        if files.sha256_file(entry / f"{name}.npy") != done.get(name):
            raise StoreError(f"{entry / name}.npy: altered: its sha256 is not the one in done.json; delete the folder {entry}")
    if skipped is not None:
        skipped.update(messages)
    return features, baseline, np.delete(np.arange(len(images)), unreadable), entry


def _part(model: Model, images: ImageSource, pixels: int, batch_size: int, workers: int, *, skip: bool) -> Float32Array:
    """Features of a part's images, with the baselines': NaN for skipped images; no columns if all are skipped."""
    skipped: set[str] | None = set() if skip else None
    try:
        found, rows = extract_rows(
            model,
            images,
            pixels=pixels,
            batch_size=batch_size,
            workers=workers,
            progress=False,
            skipped=skipped,
            with_baselines=True,
        )
    except ImageError:
        if not skip:
            raise
        found, rows = np.empty((0, 0), dtype=np.float32), np.empty(0, dtype=np.int64)
    features = np.full((len(images), found.shape[1]), np.nan, dtype=np.float32)
    features[rows] = found
    return features


def _assemble(entry: Path, parts: list[Path], images: ImageSource) -> None:
    """Joins the parts and writes done.json."""
    with locks.locked(entry / ".lock-all") as ours:
        if not ours or (entry / "done.json").exists():
            time.sleep(0.2)
            return
        arrays = [files.map_npy(part, np.dtype(np.float32), (None, None)) for part in parts]
        dims = {array.shape[1] for array in arrays if array.shape[1]}
        if len(dims) > 1:
            raise FkdError(f"{entry}: its parts have different numbers of dimensions, {sorted(dims)}; delete the folder")
        if not dims:
            raise ImageError(f"{images.spec}: none of its {len(images)} images can be read")
        readable = [np.isfinite(array).all(axis=1) & (array.shape[1] > 0) for array in arrays]
        rows = np.concatenate(readable)
        own = dims.pop() - baselines.DIM
        done: dict[str, Any] = {"unreadable": np.flatnonzero(~rows).tolist()}
        for name, columns in (("features", slice(own)), ("baselines", slice(own, None))):
            digest = hashlib.sha256()
            size = own if name == "features" else baselines.DIM
            with files.create(entry / f"{name}.npy") as file:
                digest.update(header := files.npy_header(np.dtype(np.float32), (int(rows.sum()), size)))
                file.write(header)
                for array, keep in zip(arrays, readable, strict=True):
                    if keep.any():
                        digest.update(piece := np.ascontiguousarray(array[keep, columns]).data)
                        file.write(piece)
            done[name] = digest.hexdigest()
        done["labels"] = files.write_npy(entry / "labels.npy", images.labels[rows])
        files.write_json(entry / "done.json", done)
        for path in (*parts, *entry.glob(".lock-0*")):
            with suppress(FileNotFoundError):
                path.unlink()


def _check_outputs(model: Model, entry: Path, images: ImageSource, pixels: int) -> None:
    """Raises StoreError if the model's outputs for noise differ from those of the model that made the entry.

    This detects a rewritten function with the same name and weights.
    """
    noise = np.random.default_rng(0).integers(0, 256, size=(2, 3, pixels, pixels), dtype=np.uint8)
    with frozen(model), torch.inference_mode():
        outputs = checked(model(torch.from_numpy(noise)), images, torch.zeros(2, dtype=torch.int64)).cpu().numpy()
    path = entry / "noise.npy"
    if not path.exists():
        with suppress(StoreError):  # another process wrote it first, with values that differ in the last bits
            files.write_npy(path, outputs)
    before = files.map_npy(path, np.dtype(np.float32), (2, None))
    if (
        before.shape != outputs.shape
        or (np.linalg.norm(before - outputs, axis=1) > _TOLERANCE * np.linalg.norm(before, axis=1)).any()
    ):
        raise StoreError(
            f"{entry}: a model of the same weights and layers made these features, but gives other outputs now (did its code "
            "change?); delete the folder, or choose another --features"
        )
