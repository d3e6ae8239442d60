"""A run as one self-contained HTML file: `python -m saga_fast.report RUN` writes RUN/report.html.

Only files of the run are read, so a report can be made again anywhere, and of a run in progress. `samples` writes a
run's data for it, and `model_card` the model card of the encoder; train and runtime.run call them.
"""

from saga_fast.report.page import write_report

__all__ = ["write_report"]
