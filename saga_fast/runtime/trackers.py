"""Where a run shows itself while it goes: TensorBoard, and a tracker where one is asked for.

trackio and wandb are no dependencies; of both only `init`, `log`, `Image` and `finish` are used, which they share.
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
    """A tracker, or nobody: what it raises is told, and then it is left alone. No run ends, or stays undone, by it.

    name: a module's; run: what the tracker shall call the run, which in it is a new one after a resume.
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
        """`function` of the tracker's module, if there still is one."""
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
    """TensorBoard's events in `out`, and the guest. step: where a resumed run goes on."""

    def __init__(self, out: Path, external: OptionalTracker, step: int | None = None) -> None:
        from torch.utils.tensorboard import SummaryWriter  # takes a while, and nobody else has need of it

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
