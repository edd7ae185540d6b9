"""The site: Sphinx, MyST and furo over the Markdown pages of this folder and the docstrings of the package. `make docs`."""

import dataclasses
import inspect
import os
import re
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from fkd_ssl import __version__, cli, options

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
ELSEWHERE = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "examples/README.md": "examples.md",
}
"""Pages that lie outside this folder for those who read the repository, and the pages here that include them."""
LINK = re.compile(r"(?P<text>!?\[[^\]]*\])\((?!https?:|#|mailto:)(?P<path>[^)#\s]+)(?P<anchor>#[^)\s]+)?\)")

project = "fkd_ssl"
author = "The fkd_ssl developers"
project_copyright = f"2026, {author}"
release = version = __version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
exclude_patterns = ["results/*.json"]
smartquotes = False
default_role = "literal"  # in docstrings `x` is code, as in Markdown
myst_heading_anchors = 4
napoleon_google_docstring, napoleon_numpy_docstring = True, False
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 100
copybutton_prompt_text = "$ "
linkcheck_timeout = 20

html_theme = "furo"
html_title = "fkd_ssl"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_show_sourcelink = False
html_copy_source = False
html_theme_options = {"navigation_with_keys": True}


def relink(text: str, source: Path, page: Path) -> str:
    """A page's links as the site has them.

    README and docs are written to be read in the repository. Here a page that lies outside of docs/ becomes the page that
    includes it, another file becomes a download, and a folder is no link.
    """

    def replace(link: re.Match[str]) -> str:
        target = (source.parent / link["path"]).resolve()
        if not target.exists() or ROOT not in target.parents:
            return link[0]  # the build says so
        name = str(target.relative_to(ROOT))
        if target.is_dir():
            return link["text"].strip("[]")
        target = DOCS / ELSEWHERE.get(name, target)
        return f"{link['text']}({os.path.relpath(target, page.parent)}{link['anchor'] or ''})"

    return LINK.sub(replace, text)


def read_page(app: Sphinx, docname: str, content: list[str]) -> None:
    """Before a page is parsed."""
    page = Path(app.env.doc2path(docname))
    content[0] = relink(content[0], page, page)


def read_included(app: Sphinx, relative_path: Path, parent: str, content: list[str]) -> None:
    """Before a file that a page includes is parsed."""
    content[0] = relink(content[0], (DOCS / relative_path).resolve(), Path(app.env.doc2path(parent)))


class Verbs(SphinxDirective):
    """Every verb of the command line with its options, from the dataclasses that the parser is made of."""

    def run(self) -> list[nodes.Node]:
        """One section a verb."""
        lines = [line for verb, what in cli.VERBS.items() for line in describe(verb, what)]
        return self.parse_text_to_nodes("\n".join(lines), allow_section_headings=True)


def describe(verb: str, what: str) -> list[str]:
    """The section of one verb, in Markdown."""
    command = cli.command_of(verb)
    helps = cli.option_helps(command.Config)
    positionals = getattr(command, "POSITIONALS", ())
    lines = [
        f"## {verb}",
        "",
        inspect.cleandoc(command.__doc__ or what),
        "",
        "| option | type | default | |",
        "|---|---|---|---|",
    ]
    fields = {field.name: field for field in dataclasses.fields(command.Config)}
    for section, names in (options.groups_of(command.Config) or {"": list(fields)}).items():
        lines += [f"| **{section}** | | | |"] if section else []
        for field in map(fields.__getitem__, names):
            name = field.name if field.name in positionals else f"--{field.name}"
            kind = inspect.formatannotation(field.type).removesuffix(" | None").replace("|", "\\|")
            said = " ".join(helps[field.name].split()).replace("|", "\\|")
            lines.append(f"| `{name}` | {kind} | {shown(field.default)} | {said} |")
    return [*lines, ""]


def shown(default: Any) -> str:
    """A default value as one would type it; nothing where there is none, or of a switch."""
    if default is dataclasses.MISSING:
        return "needed"
    return "" if default is None or default is False else f"`{default}`"


def setup(app: Sphinx) -> None:
    """What this file adds to Sphinx."""
    app.connect("source-read", read_page)
    app.connect("include-read", read_included)
    app.add_directive("verbs", Verbs)
