"""Shows the contents of a store: images, crops, columns, codecs, sizes and missing parts."""

from dataclasses import dataclass
from typing import Any

from fkd_ssl.text import format_bytes, plural, printable

POSITIONALS = ("store",)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of inspect."""

    store: str
    """Folder or URL of the store."""
    json: bool = False
    """Print one JSON object on standard output."""


def describe(folder: str) -> dict[str, Any]:
    """Describes a store as a JSON object."""
    from fkd_ssl.crops import CROP_DTYPE
    from fkd_ssl.store import open_store

    store = open_store(folder)
    m = store.manifest
    columns = {}
    for name in store.column_names:
        column = store.column(name)
        columns[name] = {
            **column.meta.to_json(),
            "bytes_per_crop": column.meta.code_size + CROP_DTYPE.itemsize,
            "missing_shards": column.missing_shards,
        }
    crops = store.shards_with_crops()
    skipped = [store.paths[row] for s in sorted(crops) for row in store.skipped(s)]
    return {
        "store": store.name,
        "images": m.count,
        "readable": len(store),
        "skipped": skipped,
        "crops_per_image": m.crops_per_image,
        "recipe": m.recipe.to_dict(),
        "seed": m.seed,
        "shards": m.shards,
        "missing_crops": [s for s in range(m.shards) if s not in crops],
        "bytes": store.total_bytes,
        "columns": columns,
        "damaged": store.broken_columns(),
    }


def run(config: Config) -> int:
    """Describes the store."""
    from fkd_ssl.commands import console
    from fkd_ssl.store.write.columns import describe_fidelity
    from fkd_ssl.targets import TeacherInfo

    info = describe(config.store)
    if config.json:
        console.print_json(info)
        return 1 if info["damaged"] else 0
    lines = [
        f"{info['store']}: {info['images']:,} images x {info['crops_per_image']} crops, {format_bytes(info['bytes'])}",
        f"recipe {info['recipe']['name']}, seed {info['seed']}, {plural(info['shards'], 'shard')}",
    ]
    if info["skipped"]:
        lines.append(f"skipped because they cannot be read: {len(info['skipped'])}, for instance {info['skipped'][0]}")
    if info["missing_crops"]:
        lines.append(f"NOT FINISHED: no crops yet for {len(info['missing_crops'])} of {plural(info['shards'], 'shard')}")
    if not info["columns"]:
        lines.append("NOT FINISHED: it has no targets; fkd-ssl precompute writes them")
    for name, column in info["columns"].items():
        fidelity, teacher = column["fidelity"], TeacherInfo.from_json(column["teacher"])
        measured = f" of {fidelity['sample']}" if fidelity["sample"] else ""
        lines += [
            f"column {name}: {teacher.network}, {teacher.spec}, seen at {teacher.pixels} px, {teacher.precision}",
            f"  codec {column['codec']}: {column['bytes_per_crop']} bytes per crop with its record; "
            f"{describe_fidelity(fidelity)}{measured}",
            f"  {teacher.normalisation}",
            f"  licence {teacher.licence}; checkpoint sha256 {str(teacher.checkpoint_sha256)[:16]}",
        ]
        if "source_codec" in fidelity:
            lines.append(f"  recoded from {fidelity['source_codec']}: information that it discarded cannot be recovered")
        if column["missing_shards"]:
            lines.append(
                f"  NOT FINISHED: no targets yet for {len(column['missing_shards'])} of {plural(info['shards'], 'shard')}"
            )
    lines += [f"DAMAGED: {problem}" for problem in info["damaged"]]
    console.print_result("\n".join(printable(line, one_line=True) for line in lines))
    return 1 if info["damaged"] else 0
