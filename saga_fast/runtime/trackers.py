"""Experiment tracking: TensorBoard always, and trackio or wandb with `--tracker`.

trackio and wandb are not dependencies; of both only `init`, `log`, `Image` and `finish` are used, which they share.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from saga_fast.utils.errors import first_line


class OptionalTracker:
    """An external tracker, or none. Its exceptions become a warning and disable it, so that it never ends a run.

    name: of the tracker's module, None for no tracker. run: the run's name in the tracker, where a resumed run is a new
    one.
    """

    def __init__(self, name: str | None, run: str, config: dict[str, Any]) -> None:
        self.name = name
        self._module: Any = None
        if name:
            with self._disabled_on_error():
                module = importlib.import_module(name)
                module.init(project="saga_fast", name=run, config=config)
                self._module = module

    def call(self, function: Callable[[Any], object]) -> None:
        """Calls `function` with the tracker's module, unless there is none or it is disabled."""
        if self._module:
            with self._disabled_on_error():
                function(self._module)

    @contextmanager
    def _disabled_on_error(self) -> Iterator[None]:
        try:
            yield
        except (Exception, SystemExit) as error:
            self._module = None
            warnings.warn(
                f"--tracker: {self.name} failed ({first_line(error)}); the run goes on without it, and TensorBoard has "
                "it all",
                stacklevel=4,
            )


class Tracker:
    """Writes TensorBoard events to `out` and passes them on to `external`. step: the first step of a resumed run."""

    def __init__(self, out: Path, external: OptionalTracker, step: int | None = None) -> None:
        from torch.utils.tensorboard import SummaryWriter  # slow to import

        self._writer, self._external = SummaryWriter(out, purge_step=step), external

    def scalars(self, step: int, values: dict[str, float]) -> None:
        self._external.call(lambda tracker: tracker.log(values, step=step))
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def image(self, step: int, name: str, picture: Image.Image) -> None:
        self._external.call(lambda tracker: tracker.log({name: tracker.Image(picture)}, step=step))
        self._writer.add_image(name, np.asarray(picture), step, dataformats="HWC")

    def close(self) -> None:
        self._external.call(lambda tracker: tracker.finish())
        self._writer.close()
