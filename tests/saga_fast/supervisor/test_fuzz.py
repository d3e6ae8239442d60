"""Model folders with randomly damaged small files: each raises a one-line error, or loads as a usable model with every
number in range.

    pytest -m fuzz -s tests/saga_fast/supervisor/test_fuzz.py      # 6,000 folders; `make test-all` tries 60
"""

from __future__ import annotations

import json
import math
import random
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from hypothesis import strategies as st

from saga_fast.supervisor.mllm import load_mllm, read_pretrained
from saga_fast.supervisor.prompt import Prompt
from saga_fast.supervisor.rollout import Sampling
from saga_fast.supervisor.supervisor import Supervisor, prompt_prefix
from saga_fast.towers import tower_of
from saga_fast.utils.errors import InputError
from saga_fast.utils.releases import quiet

from ..test_fuzz import BATCH, cases, hunt, refused
from .families import save

FAMILIES = ("qwen3-vl", "internvl", "llava-llama", "llava-qwen2-tied")
PROMPT = Prompt("expert", "bird", "same", ("bill",))
SIDE = 32
JUNK = [None, True, False, -1, 0, 1, 2, 3, 7, 64, 257, 288, 2**31, 2**63, 10**9, 0.5, -0.0, 1e300, math.nan, math.inf]
JUNK += ["", "x", "64", "default", "dynamic", "longrope", "llama", "silu", "é\u2028\x1b[2J", "9" * 5000, "<image>"]
JUNK += [[], {}, [1], [1, 2, 3], [0.5] * 3, [[0.5]], ["a"], {"a": 1}, {"rope_type": "dynamic", "factor": 2.0}]
WORDS = [
    "{% endif %}",
    "{{ 1 / 0 }}",
    "{{ messages }}",
    "{% if",
    "}}",
    "{{ raise_exception('no') }}",
    "<think>",
    "\x00",
]
WORDS += [
    "<|image_pad|>",
    "<image>",
    "<IMG_CONTEXT>",
    "{{ eos_token }}",
    "\ud800",
    "\u202e",
    "{% set m = 3 %}",
    "\n",
    " ",
]
WORDS += ["null", "-1", "[", "]", "{", "}", '"', ",", ":", "NaN", "1e999", "\\u0000", "\\ud800", "9" * 5000, "[" * 5000]


def places(value: object, found: list) -> list:
    """All (container, key) in a JSON value."""
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        found.append((value, key))
        places(value[key], found)
    return found


def damage_values(chance: random.Random, text: str) -> str:
    """The JSON `text` with values, keys or whole parts taken out, swapped, doubled, renamed or replaced by junk."""
    value = json.loads(text)
    for _ in range(chance.choice([1, 1, 1, 2, 3])):
        if not (found := places(value, [])):
            break
        if "vocab" in text and chance.random() < 0.7:  # a vocabulary would take nearly all
            found = [(c, k) for c, k in found if not (isinstance(c, dict) and len(c) > 50)] or found
        (container, key), (other, another) = chance.choice(found), chance.choice(found)
        match chance.randrange(8):
            case 0 | 1 | 2 | 3:
                container[key] = chance.choice(JUNK)
            case 4:
                del container[key]
            case 5:
                container[key] = json.loads(json.dumps(other[another])) if another in dict_or_list(other) else None
            case 6 if isinstance(container, dict):
                container[chance.choice(["x", key.upper(), "image_token_index", "eos_token_id"])] = container.pop(key)
            case _ if isinstance(container[key], int | float) and not isinstance(container[key], bool):
                container[key] += chance.choice([-1, 1, 0.5, 1000])
    return json.dumps(value)


def dict_or_list(value: dict | list) -> object:
    return value if isinstance(value, dict) else range(len(value))


def damage_text(chance: random.Random, text: str) -> str:
    for _ in range(chance.choice([1, 1, 2, 4])):
        at, end = sorted(chance.choices(range(len(text) + 1), k=2))
        match chance.randrange(5):
            case 0:
                text = text[:at]
            case 1:
                text = text[:at] + text[min(end, at + chance.choice([1, 5, 50])) :]
            case 2:
                text = text[:end] + text[at:end] + text[end:]
            case _:
                text = text[:at] + chance.choice(WORDS) + text[at:]
    return text


def as_older(chance: random.Random, files: dict[str, str]) -> None:
    """Moves a flag or a file to where other versions of transformers keep it."""
    config = json.loads(files["config.json"])
    text = config["text_config"]
    match chance.randrange(7):
        case 0:
            text["tie_word_embeddings"] = config.pop("tie_word_embeddings", False)
        case 1 if "rope_parameters" in text:
            scaling = text.pop("rope_parameters")
            text["rope_theta"] = scaling.pop("rope_theta", 1e4)
            text["rope_scaling"] = {
                "type": chance.choice(["dynamic", "linear", "mrope", "yarn"]),
                "factor": 2.0,
            } | scaling
        case 2 if "image_token_id" in config:
            config["image_token_index"] = config.pop("image_token_id")
        case 3 if "chat_template.jinja" in files:
            files["chat_template.json"] = json.dumps({"chat_template": files.pop("chat_template.jinja")})
        case 4 if "chat_template.jinja" in files:
            named = [{"name": chance.choice(["default", "rag"]), "template": files.pop("chat_template.jinja")}]
            tokens = json.loads(files["tokenizer_config.json"]) | {"chat_template": named}
            files["tokenizer_config.json"] = json.dumps(tokens)
        case 5 if "preprocessor_config.json" in files:
            said = json.loads(files.pop("preprocessor_config.json"))
            files["processor_config.json"] = json.dumps({"image_processor": said})
        case 6:
            text["eos_token_id"] = chance.randrange(300)
            files.pop("generation_config.json", None)
    files["config.json"] = json.dumps(config)


