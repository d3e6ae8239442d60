"""Released models, as folders or hub ids: what is looked at before any of their weights are read.

A release may come from anywhere, and nothing of it is run: weights are safetensors, never pickles, and code that it
brings is refused. A file that is missing is not there; one that is malformed is refused by its name, and never taken
for missing.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from safetensors import SafetensorError, safe_open
from transformers.utils import (
    ADAPTER_CONFIG_NAME,
    CONFIG_NAME,
    IMAGE_PROCESSOR_NAME,
    PROCESSOR_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    cached_file,
)
from transformers.utils import logging as transformers_logging

from saga_fast.utils.errors import InputError, first_line
from saga_fast.utils.files import is_lfs_pointer, read_regular

MAX_BYTES = 2**26
MOST = 1e6  # pixel statistics beyond it, or below its inverse, are no such
BYTE = 1 / 255  # what image processors multiply 8-bit channels by, unless they say otherwise
SAFE_LOADING: dict[str, Any] = {"trust_remote_code": False, "use_safetensors": True}

OWN_CODE = (
    "brings code of its own, which is not run; "
    "take the release that transformers reads (of InternVL the one whose name ends in -HF)"
)
SAFETENSORS = (
    "pickles (pytorch_model.bin) run what they hold and are not read: take a release in safetensors, "
    "or convert it by transformers' save_pretrained if you trust it"
)
MERGE = (
    "an adapter that is not merged, without which the model would be its base: merge it first "
    "(peft's merge_and_unload, then save_pretrained of model and tokenizer), and name that folder"
)
FILES = (".json", ".jinja", ".safetensors", ".model", ".txt")  # suffixes of what is read of a release
_ADAPTER = re.compile(r"(^|\.)(lora_\w+|base_layer|modules_to_save|ia3_l|oft_\w+|vera_lambda_\w+|hada_w\w+)(\.|$)")


class Release(NamedTuple):
    """A model as it was named: `name`, a folder or a hub id, given as `flag`. What is wrong is raised as InputError."""

    name: str | Path
    flag: str

    def refused(self, what: str) -> InputError:
        return InputError(f"{self.flag}: {self.name} {what}")

    def malformed(self, file: str, what: str) -> InputError:
        return self.refused(f"has a malformed {file} ({what}); restore the file")

    @contextmanager
    def telling(self, what: str) -> Iterator[None]:
        """Where another library computes with what the files say: whatever it raises is told as `what`, with its cause.
        `what` holds {}, where the cause stands. InputError and a device's want of memory pass."""
        try:
            yield
        except (InputError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # of any kind, as anything may be in those files
            raise self.refused(what.format(f"{type(error).__name__}: {first_line(error)}")) from error

    def find(self, file: str) -> str | None:
        """Where `file` lies on this machine; None where the model has none."""
        try:
            return cached_file(self.name, file, _raise_exceptions_for_missing_entries=False)
        except (OSError, ValueError) as error:
            raise self.refused(f"gives no {file} ({first_line(error)})") from error

    def expect_configuration(self, accepted: str) -> None:
        """Raises InputError, which ends in `accepted`, for neither a folder nor a hub id of a model's configuration."""
        if os.path.isfile(self.name):
            raise self.refused(f"is a file, no model; {accepted}")
        if os.path.isdir(self.name):
            if not os.path.isfile(os.path.join(self.name, CONFIG_NAME)):
                self.expect_no_adapter()
                raise self.refused(f"has no {CONFIG_NAME}, so it is no model; {accepted}")
            return
        try:
            validate_repo_id(str(self.name))
            cached_file(self.name, CONFIG_NAME)
        except HFValidationError as error:
            raise self.refused(f"is no model (neither a folder here nor a hub id, OWNER/NAME); {accepted}") from error
        except (OSError, ValueError) as error:
            if "gated" in str(error):
                what = "is gated; accept its terms on its page, then log in with `hf auth login`"
                raise self.refused(what) from error
            if CONFIG_NAME in str(error):
                self.expect_no_adapter()
            what = f"is no model (no folder here; of the hub: {first_line(error)}); {accepted}"
            raise self.refused(what) from error

    def read_json(self, file: str) -> dict[str, Any] | None:
        """The JSON object in `file`, None where the model has none."""
        if (path := self.find(file)) is None:
            return None
        try:
            values = json.loads(read_regular(path, MAX_BYTES))
        except OSError as error:
            raise self.refused(f"has a {file} that cannot be read ({error.strerror})") from error
        except (ValueError, RecursionError) as error:
            raise self.malformed(file, first_line(error)) from error
        if not isinstance(values, dict):
            raise self.malformed(file, f"it holds a {type(values).__name__}, not an object")
        return values

    def expect_files(self) -> None:
        """Raises InputError for a folder with links that lead nowhere, as a hub's cache copied without what it links
        to, or with Git LFS's pointers in place of files: what is not there would be taken for missing."""
        for path in sorted(Path(self.name).iterdir()) if os.path.isdir(self.name) else ():
            if path.suffix not in FILES:
                continue
            if not path.is_file():
                mend = "copy the folder with what its links lead to (cp -rL)" if path.is_symlink() else "restore it"
                raise self.refused(f"has a {path.name} that is no file; {mend}")
            try:
                pointer = is_lfs_pointer(path)
            except OSError as error:
                raise self.refused(f"has a {path.name} that cannot be read ({error.strerror}); mend it") from error
            if pointer:
                raise self.refused(f"has of its {path.name} the pointer of Git LFS alone; fetch it with git lfs pull")

    def expect_no_adapter(self, weights: Iterable[str] = ()) -> None:
        """transformers takes an adapter for what it is only where peft is installed, and else runs its base alone.

        weights: names of those for which the model has no place.
        """
        if self.find(ADAPTER_CONFIG_NAME):
            raise self.refused(f"holds {MERGE} ({ADAPTER_CONFIG_NAME} is there)")
        if adapter := next((key for key in weights if _ADAPTER.search(key)), None):
            raise self.refused(f"holds {MERGE} (its weights have {adapter})")

    def expect_safetensors(self) -> None:
        """Raises InputError where the index of a sharded checkpoint names files that are no safetensors."""
        if bad := sorted(file for file in self._shards() or () if not file.endswith(".safetensors")):
            raise self.refused(f"names {bad[0]!r} among its weights; {SAFETENSORS}")

    def expect_weights(self) -> None:
        """Raises InputError for a file of weights that is missing, or not as long as its header says."""
        shards = self._shards()
        for file in shards or (SAFE_WEIGHTS_NAME,):
            if (path := self.find(file)) is None:
                if shards:
                    raise self.refused(f"is not whole ({SAFE_WEIGHTS_INDEX_NAME} names {file}, which is missing)")
                raise self.refused(f"has no weights in safetensors files; {SAFETENSORS}")
            try:
                with safe_open(path, "pt"):
                    pass
            except (OSError, SafetensorError) as error:
                raise self.refused(f"is not whole ({file}: {first_line(error)}); restore the file") from error

    def _shards(self) -> list[str] | None:
        """The files that a sharded checkpoint's index names; None where there is no index."""
        if (index := self.read_json(SAFE_WEIGHTS_INDEX_NAME)) is None:
            return None
        files = index.get("weight_map")
        if not isinstance(files, dict) or not files or not all(isinstance(file, str) for file in files.values()):
            raise self.malformed(SAFE_WEIGHTS_INDEX_NAME, "its weight_map does not name a file for each weight")
        if out := sorted(file for file in files.values() if Path(file).is_absolute() or ".." in Path(file).parts):
            raise self.malformed(SAFE_WEIGHTS_INDEX_NAME, f"{out[0]!r} lies outside of the model")
        return sorted(set(files.values()))

    def pixel_statistics(self) -> dict[str, list[float]]:
        """`image_mean` and `image_std` of channels in 0..1, as far as the model's image processor says them.

        A processor that rescales otherwise than by 1/255, or that does not normalise, is told in the same terms.
        """
        file = PROCESSOR_NAME
        said = (self.read_json(file) or {}).get("image_processor")
        if said is None:
            file = IMAGE_PROCESSOR_NAME
            said = self.read_json(file) or {}
        if not isinstance(said, dict):
            raise self.malformed(file, f"image_processor is a {type(said).__name__}")

        def numbers(key: str, least: float) -> list[float] | None:
            if (value := said.get(key)) is None:
                return None
            values = value if isinstance(value, list) else [value] * 3
            if len(values) != 3 or not all(_number(x) and least <= x <= MOST for x in values):
                accepted = f"accepted are three numbers from {least:g} to {MOST:g}"
                raise self.malformed(file, f"{key} is {value!r}; {accepted}")
            return [float(x) for x in values]

        def switch(key: str) -> bool:
            if not isinstance(value := said.get(key), bool | None):
                raise self.malformed(file, f"{key} is {value!r}; accepted are true and false")
            return value is not False

        mean, std = numbers("image_mean", -MOST), numbers("image_std", 1 / MOST)
        rescale = numbers("rescale_factor", 1 / MOST)
        unit = 255 * (rescale[0] if rescale else BYTE) if switch("do_rescale") else 255.0
        if not switch("do_normalize"):
            mean, std = [0.0] * 3, [1.0] * 3
        if abs(unit - 1) > 1e-3:
            if mean is None or std is None:
                what = f"rescales channels by {unit / 255:g} in its {file}, which lacks image_mean or image_std"
                raise self.refused(f"{what}: add them")
            mean, std = [x / unit for x in mean], [x / unit for x in std]
        return {key: values for key, values in (("image_mean", mean), ("image_std", std)) if values is not None}


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


@contextmanager
def quiet(progress: bool = True) -> Iterator[None]:
    """Without transformers' tables of what did not load, which is told in one line; and without its progress bar."""
    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(logging.CRITICAL)
    if not progress:
        transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()
