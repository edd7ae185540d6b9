"""Measures retrieval with a model's features: recall@1/5/10, precision@5/10 and mAP@R; approximate indexes; nearest images.

--gallery DIR --queries DIR scores exact search; without --queries, each gallery image is a query among the others.
--curve --out OUT measures recall against queries per second for all indexes. --query IMAGE lists the gallery images nearest to
that image and draws a contact sheet. --gallery and --queries also accept FEATURES.npy,LABELS.npy.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from fkd_ssl.errors import ImageAccessError, ImageError, RequestError

if TYPE_CHECKING:
    from pathlib import Path

    from fkd_ssl.eval.features import Split
    from fkd_ssl.results import Nearest, Retrieval


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of retrieve."""

    EXECUTION: ClassVar[tuple[str, ...]] = ("features", "workers", "json", "on_unreadable")
    PATHS: ClassVar[tuple[str, ...]] = ("model", "checkpoint", "gallery", "queries", "query", "sheet", "out")

    model: str | None = None
    """A run folder, a .ckpt file, teacher:NAME, torchvision/NAME, timm/NAME or module:function; any name for feature files."""
    gallery: str
    """Labelled images to search in: a folder, another source (docs/sources.md), or FEATURES.npy,LABELS.npy."""
    queries: str | None = None
    """Labelled query images, in the same forms as --gallery; by default the gallery itself."""
    index: Literal["exact", "hnsw", "ivfflat", "ivfpq"] = "exact"
    """Search index."""
    curve: bool = False
    """Measure all indexes at several search efforts: prints a table, and with --out draws a plot."""
    query: str | None = None
    """Image file: list the gallery images nearest to it and draw them in --sheet. Labels are not needed."""
    nearest: int = 10
    """Number of images that --query lists."""
    sheet: str = "nearest.png"
    """PNG file for the contact sheet of --query. It replaces an earlier sheet, but no other file."""
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
    """Folder for results.json and the plot."""
    json: bool = False
    """Print one JSON object on standard output."""

    def __post_init__(self) -> None:
        if self.query is not None and (self.queries or self.curve or self.out or self.index != "exact"):
            raise RequestError("--query lists the images nearest to one: remove --queries, --curve, --out and --index")
        if self.nearest < 1:
            raise RequestError(f"--nearest {self.nearest}: must be at least 1")


def run(config: Config) -> int:
    """Prints the scores of the search, or the images nearest to --query."""
    from fkd_ssl.commands import console, results
    from fkd_ssl.results import Nearest

    result = work(config)
    if not config.json and "curve" in result.values:
        console.print_result(curve_table(result.values["curve"]))
    results.show(result, json=config.json)
    if isinstance(result, Nearest) and not config.json:
        console.log(f"contact sheet: {result.out}")
    return 0


def work(config: Config) -> "Retrieval | Nearest":
    """Scores the search, or finds the images nearest to `query`."""
    from fkd_ssl.commands import results, sources
    from fkd_ssl.results import Retrieval

    if config.query is not None:
        return _nearest(config, config.query)
    evaluation = sources.open_evaluation(config, config.gallery, config.queries, ("gallery", "queries"))
    if found := results.finished(config, evaluation.inputs):
        return Retrieval.of(*found)
    split, details = sources.split_of(evaluation, config)
    with results.opened(config, evaluation.inputs):
        return _search(config, split, details)


def _search(config: Config, split: "Split", details: dict[str, Any]) -> "Retrieval":
    """Searches the gallery."""
    from fkd_ssl.commands import resolve
    from fkd_ssl.eval import indexes, retrieval

    base, labels = split.train_features, split.train_labels
    queries = None if config.queries is None else split.features
    index = None if config.index == "exact" else indexes.build(base, config.index)
    result = retrieval.evaluate(
        gallery=base,
        gallery_labels=labels,
        queries=queries,
        labels=None if queries is None else split.labels,
        approximate=None if index is None else index.search,
        device=resolve.device(),
    )
    if config.curve:
        result["curve"] = indexes.curve(base, base[:1000] if queries is None else queries[:1000])
    data = {{"train": "gallery", "val": "queries"}[name]: value for name, value in details["data"].items()}
    details = {**details, "data": data}
    pixels = (details["transform"] or {}).get("centre_crop")
    return _retrieval(replace(config, pixels=pixels), details, result)


