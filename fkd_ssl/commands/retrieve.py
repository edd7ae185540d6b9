"""Retrieval with a model's features: recall@1/5/10, mAP@R, precision@k; approximate indexes; the nearest images of one.

--gallery DIR --queries DIR scores exact search; without --queries each image of the gallery is sought among the others.
--curve --out OUT measures recall against queries per second of all indexes. --index hnsw --saved IDX keeps an index, and
--saved IDX --query IMAGE draws a contact sheet of the images nearest to one. --gallery and --queries also take
FEATURES.npy,LABELS.npy.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from fkd_ssl.errors import ImageError, RequestError

if TYPE_CHECKING:
    from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of retrieve."""

    model: str | None = None
    """A run folder, a .ckpt of one, teacher:NAME, torchvision/NAME, timm/NAME, or module:function; of files only a name."""
    gallery: str | None = None
    """Labelled images that are searched: a folder, NAME:SPLIT:ROOT, or FEATURES.npy,LABELS.npy."""
    queries: str | None = None
    """Labelled images that are sought, likewise; the gallery's own by default."""
    index: Literal["exact", "hnsw", "ivfflat", "ivfpq"] = "exact"
    """What searches."""
    curve: bool = False
    """Measure all indexes over their effort: a table, and in --out a plot."""
    saved: str | None = None
    """Folder of a saved index: written with --gallery, read without."""
    query: str | None = None
    """An image whose nearest are shown in --sheet."""
    nearest: int = 10
    """How many."""
    sheet: str = "nearest.png"
    """The contact sheet of --query."""
    pixels: int | None = None
    """Side of the centre crop; the model's own training size by default."""
    checkpoint: str | None = None
    """Weights of the teacher, or `pretrained` for those of its library."""
    features: str | None = None
    """Folder where features are kept and looked for (fkd-ssl features)."""
    workers: int = 2
    """Processes that read images."""
    out: str | None = None
    """Folder for results.json and the plot."""
    json: bool = False
    """Print one JSON object on standard output."""

    def __post_init__(self) -> None:
        if self.gallery is None and (self.saved is None or self.query is None):
            raise RequestError("--gallery is needed, or --query IMAGE with the --saved index of one")
        if self.query is not None and (self.queries is not None or self.curve or self.out is not None):
            raise RequestError("--query shows the nearest images of one; it does not go with --queries, --curve or --out")
        if self.nearest < 1:
            raise RequestError(f"--nearest {self.nearest}: must be at least 1")


def run(config: Config) -> int:
    """Searches."""
    from fkd_ssl.commands import results, sources
    from fkd_ssl.eval import indexes, retrieval

    if config.query is not None:
        return _show_nearest(config)
    assert config.gallery is not None
    if results.show_finished(config):
        return 0
    split, about = sources.split_of(config, config.gallery, config.queries)
    results.begin(config)
    base, labels = split.train_features, split.train_labels
    queries = None if config.queries is None else split.features
    index = None if config.index == "exact" and config.saved is None else indexes.build(base, config.index)
    result = retrieval.evaluate(
        gallery=base,
        gallery_labels=labels,
        queries=queries,
        labels=None if queries is None else split.labels,
        approximate=None if index is None or config.index == "exact" else index.search,
        device=sources.search_device(),
    )
    if config.curve:
        result["curve"] = indexes.curve(base, base[:1000] if queries is None else queries[:1000])
    data = {{"train": "gallery", "val": "queries"}[name]: value for name, value in about["data"].items()}
    about = {**about, "data": data}
    pixels = (about["transform"] or {}).get("centre_crop")
    if config.saved is not None and index is not None:
        _save(config, index, split, about)
    _report(replace(config, pixels=pixels), about, result)
    return 0


def _report(config: Config, about: dict[str, Any], result: dict[str, Any]) -> None:
    from pathlib import Path

    from fkd_ssl.commands import console, results

    if "curve" in result:
        if config.out is not None:
            plot(result["curve"], Path(config.out) / "recall_speed.png")
        if not config.json:
            console.show(curve_table(result["curve"]))
    where = "" if config.pixels is None else f" at {config.pixels} px"
    said = [f"recall@{k} {value:.2f} %" for k, value in result["recall"].items()]
    said += [f"precision@{k} {value:.2f} %" for k, value in result["precision"].items() if k != "1"]
    line = f"{config.model or config.gallery}: {config.index}{where}: {', '.join(said)}, mAP@R {result['map_at_r']:.2f} %"
    value = {key: part for key, part in result.items() if key != "correct"}
    value = {"kind": "retrieve", "protocol": config.index, **about, "top1": result["recall"]["1"], **value}
    results.finish(value, line, config, result["correct"])


