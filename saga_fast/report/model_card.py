"""The model card of an encoder, written from the run that trained it."""

from __future__ import annotations

import json
import re
from pathlib import Path

from huggingface_hub import ModelCardData

from saga_fast.config import TINY, Config
from saga_fast.evaluate import COLUMNS

DATA = {
    "drawn-birds": "{species} species of birds, drawn by code, {images_per_species} pictures each",
    "cub": "CUB-200-2011",
    "cars": "Cars-196",
    "aircraft": "FGVC-Aircraft, variants",
    "inat-aves": "The birds of iNaturalist 2021 (train_mini)",
    "folder": "A folder of images, one folder per class",
}

HUB_ID = re.compile(r"\w[\w.-]*/[\w.-]+")

CARD = """---
{metadata}
---
# Image-retrieval encoder

Images in, unit vectors of {embedding_dim} numbers out; the inner product of two is their similarity. Trained for
{steps} steps {method}

## Use

```python
from saga_fast.encoder import Encoder

encoder = Encoder.from_pretrained("THIS FOLDER OR HUB ID")
z = encoder(["a.jpg", "b.jpg"])  # (2, {embedding_dim}), paths, PIL images or uint8 tensors
similarity = z[0] @ z[1]
```

`python -m saga_fast.embed --encoder DIR IMAGES --index OUT` makes a folder of pictures searchable.
Pictures are resized to {image_size} x {image_size} pixels, aspect ratio not kept.

## Data and results

{data}. Classes are split in halves: trained on the first, measured on the second.
Every image of the second half queries all the others; per cent:

{table}

## Licence

{license}

## Configuration

```json
{config}
```
"""


def model_card(
    config: Config,
    before: dict[str, float],
    after: dict[str, float],
    steps: int,
    weights: dict[str, str] | None = None,
) -> str:
    """Markdown with the hub's metadata on top. before, after: `retrieval_metrics` of the test half; steps: of training;
    weights: `source` and `license` of a separate tower; None for a tower from a local folder, which is no source for
    others."""
    own, tower = config.data, config.encoder.tower
    if tower is None:
        model = config.supervisor.model
        published = bool(HUB_ID.fullmatch(model)) and not Path(model).exists()  # a folder may be gone by now
    else:
        model, published = (weights or {}).get("source", ""), bool(weights)
    metadata = ModelCardData(
        license=config.encoder.license,
        library_name="saga_fast",
        pipeline_tag="image-feature-extraction",
        tags=["image-retrieval", "metric-learning", *(["saga"] if config.uses_supervisor else [])],
        base_model=model if published and " " not in model else None,
    )
    method = "by a metric loss alone, with saga_fast."
    if config.uses_supervisor:
        name = f"`{model}`" if published else "the tiny model that comes with saga_fast" if model == TINY else "a model"
        method = (
            f"with SAGA ([arXiv 2606.15134](https://arxiv.org/abs/2606.15134)): {name} described and judged\n"
            "pairs of images, and its gradient taught this encoder. The language model is not part of it."
        )
    rows = [f"| {when} training | " for when in ("before", "after")]
    rows = [row + " | ".join(f"{100 * m[key]:.2f}" for key in COLUMNS) + " |" for row, m in zip(rows, (before, after))]
    settings = config.to_dict()
    # Paths on the training machine stay private.
    settings["data"]["root"] = None
    settings["supervisor"]["model"] = model if tower is None and (published or model == TINY) else None
    settings["supervisor"]["prompt"] = Path(config.supervisor.prompt).name
    settings["encoder"]["tower"] = tower if published else None
    return CARD.format(
        metadata=metadata.to_yaml(),
        embedding_dim=config.encoder.embedding_dim,
        steps=steps,
        method=method,
        image_size=own.image_size,
        data=DATA[own.name].format(species=own.species, images_per_species=own.images_per_species),
        table="\n".join([f"| | {' | '.join(COLUMNS.values())} |", "|---" * (len(COLUMNS) + 1) + "|", *rows]),
        license=_terms(config.encoder.license) + (_began(weights) if weights else ""),
        config=json.dumps(settings, indent=2),
    )


def _terms(license: str) -> str:
    if license == "unknown":
        return "Not stated. The terms of the model whose vision tower this was, and of the images, apply."
    return f"{license}. The terms of the model whose vision tower this was, and of the images, apply as well."


def _began(weights: dict[str, str]) -> str:
    license = weights["license"]
    terms = "whose licence is on its page" if license == "unknown" else f"under {license}"
    return f"\nThe tower's weights were at first those of {weights['source']}, {terms}."
