"""README.md of a published store, in the form of a Hugging Face data set card."""

import re
from shlex import quote
from typing import Any

import yaml

from fkd_ssl import files
from fkd_ssl.crops import CROP_DTYPE
from fkd_ssl.store.column import Column
from fkd_ssl.store.reader import Store
from fkd_ssl.store.remote import INDEX, FileList
from fkd_ssl.store.write.columns import describe_fidelity
from fkd_ssl.text import format_bytes, printable

MARK = b"<!-- written by fkd-ssl publish -->"
_LICENCES = {
    "mit",
    "apache-2.0",
    "bsd-2-clause",
    "bsd-3-clause",
    "cc0-1.0",
    "cc-by-4.0",
    "cc-by-sa-4.0",
    "cc-by-nc-4.0",
    "cc-by-nc-sa-4.0",
    "cc-by-nc-nd-4.0",
    "gpl-3.0",
    "agpl-3.0",
}
"""Identifiers that Hugging Face knows."""


def text(store: Store, url: str, listed: FileList) -> str:
    """Returns the card of a store that is published at a URL, or in a folder that will have one."""
    m, columns = store.manifest, [store.column(name) for name in store.column_names]
    title = url.rstrip("/").rpartition("/")[2]
    url = "URL" if url.startswith("file://") else url  # a path of this machine is of no use to others
    chosen = f" --column {columns[0].name}" if len(columns) > 1 else ""
    teachers = " and ".join(_cell(column.meta.teacher.name) for column in columns)
    recipe = m.recipe.to_dict()
    lines = [
        f"# {title}",
        MARK.decode(),
        "",
        f"Stored crops of {m.count:,} images, {m.crops_per_image} per image, with the outputs of {teachers} for each crop, "
        "made by fkd_ssl. A student trains on them without the teacher. The images are not included.",
        "",
        "| store | |",
        "|---|---|",
        f"| images | {m.count:,}, of which {len(store):,} could be read |",
        f"| crops per image | {m.crops_per_image} |",
        f"| files | {len(listed.files):,} |",
        f"| size | {format_bytes(listed.total)} |",
        f"| recipe | {_cell(recipe.pop('name'))}: {', '.join(f'{key} {_cell(value)}' for key, value in recipe.items())} |",
        f"| seed of the crops | {m.seed} |",
        f"| sha256 of the list of images | {files.sha256(store.paths.lines)} |",
        f"| sha256 of the manifest | {m.digest} |",
    ]
    for column in columns:
        lines += ["", f"| column {column.name} | |", "|---|---|"]
        lines += [f"| {key} | {_cell(value)} |" for key, value in _about(column).items()]
    lines += [
        "",
        "The licence of a teacher's weights may also apply to its outputs and to students that are trained on them.",
        "",
        "## Use",
        "",
        "IMAGES are the images that the store was made from: a folder, tars or Parquet files. They are compared with the "
        "checksums in the store.",
        "",
        "```bash",
        "pip install 'fkd_ssl[remote]'",
        f"fkd-ssl inspect {quote(url)}",
        f"fkd-ssl train --images IMAGES --store {quote(url)}{chosen} --out runs/student",
        f"fkd-ssl pull {quote(url)} --out {quote(title)}",
        "```",
        "",
        f"`{INDEX}` lists size and sha256 of each file. Without fkd_ssl:",
        "",
        "```bash",
        f"tail -n +2 {INDEX} | awk '{{print $1 \"  \" $3}}' | sha256sum --check",
        "```",
        "",
    ]
    body = "\n".join(printable(line, one_line=True) for line in lines)
    return f"---\n{yaml.safe_dump(_front(title, m.count, columns), sort_keys=False, allow_unicode=False)}---\n\n{body}"


def _front(title: str, images: int, columns: list[Column]) -> dict[str, Any]:
    """Returns the YAML front matter."""
    licences = list(dict.fromkeys(column.meta.teacher.licence for column in columns))
    known = re.sub("[ _]+", "-", licences[0].strip().lower())
    if len(licences) == 1 and known in _LICENCES:
        licence = {"license": known}
    else:
        licence = {
            "license": "other",
            "license_name": "weights-of-the-teachers",
            "license_details": printable("; ".join(licences), one_line=True),
        }
    bounds = ((10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"), (10**7, "1M<n<10M"))
    size = next((name for bound, name in bounds if images < bound), "10M<n<100M")
    tags = ["fkd_ssl", "knowledge-distillation", "self-supervised-learning"]
    return {
        **licence,
        "pretty_name": title,
        "task_categories": ["image-feature-extraction"],
        "size_categories": [size],
        "tags": tags,
    }


def _about(column: Column) -> dict[str, Any]:
    meta, teacher = column.meta, column.meta.teacher
    return {
        "teacher": f"{teacher.name}, {teacher.network}",
        "licence of its weights": teacher.licence,
        "source of its weights": teacher.source or "not stated",
        "sha256 of its weights": teacher.checkpoint_sha256 or "not stated",
        "targets": str(teacher.spec),
        "crops that it saw": f"{teacher.pixels} px, {teacher.precision}; {teacher.normalisation}",
        "codec": f"{meta.codec}, {meta.code_size + CROP_DTYPE.itemsize} bytes per crop with its record",
        "fidelity": describe_fidelity(meta.fidelity),
        "sha256 of meta.json": column.digest,
    }


def _cell(value: object) -> str:
    """Formats a value, which may come from a stranger, as a cell of a table in Markdown."""
    return re.sub(r"([\\|<>`\[\]])", r"\\\1", str(value))
