"""Samples of a step for the report: a few contributing pairs, their answers, and attention maps.

`RUN/samples/step-NNNNNN.json` (documented at `describe`) and beside it a JPEG with the pairs' images, one pair per row.
Nothing here draws a random number or changes a gradient: a run with samples ends in the same bytes as one without.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from saga_fast.encoder import Encoder, VisualFeatures
from saga_fast.losses.policy import token_coefficients
from saga_fast.report.page import mean_attention
from saga_fast.supervisor.credit import attention_by_attribute, gradient_at_tokens
from saga_fast.supervisor.replay import Group
from saga_fast.supervisor.supervisor import Supervisor
from saga_fast.supervisor.verdict import parse, token_bytes, tokens_by_attribute
from saga_fast.utils.errors import InputError

PAIRS = 4  # of a step, at most


def sampled_steps(steps: int, every: int | None) -> set[int]:
    """The sampled ones of `steps` steps: each `every`-th and the last; by default the first, the middle and the
    last."""
    return {*(range(0, steps, every) if every else (0, steps // 2)), steps - 1}


def describe(
    supervisor: Supervisor, encoder: Encoder, pairs: Sequence[Any], autocast: AbstractContextManager[None]
) -> dict[str, Any]:
    """Plain values about the first few of a step's contributing `pairs` (as train.py buffers them), under the weights
    that sampled them:

    attributes, items: the prompt's; grid: rows, columns of an image's tokens; pairs: for each
      same        whether the images are of one class
      beta        the pooler's attention: two of attribute -> N, or of N where it has one query; None where it has none
      attention   {rollout, images: two of attribute -> N}: ᾱ of each attribute's tokens, of the first rewarded rollout
                  that describes both images; None if none does
      rollouts    for each: tokens (their text), gradient (each token's |A (1 - π)|, as a share of the pair's),
                  attributes (item, name, positions), verdict (yes, no or None), well_formed, reward, advantage,
                  log_prob (the mean of a token)
    """
    prompt, pairs_content = supervisor.prompt, []
    for pair in pairs[:PAIRS]:
        beta = None
        if encoder.pooler.kind in ("attributes", "attention"):
            with torch.no_grad(), autocast:
                attentions = encoder.pooler.attention(pair.features.tokens)  # (2, M, N)
            beta = [
                dict(zip(encoder.attributes, _rounded(attention))) or _rounded(attention[0]) for attention in attentions
            ]
        pairs_content.append({"beta": beta, **_describe_pair(supervisor, pair.features, pair)})
    return {
        "attributes": prompt.attributes,
        "items": prompt.item_keys,
        "grid": encoder.tower.grid(encoder.image_size, encoder.image_size),
        "pairs": pairs_content,
    }


def _describe_pair(supervisor: Supervisor, features: VisualFeatures, pair: Any) -> dict[str, Any]:
    lengths = [len(completion) for completion in pair.completions]
    coefficients = token_coefficients(pair.advantages, lengths, sum(lengths)).split(lengths)
    log_probs = supervisor.replay(features, [Group(pair.completions, coefficients, {})]).log_probs[0]
    gradients = [gradient_at_tokens(c.to(p), p) for c, p in zip(coefficients, log_probs)]
    total = sum(float(gradient.sum()) for gradient in gradients) or 1.0

    rollouts, rewarded, same = [], [], None
    for g, completion in enumerate(pair.completions):
        text, attributes = _read(completion, supervisor)
        verdict, reward = parse(supervisor.text(completion), supervisor.prompt), float(pair.rewards[g])
        if verdict and reward:
            same = verdict.same
            rewarded += [g] if attributes else []
        rollouts.append(
            {
                "tokens": text,
                "gradient": _rounded(gradients[g] / total),
                "attributes": attributes,
                "verdict": None if verdict is None else ("no", "yes")[verdict.same],
                "well_formed": verdict is not None and verdict.well_formed,
                "reward": reward,
                "advantage": float(pair.advantages[g]),
                "log_prob": float(log_probs[g].mean()),
            }
        )
    attention: dict[str, Any] | None = None
    for entry in attention_by_attribute(supervisor, features, pair.completions, rewarded):
        attention = attention or {"rollout": entry.rollout, "images": [{}, {}]}
        if entry.rollout == attention["rollout"]:
            attention["images"][entry.image][entry.attribute] = _rounded(entry.weights.mean(0))
    return {"same": same, "attention": attention, "rollouts": rollouts}


def _read(completion: Sequence[int], supervisor: Supervisor) -> tuple[list[str], list[tuple[int, str, list[int]]]]:
    """The text of each token, and the attributes with their positions."""
    try:
        # A character that is split over several tokens appears with the last of them.
        utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        text = [utf8.decode(piece) for piece in token_bytes(completion, supervisor.tokenizer)]
        items = tokens_by_attribute(completion, supervisor.tokenizer, supervisor.prompt)
    except InputError:  # not byte-level, as only attribute tokens need
        return [supervisor.tokenizer.decode([token]) for token in completion], []
    return text, [(item, name, at) for item, found in enumerate(items) for name, at in found.items() if at]


def _rounded(values: Tensor) -> list[Any]:
    """Nested lists of four significant digits, enough for a picture."""
    if values.dim() > 1:
        return [_rounded(row) for row in values]
    return [float(f"{value:.4g}") for value in values.tolist()]


def sheet(pairs: Sequence[Any]) -> Tensor:
    """uint8 (rows, columns, 3): the images of the pairs that `describe` takes, one pair per row."""
    pixels = torch.stack([pair.pixels for pair in pairs[:PAIRS]]).cpu()  # (P, 2, 3, S, S)
    return pixels.permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1).contiguous()


def overlays(content: dict[str, Any], sheet: Tensor) -> Image.Image | None:
    """The first pair with an attention target, one row per image: plain, shaded by the mean ᾱ, shaded by the mean β."""
    for i, pair in enumerate(content["pairs"]):
        if pair["attention"] and pair["beta"]:
            side = sheet.shape[1] // 2
            images = sheet[i * side : (i + 1) * side].unflatten(1, (2, side)).transpose(0, 1)  # (2, S, S, 3)
            pictures = [images]
            for attentions in (pair["attention"]["images"], pair["beta"]):
                weights = [mean_attention(attention) for attention in attentions]
                brightness = torch.tensor(weights).unflatten(1, content["grid"])[:, None]
                brightness = brightness / brightness.amax((2, 3), keepdim=True).clamp_min(4 / brightness[0].numel())
                brightness = F.interpolate(brightness, (side, side), mode="bilinear").permute(0, 2, 3, 1)
                pictures.append(((0.33 + 0.67 * brightness) * images).byte())
            return Image.fromarray(torch.cat([picture.flatten(0, 1) for picture in pictures], 1).numpy())
    return None
