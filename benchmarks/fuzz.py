"""Thousands of spoiled recipes, data files, checkpoints and command lines: no traceback may reach a person.

Each case is one call of the command line (in this process) or of ``moeify.load_split``, with something spoiled in a way
that a seeded generator draws from the case's own name, so that ``--case recipes/17`` repeats it and shows the
traceback. A case is wrong when anything but a told error comes out: a traceback, an exit code other than 0, 1 and 2, an
error without a word, a file outside of the case's folder (but where an argument says so), or no end within minutes.

Launching is replaced (what would train on Ray does not), but for the group ``runs``, which trains tiny networks in this
process. The full benchmark has ten thousand cases and takes about a quarter of an hour; --quick some hundred.
"""

import faulthandler
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import traceback
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from benchmarks.fuzz_cases import GROUPS
from benchmarks.fuzz_stage import Stage, staged
from benchmarks.report import Figure, parser, report

COUNTS = {
    "recipes": 4500,
    "arguments": 1800,
    "data": 1300,
    "streamed": 400,
    "run files": 1300,
    "checkpoints": 700,
    "splits": 700,
}
"""Cases of each group; with ``runs`` ten thousand and more."""
RUNS = 120
QUICK = 0.01
"""Share of the cases that --quick runs."""
LONGEST = 300
"""Seconds of one case."""
MEMORY = 12 * 2**30
"""Bytes of address space: a hostile size must not take the machine down."""
SHOWN = 15


class HungError(Exception):
    """A case has no end."""


@dataclass(frozen=True)
class Fault:
    """A case that went wrong."""

    case: str
    said: str
    """One line."""
    trace: str


def main() -> None:
    """Play all cases and count those that went wrong."""
    parsed = parser(__doc__)
    parsed.add_argument("--case", metavar="GROUP/NUMBER", help="play this one case and show its traceback")
    parsed.add_argument("--only", metavar="GROUP", choices=[*COUNTS, "runs"], help="play the cases of this group")
    asked = parsed.parse_args()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))
    faulthandler.enable()
    with tempfile.TemporaryDirectory() as folder, staged(Path(folder)) as stage:
        if asked.case:
            fault = _played(stage, asked.case)
            sys.exit(f"{fault.said}\n{fault.trace}" if fault else None)
        counts = {**COUNTS, "runs": RUNS}
        if asked.quick:
            counts = {group: max(3, round(count * QUICK)) for group, count in counts.items()}
        counts = {group: count for group, count in counts.items() if asked.only in (None, group)}
        rows: list[dict[str, str | int]] = []
        faults: list[Fault] = []
        for group, count in counts.items():
            found = []
            for number in range(count):
                if fault := _played(stage, f"{group}/{number}"):
                    found.append(fault)
                    print(f"{fault.case}: {fault.said}", file=sys.stderr, flush=True)
            rows.append({"group": group, "cases": count, "tracebacks": len(found)})
            faults += found
            print(f"{group}: {count} cases, {len(found)} went wrong", file=sys.stderr, flush=True)
    alike = Counter(fault.said for fault in faults)
    for said, count in alike.most_common(SHOWN):
        first = next(fault.case for fault in faults if fault.said == said)
        print(f"{count} x {said} (--case {first!r})", file=sys.stderr)
    figures = [
        Figure("cases", sum(counts.values()), ">= 10,000 in full"),
        Figure("tracebacks", len(faults), "0"),
    ]
    report("fuzz", rows, figures, asked.json, quick=asked.quick)


# --- one case -------------------------------------------------------------------------------------------


def _played(stage: Stage, case: str) -> Fault | None:
    """Play a case in a folder of its own; return what went wrong."""
    group = case.rpartition("/")[0]
    shutil.rmtree(stage.scratch, ignore_errors=True)
    stage.scratch.mkdir()
    os.chdir(stage.scratch)
    os.environ["MOEIFY_HOME"] = str(stage.scratch / "runs")
    there = _outside(stage)
    signal.signal(signal.SIGALRM, _hung)
    signal.alarm(LONGEST)
    try:
        fault = GROUPS[group](stage, random.Random(case))
    except BaseException as error:
        fault = f"{type(error).__name__}: {' '.join(str(error).split())[:150]}", traceback.format_exc()
    finally:
        signal.alarm(0)
    if fault is None and group != "arguments" and (strangers := _outside(stage) - there):
        fault = f"wrote outside of its folder: {sorted(strangers)[0]}", ""
    return Fault(case, *fault) if fault else None


def _hung(*_: object) -> None:
    raise HungError(f"no end within {LONGEST} s")


def _outside(stage: Stage) -> set[str]:
    return {path.name for path in (*stage.place.iterdir(), *stage.place.parent.glob("x*"))}


if __name__ == "__main__":
    main()
