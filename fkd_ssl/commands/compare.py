"""Stored against online, over several seeds: table, curves, and the break-even.

The same student, initial weights, order of images, schedule and epochs, with targets from a
store or from the teacher itself, over several seeds. Scores teacher, trained and untrained students by kNN, a linear
probe and retrieval, and says after how many students the store has paid for itself. Arms that are done are not run again:
ask for more seeds or further arms in the same --out. Of two teachers A,B it compares three trainings in each way: from A,
from B, and from both (arms stored:A, stored:B, stored:A+B, ...).
"""

from pathlib import Path

from fkd_ssl.comparison.config import CompareConfig as Config


def run(config: Config) -> int:
    """Compares and prints the table."""
    from dataclasses import replace

    from fkd_ssl.commands import console
    from fkd_ssl.comparison import report
    from fkd_ssl.comparison.compare import compare

    asked, folder = replace(config, json=False), Path(config.out)  # printing is no part of what is compared
    results = compare(asked, console.say)
    text = report.write(results, folder)
    if config.json:
        console.show_json(results)
    else:
        console.show(text)
    console.say(f"report: {folder / 'report.html'}")
    return 0
