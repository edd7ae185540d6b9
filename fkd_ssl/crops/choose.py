"""Decides by a short measurement whether a GPU or the CPU makes the crops."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from fkd_ssl.crops.device import PendingCrops, check_device, concatenate, plan_crops, replay_plan
from fkd_ssl.crops.digest import replay_digest
from fkd_ssl.crops.recipes import Recipe, draw, image_key
from fkd_ssl.crops.replay import replay
from fkd_ssl.errors import ImageError, RequestError
from fkd_ssl.images import ImageSource, decode

IMAGES = 8
CROPS = 64  # maximum number of crops per image that are measured
GAIN = 1.05  # the GPU must be faster by this factor, since a short measurement is uncertain


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Seconds per crop of each step. Those of the CPU are for one thread or process."""

    decode: float
    replay: float
    plan: float
    """Joining the images and planning their crops."""
    device: float
    """Copying the images to the GPU and making the crops there."""
    network: float = 0.0
    """The network that sees the crops, if it was measured."""

    def on_cpu(self, workers: int) -> float:
        """Seconds per crop if `workers` threads or processes make the crops while the network runs."""
        return max((self.decode + self.replay) / workers, self.network)

    def on_device(self, workers: int) -> float:
        """Seconds per crop if `workers` only decode. The GPU makes the crops and runs the network, one after the other."""
        return max(self.decode / workers, self.plan, self.device + self.network)


def choose(
    images: ImageSource,
    recipe: Recipe,
    *,
    crops: int,
    sides: Sequence[int],
    workers: int,
    device: torch.device,
    network: Callable[[], float] = lambda: 0.0,
    log: Callable[[str], None],
) -> bool:
    """Returns whether the crops should be made on `device`, and logs the choice. On a CPU, returns False without a measurement.

    Args:
        images: The image set.
        recipe: Recipe of the crops.
        crops: Number of crops that are made of an image at a time.
        sides: Sides of the crops.
        workers: Number of threads or processes that read images.
        device: The device of the network.
        network: Returns the seconds per crop of the network that sees the crops.
        log: Called with a line for the user.
    """
    if device.type != "cuda":
        return False
    log("measuring whether the GPU or the CPU makes crops faster; the first time, Triton compiles its kernels")
    try:
        check_device(device)
    except RequestError as error:
        log(f"crops are made on the CPU: {error}")
        return False
    if replay_digest(str(device)) != replay_digest():
        log("crops are made on the CPU: this GPU makes slightly different pixels")
        return False
    rates = measure(images, recipe, crops=min(crops, CROPS), sides=sides, device=device, network=network)
    if rates is None:
        return False
    on_cpu, on_device = rates.on_cpu(max(1, workers)), rates.on_device(max(1, workers))
    chosen = on_cpu > GAIN * on_device
    log(
        f"crops are made on the {'GPU' if chosen else 'CPU'}: measured {1 / on_device:,.0f} crops a second with the GPU, "
        f"{1 / on_cpu:,.0f} without it (set it with --device_crops on or off)"
    )
    return chosen


def measure(
    images: ImageSource,
    recipe: Recipe,
    *,
    crops: int,
    sides: Sequence[int],
    device: torch.device,
    network: Callable[[], float] = lambda: 0.0,
) -> Rates | None:
    """Measures the steps on a few images; returns None if none of them can be read. Arguments are those of `choose`."""
    decoded = []
    started = time.perf_counter()
    for index in range(min(IMAGES, len(images))):  # the first ones, since others may have to be fetched
        try:
            decoded.append((images.names[index], decode(images.read(index), images.where(index))))
        except ImageError:  # reported when the image is used
            continue
    read = time.perf_counter() - started
    if not decoded:
        return None
    pending = []
    for name, image in decoded:
        records = draw(recipe, image_key(0, name), image.shape[0], image.shape[1], 0, crops)
        pending.append(PendingCrops(image=image, records=records))
    started = time.perf_counter()
    for one in pending:
        for side in sides:
            replay(one.image, one.records, side)
    made = time.perf_counter() - started

    def on_device() -> tuple[float, float]:
        started = time.perf_counter()
        plans = [plan_crops(pending, side, concatenate(pending)) for side in sides]
        if device.type == "cuda":  # as in precompute and by a DataLoader; other memory is copied at a fraction of the speed
            plans = [plan.pin_memory() for plan in plans]
        planned = time.perf_counter()
        for plan in plans:
            replay_plan(plan.to(device))
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return planned - started, time.perf_counter() - planned

    on_device()  # compiles the kernels
    plan, there = min(on_device() for _ in range(3))
    count = len(decoded) * crops
    return Rates(decode=read / count, replay=made / count, plan=plan / count, device=there / count, network=network())
