"""Writes shards as tasks of a Ray cluster; retries them if a worker or a machine is lost."""

import importlib
import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from fkd_ssl.errors import FkdError, RequestError

if TYPE_CHECKING:
    from fkd_ssl.store.write.precompute import Summary

RETRIES = 20  # per shard, since workers may be preempted


def run(write: "Callable[[Any, int], Summary]", config: Any, *, log: Callable[[str], None]) -> "Summary":
    """Writes the shards of a store on Ray. Every machine must see the same files under the same paths.

    The first task creates the store, its codec and the first shard. The other tasks follow, each on its own processor (and GPU,
    if the cluster has any). A retried task continues the shard where the lost one stopped.

    Args:
        write: Called as write(config, shard) in a worker; a module-level function.
        config: First argument of `write`.
        log: Called with each line for the user.

    Raises:
        RequestError: Ray is not installed.
        FkdError: A shard failed on every try.
    """
    try:
        ray: Any = importlib.import_module("ray")
    except ImportError as error:
        raise RequestError("--runner ray needs Ray: pip install 'fkd_ssl[ray]'") from error
    from tqdm.auto import tqdm

    from fkd_ssl.progress import bar_disabled

    started = time.perf_counter()
    began = not ray.is_initialized()
    if began:
        ray.init(log_to_driver=False)
    waiting: dict[Any, int] = {}
    try:
        resources: dict[str, float] = ray.cluster_resources()
        processors, gpus = resources.get("CPU", 0), resources.get("GPU", 0)
        log(f"Ray: {processors:.0f} processors, {gpus:.0f} GPUs; a shard is a task on one {'GPU' if gpus else 'processor'}")
        task = ray.remote(num_cpus=1, num_gpus=1 if gpus else 0, max_retries=RETRIES)(write)
        summary = _result(ray, task.remote(config, 0))
        worked = summary.seconds
        waiting = {task.remote(config, shard): shard for shard in range(1, summary.shards)}
        with tqdm(total=summary.shards, initial=1, desc="precompute", unit="shard", disable=bar_disabled(show=True)) as bar:
            while waiting:
                (ready,), _ = ray.wait(list(waiting), num_returns=1)
                del waiting[ready]
                last = _result(ray, ready)
                bar.update(1)
                worked += last.seconds
                summary = replace(
                    summary,
                    crops=summary.crops + last.crops,
                    busy=sorted({*summary.busy, *last.busy}),
                    store_bytes=max(summary.store_bytes, last.store_bytes),
                    stages={name: seconds + last.stages[name] for name, seconds in summary.stages.items()},
                )
        busy = summary.stages["forward"] / worked
        return replace(summary, seconds=time.perf_counter() - started, left=[], teacher_busy=busy)
    finally:
        for reference in waiting:
            ray.cancel(reference)
        if began:
            ray.shutdown()


def _result(ray: Any, reference: Any) -> "Summary":
    """Returns the result of a task; raises FkdError if it failed."""
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
