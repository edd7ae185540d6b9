"""Semantic segmentation from frozen feature maps: a linear layer, and nearest neighbours without training.

Linear: BatchNorm and a 1 x 1 convolution on the last map, as DINOv2 (Oquab et al., arXiv 2304.07193, section 7.4) does it: the
scores are interpolated bilinearly to the size of the mask, and the loss is the cross-entropy of its pixels, with AdamW, linear
warm-up and decay of the learning rate, and batches of 16 images. Three things differ, so that the maps can be computed once
and the layer takes seconds: images are used whole and unchanged instead of as augmented crops of 512 px; a step uses POINTS
random pixels of a mask instead of all; and there are 10 epochs, at least 500 steps, instead of 40,000 steps, with a learning
rate of 1e-2 instead of 1e-3.

Nearest neighbours (Balazevic et al., "Towards In-Context Scene Understanding", NeurIPS 2023, arXiv 2306.01667): positions of
training maps vote for the shares of the classes in their cell of the mask, with weights exp(cosine / T); the votes are
interpolated like the scores. One thing differs: a fixed number of positions is drawn at random, where the paper samples
positions of rare classes more often.

Legend: `B` images in a batch, `n` images, `h` x `w` positions of a map, `F` channels, `H` x `W` pixels of a mask, `C` classes,
`S` sampled pixels, `M` positions in the bank.
"""

import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm.auto import tqdm

from fkd_ssl.arrays import Float32Array, Int64Array, UInt8Array
from fkd_ssl.errors import RequestError
from fkd_ssl.eval import iou, maps, search
from fkd_ssl.eval.features import check_counts, frozen
from fkd_ssl.eval.grids import classes_at, on_grid, sample, shares_of
from fkd_ssl.eval.maps import COLOURS, Maps
from fkd_ssl.eval.masks import IGNORED, Masked, lookup_of
from fkd_ssl.eval.probe import initial_layer
from fkd_ssl.progress import bar_disabled

EPOCHS, STEPS, LR, BATCH_SIZE, WEIGHT_DECAY, WARMUP = 10, 500, 1e-2, 16, 1e-4, 0.0375
"""Epochs and minimum number of steps; warm-up as a share of the steps."""
K, TEMPERATURE = 30, 0.02
POINTS = 1024
"""Pixels of each training mask that the linear layer learns from."""
BANK = 50_000
"""Positions of training maps among which neighbours are searched."""
NAMES = {"colours": "colour and place", "colours_knn": "kNN of colour and place", "majority": "most frequent class"}
"""The baselines in words."""


@dataclass(frozen=True, kw_only=True)
class _Example:
    """A training image."""

    size: tuple[int, int]
    positions: dict[str, Tensor]
    """float32 [h w, F] of the model, and [h w, COLOURS]."""
    points: Tensor
    """Places of the sampled pixels [S, 2], x and y from -1 to 1."""
    labels: Tensor
    """int64 [S]."""
    banked: Int64Array
    """Positions in the bank."""
    shares: Float32Array
    """Shares of the classes in the cells of these positions [len(banked), C]."""


def map_bytes(model: Maps, train: Masked, *, pixels: int, multiple: int = 32) -> tuple[int, tuple[int, int, int]]:
    """Estimates the bytes of memory of the training images in `evaluate`. Also returns the map (h, w, F) of the first one.

    Raises:
        FkdError: The output of the model is not a map.
    """
    sizes = [maps.resized(size, pixels, multiple) for size in train.sizes]
    with frozen(model), torch.no_grad():
        h, w, dim = maps.checked(model(torch.zeros(1, 3, *sizes[0], dtype=torch.uint8)), 1).shape[1:]
    area = sum(height * width for height, width in sizes) / math.prod(sizes[0])
    bank = min(BANK, round(area * h * w))
    return round(4 * (area * h * w + bank) * (dim + COLOURS)) + len(train) * POINTS * 16, (h, w, dim)


