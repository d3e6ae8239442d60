"""The interface of a family of models, whose parts transformers names and connects differently."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from transformers import PretrainedConfig  # seconds to import


class ImageText(NamedTuple):
    """How an image is written in a prompt. placeholder: the chat template's text for an image; None for the image
    token. before, after: the text around an image's tokens, as the model's processor writes it."""

    placeholder: str | None = None
    before: str = ""
    after: str = ""


PLAIN = ImageText()


@dataclass(frozen=True)
class Family:
    """One family; its tower is `towers`' of the same model type.

    name: for messages. kinds: model types of its configurations. decoders: model types of the language models that
    it may have. visual: the vision model, where it is one part of `model.model`; None where it is all of that but the
    tower's `not_vision`. language_model: the part of `model.model` that `FrozenDecoder` takes. newline: the parameter
    (D,) of `model.model` that is one more embedding after each image's tokens. bidirectional_images: whether the
    tokens of an image attend to each other in both directions. marks: tokens that the model's processor, not the
    template, writes around an image: (attribute of the tokenizer that may name it, its usual text). image_text: made
    from the marks. objections: reasons why a configuration cannot be run as it was trained, beyond those that hold for
    all families.
    """

    name: str
    kinds: tuple[str, ...]
    decoders: tuple[str, ...]
    visual: str | None = None
    language_model: str = "language_model"
    newline: str | None = None
    bidirectional_images: bool = False
    marks: tuple[tuple[str, str], ...] = ()
    image_text: Callable[..., ImageText] = ImageText
    objections: Callable[[PretrainedConfig], Iterator[str]] = lambda config: iter(())
