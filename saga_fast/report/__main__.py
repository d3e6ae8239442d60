"""python -m saga_fast.report RUN"""

import argparse
from pathlib import Path

from saga_fast.report import write_report
from saga_fast.utils.errors import exit_on_input_error

if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m saga_fast.report", description="Write RUN/report.html.")
    parser.add_argument("run", type=Path, help="folder of the run")
    options = parser.parse_args()
    with exit_on_input_error():
        print(write_report(options.run))
