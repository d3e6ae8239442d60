"""Where a run shows itself while it goes: TensorBoard, and a tracker where one is asked for.

trackio and wandb are no dependencies; of both only `init`, `log`, `Image` and `finish` are used, which they share.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.tensorboard import SummaryWriter


class Board:
    """tracker: a module's name. step: where a resumed run goes on; in a tracker it is a run of its own."""

    def __init__(self, out: Path, tracker: str | None, config: dict[str, Any], step: int | None = None) -> None:
        self._writer = SummaryWriter(out, purge_step=step)
        self._tracker = importlib.import_module(tracker) if tracker else None
        if self._tracker:
            self._tracker.init(project="saga_fast", name=out.name, config=config)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        if self._tracker:
            self._tracker.log(values, step=step)

    def image(self, step: int, name: str, picture: Image.Image) -> None:
        self._writer.add_image(name, np.asarray(picture), step, dataformats="HWC")
        if self._tracker:
            self._tracker.log({name: self._tracker.Image(picture)}, step=step)

    def close(self) -> None:
        self._writer.close()
        if self._tracker:
            self._tracker.finish()
