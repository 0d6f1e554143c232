"""Run the tests on every mutant and print which of them caught which: `python tests/mutants_table.py [NAME ...]`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Final

from rich.console import Console
from rich.table import Table
from rich.text import Text

from mutant_runs import MutantRuns, Verdict, judge
from mutations import mutations

WIDTH: Final = 200


def print_table(verdicts: Sequence[Verdict], console: Console) -> None:
    """One row per mutant, and how many were caught."""
    table = Table()
    table.add_column("mutant", no_wrap=True)
    table.add_column("what is broken", overflow="fold")
    table.add_column("caught by", overflow="fold")
    table.add_column("message", overflow="fold")
    for verdict in verdicts:
        table.add_row(*map(Text, verdict.row()))  # ids have brackets, which are no markup
    console.print(table)
    caught = sum(not verdict.problem for verdict in verdicts)
    console.print(f"{caught} of {len(verdicts)} mutants are caught.")


def main(names: Sequence[str]) -> int:
    """Exit code 0 if all are caught, 2 for a name that there is not."""
    known = mutations()
    unknown = [name for name in names if name not in known]
    if unknown:
        print(f"there is no mutant named {unknown[0]!r}; they are {', '.join(known)}", file=sys.stderr)
        return 2
    chosen = [known[name] for name in names or known]
    runs = MutantRuns()
    verdicts = []
    try:
        runs.start(chosen)
        for one in chosen:
            verdicts.append(judge(one, runs.control(one), runs.mutant(one)))
            print("." if not verdicts[-1].problem else "F", end="", file=sys.stderr, flush=True)
    finally:
        runs.close()
    print(file=sys.stderr)
    print_table(verdicts, Console(width=None if sys.stdout.isatty() else WIDTH))
    return 1 if any(verdict.problem for verdict in verdicts) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