def _retrieval(config: Config, details: dict[str, Any], result: dict[str, Any]) -> "Retrieval":
    from pathlib import Path

    from fkd_ssl.commands import results
    from fkd_ssl.results import Retrieval

    if "curve" in result and config.out is not None:
        plot(result["curve"], Path(config.out) / "recall_speed.png")
    where = "" if config.pixels is None else f" at {config.pixels} px"
    said = [f"recall@{k} {value:.2f} %" for k, value in result["recall"].items()]
    said += [f"precision@{k} {value:.2f} %" for k, value in result["precision"].items() if k != "1"]
    line = f"{config.model or config.gallery}: {config.index}{where}: {', '.join(said)}, mAP@R {result['map_at_r']:.2f} %"
    value = {key: part for key, part in result.items() if key != "correct"}
    value = {"kind": "retrieve", "protocol": config.index, **details, "top1": result["recall"]["1"], **value}
    return Retrieval.of(*results.finish(value, line, config, results.CORRECT, result["correct"]))


def curve_table(rows: list[dict[str, Any]]) -> str:
    """Formats the rows of `indexes.curve` as a table."""
    from fkd_ssl.commands import console

    cells = [
        [
            row["index"],
            str(row["effort"] or ""),
            f"{row['recall']:.2f}",
            f"{row['queries_per_second']:.0f}",
            f"{row['bytes_per_vector']:.0f}",
            f"{row['build_seconds']:.2f}",
        ]
        for row in rows
    ]
    return console.table([["index", "effort", "recall@10 of exact, %", "queries/s", "bytes per vector", "build s"], *cells])


def plot(rows: list[dict[str, Any]], path: "Path") -> None:
    """Plots recall against queries per second, one line per index, as in ann-benchmarks."""
    import io

    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    from fkd_ssl import files

    figure, axes = plt.subplots(figsize=(6.4, 4), layout="constrained")
    for name in dict.fromkeys(row["index"] for row in rows):
        own = [row for row in rows if row["index"] == name]
        label = f"{name}, {own[0]['bytes_per_vector']:.0f} bytes per vector"
        axes.plot([r["recall"] for r in own], [r["queries_per_second"] for r in own], marker="o", markersize=4, label=label)
    axes.set(xlabel="recall of the exact 10 nearest, %", ylabel="queries per second", yscale="log")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=130, format="png")
    plt.close(figure)
    files.replace(path, buffer.getvalue())


def _nearest(config: Config, query: str) -> "Nearest":
    """Finds the images nearest to `query` and draws them as a contact sheet."""
    from pathlib import Path

    from fkd_ssl import sheet
    from fkd_ssl.commands import console, sources
    from fkd_ssl.commands.images import images_of
    from fkd_ssl.eval import search
    from fkd_ssl.eval.features import extract
    from fkd_ssl.images import Folder, read_image
    from fkd_ssl.results import Nearest

    out, path = Path(config.sheet), Path(query)
    sheet.check_replaceable(out, "--sheet")
    if not path.exists():
        raise RequestError(f"--query {query}: not found; give the path of an image file")
    try:
        picture = read_image(path)
    except (ImageAccessError, ImageError) as error:  # the user named this file
        raise RequestError(f"--query {error}") from error
    if sources.is_files(config.gallery):
        raise RequestError("--query needs images: pass --gallery as images, not as files of features")
    model, pixels = sources.load_model(config)
    images = images_of(config.gallery)
    source = sources.features_of(model, pixels, config.gallery, images, config, "features of gallery")
    gallery, images = source.features, images.subset(source.rows)
    one = Folder(path.parent, [path.name])
    feature, _ = extract(model.features, one, pixels=pixels, workers=0, progress=False)
    [(_, similarity, rows)] = search.nearest(gallery, feature, min(config.nearest, len(gallery)))
    own = path.absolute().parent.name  # its class, if the gallery has a class of that name
    near, shown = [], []
    for row, cosine in zip(rows[0].tolist(), similarity[0].tolist(), strict=True):
        name = images.class_of(row)
        near.append({"image": images.names[row], "class": name, "cosine": cosine})
        lines = [*([name] if name else []), f"cosine {cosine:.3f}", images.names[row].rpartition("/")[2]]
        same = name == own if own in images.classes else None
        shown.append(sheet.Picture(pixels=images.pixels(row), lines=lines, same_class=same))
    title, note = f"query: {path.name}", f"the {len(near)} nearest of {len(gallery):,} images to {config.model}"
    if own in images.classes:
        title = f"query: {own} / {path.name}"
        note += f"; ✓ and a frame: the same class ({sum(item['class'] == own for item in near)} of {len(near)})"
    sheet.write(out, sheet.draw_found(picture, title, note, shown), "--sheet")
    rows_of_table = [[f"{item['cosine']:.3f}", item["class"], item["image"]] for item in near]
    return Nearest(
        line=console.table([["cosine", "class", "image"], *rows_of_table]),
        values={"kind": "retrieve", "query": query, "gallery": config.gallery, "sheet": str(out), "nearest": near},
        out=out,
        nearest=near,
    )
