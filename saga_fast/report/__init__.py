"""A run as one HTML file that needs nothing beside it: `python -m saga_fast.report RUN` writes RUN/report.html.

Only files of the run are read, so a report can be made again anywhere, and of a run that is still going.
"""

from saga_fast.report.page import write_report

__all__ = ["write_report"]
