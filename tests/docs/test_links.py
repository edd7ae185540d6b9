"""Every page is linked, every link and anchor exists, and README's figures equal those of the pages' tables."""

import re
import runpy
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted([*ROOT.glob("*.md"), *DOCS.rglob("*.md"), *(ROOT / "examples").rglob("*.md")])
LINK = re.compile(r"!?\[[^\]]*\]\((?P<path>[^)#\s]*)(?:#(?P<anchor>[^)\s]+))?\)")
INCLUDE = re.compile(r"^```\{include\} (\S+)\n```$", re.MULTILINE)
FENCED = re.compile(r"^( *)(```+)[^\n]*\n.*?^\1\2$", re.MULTILINE | re.DOTALL)


def prose(page: Path) -> str:
    """Returns a page without code blocks; for a page that includes another, the included one."""
    text = INCLUDE.sub(lambda found: prose(page.parent / found[1]), page.read_text())
    return FENCED.sub("", text)


def anchors(page: Path) -> set[str]:
    """Returns the anchors of the headings, as GitHub and the site spell them."""
    headings = re.findall(r"^#+ +(.*)$", prose(page), re.MULTILINE)
    plain = [re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading) for heading in headings]
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in plain}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page: Path) -> None:
    text = FENCED.sub("", page.read_text())
    for link in LINK.finditer(text):
        path, anchor = link["path"], link["anchor"]
        if re.match(r"https?:", path):
            assert path.startswith("https://"), path
            continue
        target = page.parent / path if path else page
        assert target.exists(), f"{page.name}: {link[0]}"
        if anchor:
            assert anchor in anchors(target), f"{page.name}: {link[0]}"


def test_every_page_is_in_the_table_of_contents() -> None:
    trees = re.findall(r"^```\{toctree\}\n(.*?)^```$", (DOCS / "index.md").read_text(), re.MULTILINE | re.DOTALL)
    listed = [line for tree in trees for line in tree.splitlines() if line and not line.startswith(":")]
    pages = [str(page.relative_to(DOCS).with_suffix("")) for page in DOCS.rglob("*.md") if page.name != "index.md"]
    assert sorted(listed) == sorted(pages)


def test_the_front_page_leads_to_each_page() -> None:
    """Directly, or through the pages of results and benchmarks."""
    seen, waiting = set(), [ROOT / "README.md"]
    while waiting:
        page = waiting.pop().resolve()
        if page not in seen and page.suffix == ".md" and page.exists():
            seen.add(page)
            waiting += [page.parent / link["path"] for link in LINK.finditer(prose(page)) if link["path"]]
    including = {"index.md", "changelog.md", "contributing.md", "examples.md"}
    assert {page for page in DOCS.rglob("*.md") if page.name not in including} <= seen


def test_every_benchmark_is_listed() -> None:
    page = (DOCS / "benchmarks.md").read_text()
    assert [script.name for script in (ROOT / "benchmarks").glob("*.py") if f"`{script.name}`" not in page] == []


@pytest.fixture(scope="module")
def figures() -> dict[str, Any]:
    """Returns the functions of benchmarks/figures.py, which reads the pages' tables."""
    return runpy.run_path(str(ROOT / "benchmarks/figures.py"))


def test_the_figure_is_of_the_tables(figures: dict[str, Any]) -> None:
    """To update it: python benchmarks/figures.py --out docs/results/summary.svg."""
    assert figures["drawn"]() in (DOCS / "results/summary.svg").read_text()


def test_the_alt_text_has_the_figures_numbers(figures: dict[str, Any]) -> None:
    """To update it: the same command prints the text."""
    assert f"![{figures['alt_text']()}](docs/results/summary.svg)" in (ROOT / "README.md").read_text()


def rounded(cell: str) -> str:
    """Returns a cell of a results page with one decimal, as in README."""
    return cell and " ± ".join(f"{float(part):.1f}" for part in cell.split(" ± "))


def test_the_front_page_has_the_tables_numbers(figures: dict[str, Any]) -> None:
    columns = {"knn": "kNN top-1", "linear": "linear top-1", "tuned": "fine-tuned top-1"}

    def scores(page: Path, first: str) -> dict[str, list[str]]:
        rows = figures["table"](page, first=first, **columns)
        names = [row[first].removeprefix("student, ").split(" (")[0] for row in rows]
        return {name: [rounded(row[column]) for column in columns.values()] for name, row in zip(names, rows, strict=True)}

    assert scores(ROOT / "README.md", "") == scores(DOCS / "results/strong_teacher.md", "arm")