def evaluate(
    *,
    model: Maps,
    train: Masked,
    val: Masked,
    classes: Sequence[tuple[int, str]],
    pixels: int,
    multiple: int = 32,
    steps: int | None = None,
    lr: float = LR,
    batch_size: int = BATCH_SIZE,
    k: int = K,
    temperature: float = TEMPERATURE,
    seed: int = 0,
    device: torch.device | str = "cpu",
    workers: int = 2,
    progress: bool = True,
    skipped: set[str] | None = None,
) -> dict[str, Any]:
    """Segments `val` by a linear layer and by nearest neighbours, both made from `train`.

    An `nn.Module` is in eval mode during the call, and no gradient is computed through it. The maps of the training images are
    held in memory (`map_bytes`).

    Args:
        model: uint8 [B, 3, H, W] -> float [B, h, w, F].
        train: Images to learn from.
        val: Images to score.
        classes: Labels and names, see `masks.classes_of`.
        pixels: P, the short side of the images.
        multiple: Both sides are rounded to a multiple of this, see `maps.multiple_of`.
        steps: Steps of the linear layer's training; by default EPOCHS, at least STEPS.
        lr: Its learning rate.
        batch_size: Its images per step.
        k: Number of neighbours; reduced to M if larger.
        temperature: T of their weights exp(cosine / T).
        seed: Seed for the initial weights, the order of images, and the drawn pixels and positions.
        device: Where the layer is trained and neighbours are searched.
        workers: Processes that read images.
        progress: Show bars on standard error.
        skipped: Collects the error message of each damaged image, which is left out. By default the first error is raised.

    Returns:
        `miou` and `pixel_accuracy` of the linear layer and `knn_miou` and `knn_pixel_accuracy` of the neighbours, in percent;
        `interval95` and `knn_interval95`, 95 % bootstrap intervals over images; `per_class` with `iou`, `knn_iou` (None
        without pixels) and `share`, the class's share of the pixels, in percent; `baselines`, the mean IoU of `colours` and
        `colours_knn` (the same protocols on the mean and deviation of the colour in each cell, and its place), and of
        `majority` (the most frequent class everywhere); `counts` int64 [n, 3, C], see `iou`; `map`, `feature_dim`; `history`;
        `n_train`, `n_val`, `classes`, the settings, and `notes`.

    Raises:
        RequestError: A number is invalid, or no image to score has a labelled pixel.
        ImageError: An image is damaged and `skipped` is None, or all images are damaged.
        FkdError: The model's output is not a finite map.
    """
    check_counts(pixels=pixels, batch_size=batch_size, k=k, **({} if steps is None else {"steps": steps}))
    if not (lr > 0 and math.isfinite(lr) and temperature > 0):
        raise RequestError(f"lr and temperature must be positive, got {lr} and {temperature}")
    labels = [label for label, _ in classes]
    lookup, count = lookup_of(classes), len(classes)
    used = {name: np.flatnonzero(part.pixels[:, labels].any(axis=1)) for name, part in (("train", train), ("val", val))}
    for part, rows in ((train, used["train"]), (val, used["val"])):
        if not len(rows):
            raise RequestError(f"{part.masks.spec}: no mask has a pixel of the classes")
    options: dict[str, Any] = {
        "pixels": pixels,
        "multiple": multiple,
        "workers": workers,
        "progress": progress,
        "skipped": skipped,
    }
    examples: list[_Example] = []
    each = math.ceil(BANK / len(used["train"]))
    for index, size, positions in maps.extract(model, train, used["train"], desc="maps of train", **options):
        generator = np.random.default_rng([seed, index])
        examples.append(_example(train.labels(index, lookup), size, positions, count, each, generator))
    keys = ("model", "colours")
    default_steps = max(STEPS, EPOCHS * len(examples) // batch_size)
    training: dict[str, Any] = {
        "steps": steps or default_steps,
        "lr": lr,
        "batch_size": min(batch_size, len(examples)),
        "seed": seed,
    }
    heads, histories = {}, {}
    for key in keys:
        heads[key], histories[key] = _fit(examples, key, count, device=device, progress=progress, **training)
    banks = {key: np.concatenate([one.positions[key].numpy()[one.banked] for one in examples]) for key in keys}
    shares = torch.from_numpy(np.concatenate([one.shares for one in examples]))
    neighbours = min(k, len(shares))
    dim = banks["model"].shape[1]
    n_train = len(examples)
    del examples
    counts = {name: np.zeros((len(used["val"]), 3, count), dtype=np.int64) for name in ("model", "model_knn", *list(NAMES)[:2])}
    place = {int(index): row for row, index in enumerate(used["val"])}
    shape = (0, 0)
    for index, size, positions in maps.extract(model, val, used["val"], desc="maps of val", **options):
        truth = torch.from_numpy(val.labels(index, lookup)).to(device)
        shape = shape if any(shape) else size
        for key in keys:
            with torch.no_grad():
                scores = heads[key](positions[key].to(device))
            voted = _votes(banks[key], shares, positions[key], neighbours, temperature, device)
            for name, found in ((key, scores), (f"{key}_knn", voted)):
                counts[name][place[index]] = iou.count(classes_at(on_grid(found, size), *truth.shape), truth, count)
    scored = counts["model"][:, 2].any(axis=1)  # all but damaged images
    counts = {name: found[scored] for name, found in counts.items()}
    true = counts["model"][:, 2]
    majority = int(train.pixels[:, labels].sum(axis=0).argmax())
    constant = np.zeros((3, count), dtype=np.int64)
    constant[0, majority], constant[1, majority], constant[2] = true[:, majority].sum(), true.sum(), true.sum(axis=0)
    sums = {name: found.sum(axis=0) for name, found in counts.items()} | {"majority": constant}
    names = [name for _, name in classes]
    return {
        **_scores("", counts["model"]),
        **_scores("knn_", counts["model_knn"]),
        "per_class": _per_class(names, sums["model"], sums["model_knn"]),
        "baselines": {name: float(iou.mean(sums[name])) for name in NAMES},
        "counts": counts["model"],
        "map": list(shape),
        "feature_dim": dim,
        "pixels": pixels,
        "multiple": multiple,
        **training,
        "weight_decay": WEIGHT_DECAY,
        "k": neighbours,
        "temperature": temperature,
        "bank": len(shares),
        "n_train": n_train,
        "n_val": len(true),
        "classes": count,
        "history": histories["model"],
        "notes": _notes(train, val, used, classes, sums["model"])
        + [
            f"departs from the default protocol: {name} {value:g} instead of {default:g}"
            for name, value, default in (
                ("steps", steps or default_steps, default_steps),
                ("lr", lr, LR),
                ("batch_size", batch_size, BATCH_SIZE),
            )
            if value != default
        ],
    }


def _example(
    labels: UInt8Array,
    size: tuple[int, int],
    positions: dict[str, Tensor],
    classes: int,
    banked: int,
    generator: np.random.Generator,
) -> _Example:
    """Draws pixels of a mask, class indices [H, W], and positions for the bank."""
    height, width = labels.shape
    scored = np.flatnonzero(labels.ravel() != IGNORED)
    chosen = scored[generator.integers(0, len(scored), size=POINTS)]
    y, x = np.divmod(chosen, width)
    points = np.stack([(2 * x + 1) / width - 1, (2 * y + 1) / height - 1], axis=1).astype(np.float32)
    shares = shares_of(labels, size, classes)
    candidates = np.flatnonzero(shares.any(axis=1))
    rows = generator.permutation(candidates)[:banked]
    return _Example(
        size=size,
        positions=positions,
        points=torch.from_numpy(points),
        labels=torch.from_numpy(labels.ravel()[chosen].astype(np.int64)),
        banked=rows,
        shares=shares[rows],
    )


def _fit(
    examples: Sequence[_Example],
    key: str,
    classes: int,
    *,
    steps: int,
    lr: float,
    batch_size: int,
    seed: int,
    device: torch.device | str,
    progress: bool,
) -> tuple[nn.Module, list[dict[str, float]]]:
    """Trains BatchNorm and a linear layer on positions; returns it in eval mode, and the learning rate and loss over time."""
    dim = examples[0].positions[key].shape[1]
    head = nn.Sequential(nn.BatchNorm1d(dim), initial_layer(dim, classes, seed)).to(device)
    optimizer = torch.optim.AdamW(head.parameters(), lr=lr, weight_decay=WEIGHT_DECAY)
    warmup = max(1, round(WARMUP * steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / warmup) * (1 - step / steps))
    history: list[dict[str, float]] = []
    losses: list[Tensor] = []
    each = max(1, steps // 20)
    batches = _batches(len(examples), batch_size, seed)
    with tqdm(total=steps, desc=f"linear, {key}", unit="step", file=sys.stderr, disable=bar_disabled(show=progress)) as bar:
        for step in range(1, steps + 1):
            batch = [examples[index] for index in next(batches)]
            scores = head(torch.cat([one.positions[key] for one in batch]).to(device))
            parts = scores.split([one.size[0] * one.size[1] for one in batch])
            found = [sample(on_grid(part, one.size), one.points.to(device)) for part, one in zip(parts, batch, strict=True)]
            loss = functional.cross_entropy(torch.cat(found), torch.cat([one.labels for one in batch]).to(device))
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            losses.append(loss.detach())
            if step % each == 0 or step == steps:
                mean = float(torch.stack(losses).mean())
                if not math.isfinite(mean):
                    raise RequestError(f"the linear layer's loss is {mean} at step {step}; choose a lower lr")
                history.append({"step": step, "lr": float(schedule.get_last_lr()[0]), "loss": mean})
                bar.set_postfix(loss=f"{mean:.4f}", refresh=False)
                losses = []
            schedule.step()
            bar.update()
    return head.eval(), history


def _batches(images: int, batch_size: int, seed: int) -> Iterator[list[int]]:
    """Batches of images without end: each epoch is a new permutation without its last, smaller batch."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(images, generator=generator).tolist()
        for first in range(0, images - batch_size + 1, batch_size):
            yield order[first : first + batch_size]


def _votes(
    bank: Float32Array, shares: Tensor, queries: Tensor, k: int, temperature: float, device: torch.device | str
) -> Tensor:
    """Shares of the classes [h w, C] by the k nearest positions of the bank, weighted by exp(cosine / T)."""
    votes = torch.empty(len(queries), shares.shape[1])
    for rows, similarity, neighbours in search.nearest(bank, queries.numpy(), k, device=device):
        weights = torch.softmax(torch.from_numpy(similarity).double() / temperature, dim=1).float()
        votes[rows] = torch.einsum("qk,qkc->qc", weights, shares[torch.from_numpy(neighbours)])
    return votes.to(device)


def _scores(prefix: str, counts: Int64Array) -> dict[str, Any]:
    sums = counts.sum(axis=0)
    return {
        f"{prefix}miou": float(iou.mean(sums)),
        f"{prefix}pixel_accuracy": iou.pixel_accuracy(sums),
        f"{prefix}interval95": list(iou.interval(counts)),
    }


def _per_class(names: Sequence[str], linear: Int64Array, knn: Int64Array) -> dict[str, dict[str, float | None]]:
    total = linear[2].sum()
    rows = zip(names, iou.per_class(linear), iou.per_class(knn), linear[2], strict=True)
    return {
        name: {
            "iou": None if math.isnan(one) else float(one),
            "knn_iou": None if math.isnan(other) else float(other),
            "share": 100 * float(pixels / total),
        }
        for name, one, other, pixels in rows
    }


def _notes(
    train: Masked, val: Masked, used: dict[str, Int64Array], classes: Sequence[tuple[int, str]], sums: Int64Array
) -> list[str]:
    notes = []
    for part, name in ((train, "train"), (val, "val")):
        if left := len(part) - len(used[name]):
            notes.append(f"{left} of {len(part)} images of {name} have only ignored pixels and were left out")
        if absent := [label for label, _ in classes if not part.pixels[:, label].any()]:
            named = ", ".join(dict(classes)[label] for label in absent[:5]) + (", ..." if len(absent) > 5 else "")
            notes.append(f"no mask of {name} has a pixel of {len(absent)} of the {len(classes)} classes ({named})")
    if train.images.digest() == val.images.digest():
        notes.append("val has the same images as train; use other images")
    return notes
