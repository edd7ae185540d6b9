"""Draws the README's figure from the tables of docs/, so that none of its numbers is typed by hand, and prints its alt text.

    python benchmarks/figures.py --out docs/results/summary.svg

Left: speed of training with stored and with online targets, relative to the bare student with its data in memory
(docs/data.md, `benchmarks/training_speed.py`). Right: kNN accuracy of the students and their teacher
(docs/results/strong_teacher.md, `benchmarks/strong_teacher.py`). The greys are legible on white and on black pages.
"""

import argparse
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

DOCS = Path(__file__).parents[1] / "docs"
GREY, STORED, ONLINE, TEACHER = "#7d8794", "#2e8b57", "#d08a2e", "#5b7fb5"
ARMS = {
    "untrained": ("student, untrained", GREY),
    "alone": ("MoCo v2, no teacher", GREY),
    "online": ("student, online", ONLINE),
    "stored": ("student, stored", STORED),
    "teacher": ("teacher", TEACHER),
}
"""Row of the table of accuracies -> its name in the figure and its colour."""
STYLE = {
    "svg.hashsalt": "fkd_ssl",
    "text.color": GREY,
    "axes.labelcolor": GREY,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "axes.edgecolor": GREY,
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
}

Row = dict[str, str]


def table(page: Path, *, first: str, **others: str) -> list[Row]:
    """Returns the rows of a page's table whose first column is `first` and which has the columns `others`."""
    found: list[list[str]] = []
    for line in [*page.read_text().splitlines(), ""]:
        if line.startswith("|"):
            found.append([cell.strip() for cell in line.strip("|").split("|")])
            continue
        if found and found[0][0] == first and set(others.values()) <= set(found[0]):
            return [dict(zip(found[0], row, strict=True)) for row in found[2:]]
        found = []
    raise SystemExit(f"{page}: no table of {first}, {', '.join(others.values())}")


def number(cell: str) -> float:
    return float(cell.replace(",", "").replace("*", "").split("±")[0])


def deviation(cell: str) -> float:
    return float(cell.split("±")[1]) if "±" in cell else 0.0


def speeds() -> list[tuple[str, float, float]]:
    """Returns the name of each pair, and the speeds of stored and online training relative to the bare student."""
    rows = table(DOCS / "data.md", first="teacher", bare="bare", stored="stored, of bare", online="online")
    return [
        (
            f"{row['teacher'].split(', random')[0]}\n→ {row['student']}",
            number(row["stored, of bare"]),
            number(row["online"]) / number(row["bare"]),
        )
        for row in rows
    ]


def accuracies() -> list[tuple[str, str, float, float]]:
    """Returns name, colour, kNN top-1 and its deviation for each arm."""
    rows = table(DOCS / "results/strong_teacher.md", first="arm", knn="kNN top-1", tuned="fine-tuned top-1")
    cells = {row["arm"]: row["kNN top-1"] for row in rows}
    return [(name, colour, number(cells[arm]), deviation(cells[arm])) for arm, (name, colour) in ARMS.items()]


def drawn() -> str:
    """Returns the numbers of the figure. They are also in the file, so that a test finds a figure older than the tables."""
    numbers = [value for _, *pair in speeds() for value in pair]
    numbers += [value for _, _, *pair in accuracies() for value in pair]
    return " ".join(f"{value:.2f}" for value in numbers)


def alt_text() -> str:
    """Returns the figure in words, as README has it."""
    _, stored, online = zip(*speeds(), strict=True)
    scores = {name: f"{value:.1f} %" for name, _, value, _ in accuracies()}
    return (
        f"Left: training with stored targets runs at {min(stored):.2f} to {max(stored):.2f} of the bare student's speed, "
        f"online at {min(online):.2f} to {max(online):.2f}. Right: kNN accuracy is {scores['student, stored']} for stored and "
        f"{scores['student, online']} for online students, {scores['MoCo v2, no teacher']} for MoCo v2 "
        f"without a teacher, {scores['student, untrained']} for an untrained student and {scores['teacher']} for the teacher."
    )


def draw_speeds(axes: Axes) -> None:
    names, stored, online = zip(*speeds(), strict=True)
    for label, colour, up, values in (("stored targets", STORED, 0.2, stored), ("online targets", ONLINE, -0.2, online)):
        places = [up - k for k in range(len(names))]
        axes.barh(places, values, height=0.36, color=colour, label=label)
        for place, value in zip(places, values, strict=True):
            axes.text(value + 0.02, place, f"{value:.2f}", va="center", color=GREY)
    axes.set_yticks([-k for k in range(len(names))], names)
    axes.set_xlim(0, 1.25)
    axes.set_title("Training speed, of the bare student's", loc="left", fontsize=11)
    axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.4, -0.1), ncols=2)


def draw_accuracies(axes: Axes) -> None:
    arms = accuracies()
    for k, (_, colour, value, error) in enumerate(arms):
        axes.barh(-k, value, height=0.6, color=colour, xerr=error or None, ecolor=GREY)
        axes.text(value + error + 1, -k, f"{value:.1f}", va="center", color=GREY)
    axes.set_yticks([-k for k in range(len(arms))], [name for name, *_ in arms])
    axes.set_xlim(0, 109)
    axes.set_title("kNN top-1 on Imagenette, %", loc="left", fontsize=11)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="SVG file to write")
    args = parser.parse_args()
    with mpl.rc_context(STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.1), layout="constrained", width_ratios=(1.15, 1))
        draw_speeds(left)
        draw_accuracies(right)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(args.out, transparent=True, metadata={"Date": None, "Description": drawn()})
    print(f"{args.out}\nalt text of README: {alt_text()}")


if __name__ == "__main__":
    main()
