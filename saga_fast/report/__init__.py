"""A run as one HTML file that needs nothing beside it: `python -m saga_fast.report RUN` writes RUN/report.html.

Only files of the run are read, so a report can be made again anywhere, and of a run that is still going. `samples` and
`model_card` write a run's data for it and the model card of the encoder; train and runtime.run call them.
"""

from saga_fast.report.page import write_report

__all__ = ["write_report"]
