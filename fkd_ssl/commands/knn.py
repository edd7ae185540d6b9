"""Measures the k-nearest-neighbour accuracy of a model's features: exact search, votes weighted by exp(similarity / T).

The model is a run folder (its last checkpoint is scored), a checkpoint, or a teacher. Several k and temperatures share one
search. The reported accuracy is then that of k = 20 and T = 0.07 if these are given, else of the first k and T; never the best.
--train and --val also accept FEATURES.npy,LABELS.npy.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from fkd_ssl.errors import RequestError

if TYPE_CHECKING:
    from fkd_ssl.arrays import Float32Array
    from fkd_ssl.eval.features import Split
    from fkd_ssl.results import Score


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of knn."""

    EXECUTION: ClassVar[tuple[str, ...]] = ("features", "workers", "json", "on_unreadable")
    PATHS: ClassVar[tuple[str, ...]] = ("model", "checkpoint", "train", "val", "out")

    model: str | None = None
    """A run folder, a .ckpt file, teacher:NAME, torchvision/NAME, timm/NAME or module:function; any name for feature files."""
    train: str
    """Labelled images to search in: a folder, another source (docs/sources.md), or FEATURES.npy,LABELS.npy."""
    val: str | None = None
    """Labelled images to classify, in the same forms as --train."""
    leave_one_out: bool = False
    """Classify each training image by all others, instead of --val."""
    k: int | str = 20
    """Number of neighbours, or several: 10,20,100."""
    temperature: float | str = 0.07
    """T of the weights exp(similarity / T), or several: 0.07,0.1. inf gives each neighbour one vote."""
    preset: Literal["dino", "instdisc", "lightly"] | None = None
    """k and T of a publication, in place of --k and --temperature."""
    metric: Literal["cosine", "euclidean"] = "cosine"
    """Similarity: the cosine, or minus half the squared Euclidean distance."""
    shots: str | None = None
    """Number or share of training images to use per class: 5, or 1%."""
    draws: int = 5
    """Number of random draws for --shots; the mean and standard deviation are reported."""
    seed: int = 0
    """Seed of the draws for --shots."""
    baseline: Literal["pixels", "chance"] | None = None
    """What to compare with: pixels (8 x 8 pixels, a colour histogram and chance, on the same images by the same protocol) or
    chance only. Default: pixels, or chance for files of features."""
    pixels: int | None = None
    """Side of the centre crop; by default the size that the model was trained at."""
    checkpoint: str | None = None
    """Checkpoint of the teacher; `pretrained` downloads its library's weights."""
    features: str | None = None
    """Cache folder of features (see fkd-ssl features)."""
    workers: int = 2
    """Processes that read images."""
    on_unreadable: Literal["stop", "skip"] = "stop"
    """What to do if an image is damaged: stop and name it, or leave it out and count it."""
    out: str | None = None
    """Folder for results.json."""
    json: bool = False
    """Print one JSON object on standard output."""

    def __post_init__(self) -> None:
        if self.leave_one_out == (self.val is not None):
            raise RequestError("--val or --leave_one_out must be given")
        if self.leave_one_out and self.shots is not None:
            raise RequestError("--shots cannot be combined with --leave_one_out")
        if self.preset is not None and (self.k, self.temperature) != (20, 0.07):
            raise RequestError(f"--preset {self.preset} sets --k and --temperature; give one or the other")
        if self.shots is None and (self.draws, self.seed) != (5, 0):
            raise RequestError("--draws and --seed need --shots")


def run(config: Config) -> int:
    """Prints the score, after a table if there are several k or temperatures."""
    from fkd_ssl.commands import console, results

    score = work(config)
    grid = score.values["grid"]
    if len(grid) > 1 and not config.json:
        rows = [[f"{row['k']}", f"{float(row['temperature']):g}", f"{row['top1']:.2f}", f"{row['top5']:.2f}"] for row in grid]
        console.print_result(console.table([["k", "T", "top-1", "top-5"], *rows]))
    results.show(score, json=config.json)
    return 0


def work(config: Config) -> "Score":
    """Scores the model."""
    from fkd_ssl.commands import results, sources
    from fkd_ssl.eval import knn
    from fkd_ssl.results import Score

    ks, temperatures = numbers("--k", config.k, int), numbers("--temperature", config.temperature, float)
    if config.preset is not None:
        chosen, temperature = knn.PRESETS[config.preset]
        ks, temperatures = list(chosen), [temperature]
    knn.check_search(ks, temperatures)
    shots = None if config.shots is None else shots_of(config.shots)
    sources.check_baseline(config.baseline, config.train)
    evaluation = sources.open_evaluation(config, config.train, config.val)
    if found := results.finished(config, evaluation.inputs):
        return Score.of(*found)
    split, details = sources.split_of(evaluation, config)
    with results.opened(config, evaluation.inputs):
        return _score(config, ks, temperatures, shots, split, details)


def _score(
    config: Config, ks: list[int], temperatures: list[float], shots: float | None, split: "Split", details: dict[str, Any]
) -> "Score":
    """Classifies the images."""
    from fkd_ssl.commands import resolve, results
    from fkd_ssl.eval import baselines, knn

    labels = split.train_labels if config.leave_one_out else split.labels

    def evaluate(train_features: "Float32Array", features: "Float32Array") -> dict[str, Any]:
        options: dict[str, Any] = {
            "train_features": train_features,
            "train_labels": split.train_labels,
            "num_classes": len(split.classes),
            "names": split.classes,
            "k": ks,
            "temperature": temperatures,
            "metric": config.metric,
            "device": resolve.device(),
            **({} if config.leave_one_out else {"features": features, "labels": labels}),
        }
        if shots is None:
            return knn.evaluate_features(**options)
        return knn.few_shot(shots=shots, draws=config.draws, seed=config.seed, **options)

    result = evaluate(split.train_features, split.features)
    found = {} if config.baseline == "chance" else split.baselines
    result["baselines"] = baselines.scores(evaluate, found, split.train_labels, labels)
    protocol = config.preset or f"k {','.join(map(str, ks))}, T {','.join(f'{t:g}' for t in temperatures)}"
    if config.metric != "cosine":
        protocol += f", {config.metric}"
    protocol += ", leave one out" if config.leave_one_out else f", {config.shots} shots" if shots else ""
    pixels = (details["transform"] or {}).get("centre_crop")
    where = "" if pixels is None else f" at {pixels} px"
    title = f"{config.model or config.train}: kNN-{knn.K if knn.K in ks else ks[0]}{where}"
    return results.score("knn", title, replace(config, pixels=pixels), protocol, details, result)


def numbers(option: str, value: float | str, kind: type[int] | type[float]) -> list[Any]:
    """Parses the comma-separated numbers of an option; raises RequestError if one is not a number."""
    try:
        return [kind(part) for part in str(value).split(",")]
    except ValueError as error:
        raise RequestError(f"{option} {value}: expected a number, or several such as 10,20") from error


def shots_of(text: str) -> float:
    """Parses --shots, 5 or 1%, for `knn.few_shot`; raises RequestError if it has another form."""
    try:
        value = float(text.removesuffix("%"))
    except ValueError:
        value = -1.0
    part = text.endswith("%")
    if not value > 0 or (part and value >= 100) or (not part and value != int(value)):
        raise RequestError(f"--shots {text}: expected a number of images per class, such as 5, or a share, such as 1%")
    return value / 100 if part else value
