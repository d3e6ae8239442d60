"""A run as one HTML file that needs nothing beside it: `python -m saga_fast.report RUN` writes RUN/report.html.

Only files of the run are read, so a report can be made again anywhere, and of a run that is still going. `samples` and
`model_card` say what a run keeps for it and for whoever gets its encoder; train and runtime.run call them.
"""

from saga_fast.report.page import write_report

__all__ = ["write_report"]