def curve_table(rows: list[dict[str, Any]]) -> str:
    """The rows of `indexes.curve`, aligned."""
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
    return console.table([["index", "effort", "recall@10 of exact, %", "queries/s", "bytes a vector", "build s"], *cells])


def plot(rows: list[dict[str, Any]], path: "Path") -> None:
    """Recall against queries per second, a line an index, as ann-benchmarks draws it, with the bytes of a vector beside."""
    import io

    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    from fkd_ssl import files

    figure, axes = plt.subplots(figsize=(6.4, 4), layout="constrained")
    for name in dict.fromkeys(row["index"] for row in rows):
        own = [row for row in rows if row["index"] == name]
        label = f"{name}, {own[0]['bytes_per_vector']:.0f} bytes a vector"
        axes.plot([r["recall"] for r in own], [r["queries_per_second"] for r in own], marker="o", markersize=4, label=label)
    axes.set(xlabel="of the exact 10 nearest found, %", ylabel="queries per second", yscale="log")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=130, format="png")
    plt.close(figure)
    files.replace(path, buffer.getvalue())


def _save(config: Config, index: Any, split: Any, about: dict[str, Any]) -> None:
    """Keeps the index, with where its images are; files of features have none."""
    from pathlib import Path

    from fkd_ssl.commands import console, sources
    from fkd_ssl.eval import indexes

    assert config.gallery is not None
    assert config.saved is not None
    names = [str(row) for row in range(len(split.train_labels))]
    if not sources.is_files(config.gallery):
        images = sources.images_of(config.gallery)
        names = [str(images.file(row).resolve()) for row in range(len(images))]
    indexes.save(index, Path(config.saved), labels=split.train_labels, images=names, about={**about, "classes": split.classes})
    console.say(f"index: {config.saved}")


def _show_nearest(config: Config) -> int:
    """The images that are nearest to one, as a contact sheet."""
    from pathlib import Path

    import numpy as np

    from fkd_ssl import sheet
    from fkd_ssl.commands import console, sources
    from fkd_ssl.eval import indexes
    from fkd_ssl.eval.features import extract
    from fkd_ssl.images import ImageSet, read_image

    assert config.query is not None
    out, query = Path(config.sheet), Path(config.query)
    if out.exists():
        raise RequestError(f"{out}: exists; name another --sheet")
    try:
        picture = read_image(query)
    except ImageError as error:  # the user named this file
        raise RequestError(f"--query {error}") from error
    model, pixels = sources.load_model(config)
    if config.gallery is None:
        assert config.saved is not None
        index, labels, names, about = indexes.load(Path(config.saved))
        made_by, side = (about.get("model") or {}).get("weights_sha256"), (about.get("transform") or {}).get("centre_crop")
        if made_by != model.about["weights_sha256"]:
            raise RequestError(f"{config.saved}: holds features of another model than --model {config.model}; build it again")
        if side != pixels:
            raise RequestError(f"{config.saved}: holds features at {side} px; pass --pixels {side}")
        if not about["ours"]:
            raise RequestError(
                f"{config.saved}: was saved by another user or on another machine, or was changed: the pictures that it "
                "names are not opened; give --gallery instead"
            )
        classes = list(about["classes"])
    else:
        split, _ = sources.split_of(config, config.gallery, None)
        images = sources.images_of(config.gallery)
        index, labels, classes = indexes.build(split.train_features, config.index), split.train_labels, split.classes
        names = [str(images.file(row).resolve()) for row in range(len(images))]
    one = ImageSet(
        root=query.parent, paths=[query.name], labels=np.array([-1], dtype=np.int64), classes=[], on_disk=[query.name]
    )
    feature, _ = extract(model.features, one, pixels=pixels, workers=0, progress=False)
    similarity, at = index.search(feature, min(config.nearest, len(names)))
    found = [(int(row), float(cosine)) for row, cosine in zip(at[0], similarity[0], strict=True) if row >= 0]
    near = [{"image": names[row], "class": classes[labels[row]], "cosine": cosine} for row, cosine in found]
    shown = [(read_image(item["image"]), f"{item['class']} {item['cosine']:.3f}") for item in near]
    sheet.write_found(out, picture, f"query {query.name}", shown)
    if config.json:
        console.show_json({"kind": "retrieve", "query": str(query), "sheet": str(out), "nearest": near})
    else:
        console.show(
            console.table([["cosine", "class", "image"], *([f"{i['cosine']:.3f}", i["class"], i["image"]] for i in near)])
        )
        console.say(f"contact sheet: {out}")
    return 0
