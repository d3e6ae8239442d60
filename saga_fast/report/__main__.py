"""python -m saga_fast.report RUN"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from saga_fast.report import write_report
from saga_fast.utils.errors import InputError, exit_on_input_error
from saga_fast.utils.flags import parse_flags


@dataclass(frozen=True)
class ReportArguments:
    run: tyro.conf.Positional[str] = ""
    """Folder of the run."""


def main(arguments: Sequence[str]) -> None:
    parsed = parse_flags(ReportArguments(), arguments, "python -m saga_fast.report", "Write RUN/report.html.")
    if not parsed.run:
        raise InputError("RUN: missing; name the folder of a run")
    print(write_report(Path(parsed.run)))


if __name__ == "__main__":
    with exit_on_input_error():
        main(sys.argv[1:])
