"""Precompute as tasks of a Ray cluster: one a shard, tried again when its worker or its machine is lost."""

import functools
import importlib
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fkd_ssl.commands.precompute import Config, load_all, teachers_of, write
from fkd_ssl.errors import FkdError, RequestError

if TYPE_CHECKING:
    from fkd_ssl.images import ImageSource
    from fkd_ssl.store.write.precompute import Summary
    from fkd_ssl.teachers import Teacher

RETRIES = 20  # of one shard: preemption is no fault of its


def precompute(config: Config, *, log: Callable[[str], None]) -> "Summary":
    """Runs the shards of a precompute on Ray; every machine must see the images, the checkpoint and the store.

    The first task makes the store and its codec with the first shard; the others follow, each on a processor (and a GPU, if
    the cluster has any) of its own. What a lost task had done of its shard is not done again.

    Raises:
        RequestError: Ray is not installed.
        FkdError: A shard failed on every try.
    """
    try:
        ray: Any = importlib.import_module("ray")
    except ImportError as error:
        raise RequestError("--runner ray needs Ray: pip install 'fkd_ssl[ray]'") from error
    from tqdm import tqdm

    from fkd_ssl.progress import hidden

    started = time.perf_counter()
    began = not ray.is_initialized()
    if began:
        ray.init(log_to_driver=False)
    waiting: dict[Any, int] = {}
    try:
        resources: dict[str, float] = ray.cluster_resources()
        processors, gpus = resources.get("CPU", 0), resources.get("GPU", 0)
        log(f"Ray: {processors:.0f} processors, {gpus:.0f} GPUs; a shard is a task on one {'GPU' if gpus else 'processor'}")
        task = ray.remote(num_cpus=1, num_gpus=1 if gpus else 0, max_retries=RETRIES)(_shard)
        config = _absolute(config)
        summary = _result(ray, task.remote(config, 0))
        waiting = {task.remote(config, shard): shard for shard in range(1, summary.shards)}
        with tqdm(total=summary.shards, initial=1, desc="precompute", unit="shard", disable=hidden(show=True)) as bar:
            while waiting:
                (ready,), _ = ray.wait(list(waiting), num_returns=1)
                del waiting[ready]
                last = _result(ray, ready)
                bar.update(1)
                summary = replace(
                    summary,
                    crops=summary.crops + last.crops,
                    busy=sorted({*summary.busy, *last.busy}),
                    store_bytes=max(summary.store_bytes, last.store_bytes),
                )
        return replace(summary, seconds=time.perf_counter() - started, left=[])
    finally:
        for reference in waiting:
            ray.cancel(reference)
        if began:
            ray.shutdown()


def _absolute(config: Config) -> Config:
    """The config with paths that mean the same from any folder."""
    files = [_anywhere(teacher, file) for teacher, file in teachers_of(config)]
    return replace(
        config,
        images=str(Path(config.images).absolute()) if Path(config.images).exists() else config.images,
        store=str(Path(config.store).absolute()),
        checkpoint=None if config.checkpoint is None else ",".join(files),
        threads=config.threads or 1,
        runner="here",
    )


def _anywhere(teacher: str, checkpoint: str | None) -> str:
    """A teacher's checkpoint likewise, or F+G of A+B; what is no path stays as it is."""
    parts = (checkpoint or "").split("+") if "+" in teacher else [checkpoint or ""]
    return "+".join(part if part.strip() in ("", "pretrained") else str(Path(part.strip()).absolute()) for part in parts)


def _result(ray: Any, reference: Any) -> "Summary":
    """What a task returned; raises FkdError where it failed."""
    try:
        summary: Summary = ray.get(reference)
        return summary
    except ray.exceptions.RayTaskError as error:
        cause = getattr(error, "cause", None)
        if isinstance(cause, FkdError):
            raise cause from error
        raise FkdError(f"a Ray task failed: {str(error).strip().splitlines()[-1]}") from error
    except ray.exceptions.RayError as error:
        raise FkdError(f"Ray lost a task {RETRIES + 1} times: {str(error).strip().splitlines()[0]}; run it again") from error


def _shard(config: Config, shard: int) -> "Summary":
    """One shard, in a worker."""
    from fkd_ssl.store.write.precompute import Share

    return write(config, share=Share(index=shard, of=2**62), progress=False, log=lambda message: None, load=_loaded)


@functools.cache
def _loaded(config: Config) -> "tuple[ImageSource, list[Teacher]]":
    """Images and teachers, once for all tasks of a worker."""
    return load_all(config)