def damaged(seed: int, whole: dict[str, str]) -> dict[str, bytes | None]:
    """The files of a model, some of them changed; None is a folder in a file's place."""
    chance, files = random.Random(seed), dict(whole)
    for _ in range(chance.choice([0, 0, 1, 2])):
        as_older(chance, files)
    changed: dict[str, bytes | None] = {}
    for name in chance.sample(sorted(files), chance.choice([0, 0, 1, 1, 1, 1, 1, 2, 3])):
        text = files[name]
        match chance.randrange(8):
            case 0:
                del files[name]
                if chance.random() < 0.3:
                    changed[name] = None
                continue
            case 1 | 2 | 3 | 4 if name.endswith(".json"):
                text = damage_values(chance, text)
            case _:
                text = damage_text(chance, text)
        content = bytearray(text.encode("utf-8", "surrogatepass"))
        if content and chance.random() < 0.05:
            content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        changed[name] = bytes(content)
    return {name: text.encode() for name, text in files.items()} | changed


def folders_are_right(root: Path) -> Callable[[tuple[str, int]], str]:
    wholes, weights = {}, {}
    for family in FAMILIES:
        folder = save(family, root / "whole" / family)
        weights[family] = folder / "model.safetensors"
        wholes[family] = {file.name: file.read_text() for file in folder.iterdir() if file != weights[family]}
    place, accepted = root / "model", 0

    def holds(case: tuple[str, int]) -> str:
        nonlocal accepted
        family, seed = case
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        (place / "model.safetensors").symlink_to(weights[family])
        for name, content in damaged(seed, wholes[family]).items():
            (place / name).mkdir() if content is None else (place / name).write_bytes(content)
        sampling = Sampling(group_size=2, max_new_tokens=16)
        try:
            pretrained = read_pretrained(place)
            known = pretrained.mllm
            tower = tower_of(known.visual)
            grid = tower.grid(SIDE, SIDE)
            prefix, placed = prompt_prefix(known, PROMPT, "images_first", grid, sampling)
        except InputError as error:
            assert "still at it" not in str(
                error
            )  # `hunt` raises that where a case hangs, and all that is raised is told
            return refused(error)
        # What can be asked is in range, each image has its tokens, and pixels stay numbers.
        image = known.tokenizer.convert_tokens_to_ids(known.image_token)
        assert image == pretrained.config.image_token_id and prefix.input_ids.count(image) == 2 * grid[0] * grid[1] > 0
        assert all(prefix.input_ids[at] == image for span in prefix.image_spans for at in range(*span))
        assert 0 <= min(prefix.input_ids) <= max(prefix.input_ids) < pretrained.config.text_config.vocab_size
        assert known.eos_token_ids and all(
            0 <= token < pretrained.config.text_config.vocab_size for token in known.eos_token_ids
        )
        assert known.max_positions is None or placed.next_position + 17 <= known.max_positions
        pixels = tower.normalize(torch.full((1, 3, 1, 1), 200, dtype=torch.uint8), torch.float32)
        assert pixels.isfinite().all()
        accepted += 1
        if accepted % 8:
            return "asked"
        try:
            mllm = load_mllm(pretrained, quantize=bool(seed % 2))
            supervisor = Supervisor(mllm, PROMPT, "images_first", grid, sampling)
            features = tower_of(mllm.visual)(torch.full((2, 3, SIDE, SIDE), 9, dtype=torch.uint8))
            (group,) = supervisor.rollout(features.detach(), torch.tensor([0]))
        except InputError as error:
            return f"asked, then {refused(error)}"
        except ValueError as error:  # a run drops such pairs, and says so
            assert "met logits that are not finite" in str(error)
            return "asked, logits not finite"
        assert len(group) == 2 and all(
            0 <= token < pretrained.config.text_config.vocab_size for tokens in group for token in tokens
        )
        return "asked and rolled out"

    return holds


@cases(60, 6_000)
def test_a_damaged_model_folder_is_refused_or_can_be_asked(count, tmp_path):
    seeds = st.tuples(st.sampled_from(FAMILIES), st.integers(0, 2**32))
    with warnings.catch_warnings(), quiet(progress=False):
        warnings.simplefilter("ignore")
        hunt(count, st.lists(seeds, min_size=BATCH, max_size=BATCH), folders_are_right(tmp_path))
