"""Compares stored with online distillation over several seeds: table, curves and break-even.

Trains the same student with the same initial weights, order of images, schedule and epochs, once with targets from a store
and once with the teacher online. Scores the teacher and the trained and untrained students by kNN, a linear probe and
retrieval, and reports after how many students the store pays off. Finished arms are not run again, so you can add seeds or
further arms in the same --out. With two teachers A,B it trains students of A, of B and of both, stored and online (arms
stored:A, stored:B, stored:A+B, ...).
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fkd_ssl.comparison.config import CompareConfig as Config
from fkd_ssl.errors import FkdError, RequestError
from fkd_ssl.options import Named

if TYPE_CHECKING:
    from fkd_ssl.pretraining.config import PretrainConfig
    from fkd_ssl.results import Compared
    from fkd_ssl.store import Store
    from fkd_ssl.training.config import TrainConfig


def run(config: Config) -> int:
    """Prints the table."""
    from fkd_ssl.commands import console, results

    compared = work(config)
    results.show(compared, json=config.json)
    console.log(f"report: {compared.out}/report.html")
    return 0


def work(config: Config) -> "Compared":
    """Runs the comparison."""
    for name, value in vars(config).items():
        if isinstance(value, Named):
            raise RequestError(
                f"{name} {value}: compare trains in other processes, which cannot receive Python objects; pass a folder, or "
                "module:function"
            )
    from dataclasses import replace

    from fkd_ssl.commands import console, resolve
    from fkd_ssl.comparison import report
    from fkd_ssl.comparison.compare import Tools, compare
    from fkd_ssl.results import Compared
    from fkd_ssl.training.groups import teacher_precision

    folder = Path(config.out)
    tools = Tools(
        recipe=resolve.recipe_of(config.recipe),
        load_teachers=lambda: resolve.teachers_of(config.teacher, config.checkpoint, teacher_precision(config), config.grid),
        load_model=resolve.model_of,
        train=_train,
        device=resolve.device(),
        threads=min(16, resolve.cpu_threads()),
        log=console.log,
    )
    results = compare(replace(config, json=False), tools)  # the results do not depend on how they are printed
    text = report.write(results, folder, lambda store: _draw_sheet(config, store))
    return Compared(line=text, values=results, out=folder)


def _train(config: "TrainConfig | PretrainConfig") -> dict[str, Any]:
    """Runs `train` or `pretrain` in a separate process unless the run is finished; returns its results.

    Raises:
        FkdError: The training failed.
    """
    from fkd_ssl import files, processes, runs
    from fkd_ssl.commands import console
    from fkd_ssl.training.config import TrainConfig

    run = Path(config.out)
    if runs.peek(run, config) != "done":
        run.parent.mkdir(exist_ok=True)
        file = run.parent / f"{run.name}.yaml"
        files.replace(file, runs.to_yaml(config).encode())
        verb = "train" if isinstance(config, TrainConfig) else "pretrain"
        command = [sys.executable, "-P", "-m", "fkd_ssl", verb, "--config", str(file)]
        env = {**os.environ, processes.PARENT: str(os.getpid())}  # it ends with this process
        ended = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, env=env)  # noqa: S603
        if ended.returncode:
            runs.forget_contents(run.parent.parent)  # an unreadable image may be repaired before the next call
            raise FkdError(f"{run}: training ended with status {ended.returncode}; repeat the command to continue")
        console.log(ended.stdout.strip())
    return runs.read_results(run)


def _draw_sheet(config: Config, store: "Store") -> bytes:
    """Draws the contact sheet of an image in the middle of the store, as PNG."""
    from fkd_ssl.commands import show

    column = store.column(store.column_names[0])
    options = show.Config(
        store=str(store.folder),
        images=config.images,
        image=store.paths[int(column.rows[len(column.rows) // 2])],
        column=column.name,
        crops=min(4, store.crops_per_image),
        neighbours=min(5, len(column.rows) - 1),
    )
    return show.sheet_of(options, store)[0]
