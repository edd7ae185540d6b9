"""Results of a comparison: differences of arms with intervals, break-even, and time to online's accuracy."""

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fkd_ssl.comparison.arms import Arm, run_name
from fkd_ssl.comparison.config import CompareConfig
from fkd_ssl.comparison.scorer import PROBES, Scorer
from fkd_ssl.eval import stats
from fkd_ssl.training.metrics import METRICS, read_metrics


def summarise(
    config: CompareConfig,
    arms: Sequence[Arm],
    lines: Sequence[dict[str, Any]],
    scorer: Scorer,
    *,
    precompute_seconds: float | None,
) -> dict[str, Any]:
    """Returns the keys of results.json that are computed from the scores.

    Args:
        config: The comparison.
        arms: Its arms.
        lines: Scores and costs of each model: one dict per arm and seed.
        scorer: Gives the test images that each model classified correctly.
        precompute_seconds: Time to make the store; None if unknown.
    """
    plain = [arm for arm in arms if not (arm.on_stored or arm.crops or arm.codec)]
    stored, online = ([arm.name for arm in plain if arm.kind == kind] for kind in ("stored", "online"))
    pairs = [(stored[-1], online[-1])]
    pairs += [(stored[-1], single) for single in stored[:-1]]
    pairs += [(arm.name, online[-1]) for arm in arms if arm.on_stored]
    pairs += [(stored[-1], arm.name) for arm in arms if arm.kind in ("alone", "labels", "relabel")]
    pairs += [(arm.name, stored[-1]) for arm in arms if arm.crops or arm.codec]
    saved = _mean_seconds(lines, online[-1]) - _mean_seconds(lines, stored[-1])
    students = None if precompute_seconds is None or saved <= 0 else precompute_seconds / saved
    return {
        "config": config.__dict__,
        "crops": config.stored_crops,
        "arms": list(lines),
        "differences": [_difference(scorer, config.seeds, *pair) for pair in pairs],
        "precompute_seconds": precompute_seconds,
        "break_even_students": None if students is None else math.ceil(students),
        "break_even_epochs": None if students is None else students * config.epochs,
        "reached": _reached(config, online[-1], [arm.name for arm in arms if arm.kind != "alone"]),
    }


def _mean_seconds(lines: Sequence[dict[str, Any]], name: str) -> float:
    return float(statistics.mean(line["train_seconds"] for line in lines if line["name"] == name))


def _difference(scorer: Scorer, seeds: int, one: str, other: str) -> dict[str, Any]:
    """Returns the difference of two arms in each score, with its interval."""
    found: dict[str, Any] = {"arm": one, "minus": other}
    for probe in scorer.probes if "alone" not in (one, other) else PROBES:
        a, b = (np.stack([scorer.correct(run_name(name, seed), probe) for seed in range(seeds)]) for name in (one, other))
        value, low, high = stats.paired_bootstrap(a, b)
        found[probe] = {
            "difference": value,
            "low": low,
            "high": high,
            "equal": stats.equal(low, high),
            "more_seeds": stats.more_seeds(a, b),
        }
    return found


def _reached(config: CompareConfig, online: str, names: Sequence[str]) -> dict[str, Any]:
    """Returns the seconds until each arm's kNN was within the margin of online's final kNN.

    The seconds are means over seeds; None if a seed did not reach it.
    """
    curves: dict[str, list[list[tuple[float, float]]]] = {name: [] for name in names}
    for name in names:
        for seed in range(config.seeds):
            metrics = read_metrics(Path(config.out) / "runs" / run_name(name, seed) / METRICS)
            curves[name].append(
                [(line["seconds"] or 0.0, line["knn_top1"]) for line in metrics if line["knn_top1"] is not None]
            )
    goal = statistics.mean(curve[-1][1] for curve in curves[online]) - stats.MARGIN
    first = {name: [next((s for s, top1 in curve if top1 >= goal), math.inf) for curve in curves[name]] for name in names}
    means = {name: statistics.mean(times) for name, times in first.items()}
    return {"knn_top1": goal, "seconds": {name: mean if mean < math.inf else None for name, mean in means.items()}}
