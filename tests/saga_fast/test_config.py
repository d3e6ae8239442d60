"""Values of a command line and a config.json: ranges of numbers, switches, and settings that a resumed run keeps."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from saga_fast.config import (
    KEEP_REASONS,
    PRESETS,
    RESUMABLE,
    CheckArguments,
    Config,
    parse,
    parse_check,
    record_of,
    stored,
)
from saga_fast.data import ClassBalancedSampler
from saga_fast.data.__main__ import CheckArguments as DataCheckArguments
from saga_fast.embed import EmbedArguments
from saga_fast.evaluate import EvaluateArguments
from saga_fast.export import ExportArguments
from saga_fast.search import SearchArguments
from saga_fast.supervisor.draw import draw_pairs
from saga_fast.utils.errors import InputError
from saga_fast.utils.flags import Range, fields_of, from_dict, parse_flags

from ..sweep import sweep

DEFAULT = PRESETS["drawn-birds"]
COMMANDS = (
    *(DEFAULT, SearchArguments(), EmbedArguments(), EvaluateArguments(), ExportArguments()),
    *(CheckArguments(), DataCheckArguments()),
)


def ranges(config: Any) -> Iterator[tuple[str, Range, Any]]:
    """(name, range, type) of each number of a dataclass's fields."""
    for field in fields_of(config):
        if float in (field.hint, *getattr(field.hint, "__args__", ())) or "int" in str(field.hint):
            (accepted,) = [one for one in field.metadata if isinstance(one, Range)]
            yield field.name, accepted, field.hint


def with_value(name: str, value: Any) -> dict[str, Any]:
    values = DEFAULT.to_dict()
    *section, leaf = name.replace("-", "_").split(".")
    (values[section[0]] if section else values)[leaf] = value
    return values


@pytest.mark.parametrize("config", COMMANDS, ids=lambda config: type(config).__name__)
def test_every_number_has_its_range(config):
    found = list(ranges(config))
    assert found or isinstance(config, ExportArguments)
    assert len(found) > 30 or config is not DEFAULT


@pytest.mark.parametrize("name,accepted,hint", list(ranges(DEFAULT)), ids=[name for name, *_ in ranges(DEFAULT)])
def test_what_is_out_of_its_range_is_refused_by_name(name, accepted, hint):
    beyond = [accepted.low - 1, *([accepted.low] if accepted.above else ())]
    beyond += [accepted.high + 1] if accepted.high < math.inf else []
    if "float" in str(hint):
        beyond = [*map(float, beyond), math.nan, math.inf, -math.inf]
    for value in beyond:
        with pytest.raises(InputError, match=f"^{re.escape(name)}: ") as error:
            Config.from_dict(with_value(name, value))
        assert str(value) in str(error.value) and "give " in str(error.value)


@pytest.mark.parametrize(
    "arguments,message",
    [
        (
            ["--encoder.checkpointing", "True"],
            "--encoder.checkpointing for yes, --encoder.no-checkpointing for no",
        ),
        (["--supervisor.quantize=false"], "pass --supervisor.quantize for yes, --supervisor.no-quantize for no"),
        (["--supervisor.no-quantize", "False"], "--supervisor.no-quantize False: a switch takes no value"),
        (["--supervisor.quantize_head", "true"], "pass --supervisor.quantize-head for yes"),
        (["--data.root", ""], "--data.root: empty; give a value, or leave the flag out"),
        (["--data.root="], "--data.root: empty; give a value"),
        (["drawn-birds", "cub"], "cub: belongs to no flag"),
        (
            ["--data.images-per-class", "1"],
            "images-per-class: 1; two images per class are needed for the supervisor's pairs",
        ),
        (
            ["--data.images-per-class", "1", "--lambda.lm", "0", "--lambda.kl", "0"],
            "data.images-per-class: 1; two images per class are needed for dml.loss 'multi-similarity'",
        ),
        (["--rollout.pairs-per-batch", "1"], "rollout.pairs-per-batch: 1; same-class and different-class pairs are"),
        (["--data.classes-per-batch", "1"], "data.classes-per-batch: 1; one class has no other to differ from"),
        (["--rollout.max-batches", "99999"], "rollout.max-batches: 99999 of 64 pairs are more than the 1,048,576"),
        (["--seed", "18446744073709551616"], "seed: 18446744073709551616; give 0 to 9223372036854775807"),
        (["--optim.clip", "0"], "optim.clip: 0.0; give more than 0"),
        (["--optim.encoder-lr", "inf"], "optim.encoder-lr: inf; give a finite number, 0 or more"),
        (["--rollout.top-p", "1.5"], "rollout.top-p: 1.5; give more than 0, up to 1"),
    ],
)
def test_a_command_line_that_cannot_be_meant(arguments, message, tmp_path):
    with pytest.raises(InputError) as error:
        parse([*arguments, "--out", str(tmp_path / "run")])
    assert message in str(error.value)


@pytest.mark.parametrize("config", COMMANDS, ids=lambda config: f"{type(config).__module__}.{type(config).__name__}")
def test_an_empty_text_is_refused_whatever_flag_has_it(config):
    """As a variable of the shell that is not set gives it: a path would be the working directory, --host every address,
    --encoder the index's own."""
    texts = [field.name for field in fields_of(config) if re.search(r"\bstr\b|\bPath\b", str(field.hint))]
    texts = [name for name in texts if name not in ("images", "queries", "name")]  # words without a flag
    assert texts
    for name in texts:
        for words in ([f"--{name}", ""], [f"--{name}="]):
            with pytest.raises(InputError, match=f"^--{re.escape(name)}: empty; give a value, or leave the flag out"):
                parse_flags(config, words, "program", "")


def test_an_empty_word_is_no_preset_and_no_model(tmp_path):
    with pytest.raises(InputError, match="^preset: '' is unknown; use one of drawn-birds"):
        parse(["", "--out", str(tmp_path / "run")])
    with pytest.raises(InputError, match="^models: give `check`, a model's folder"):
        parse_check(["check", ""])


def test_a_new_run_may_be_put_into_an_empty_folder_and_nowhere_else(tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    for name in ("none", "empty", "link"):
        assert parse(["--out", str(tmp_path / name)]).out == tmp_path / name
    (tmp_path / "file").touch()
    (tmp_path / "full").mkdir()
    (tmp_path / "full/notes.txt").touch()
    for name in ("file", "full"):
        with pytest.raises(InputError, match=f"^--out: .*{name} exists; go on with --resume, or name a new folder"):
            parse(["--out", str(tmp_path / name)])
    monkeypatch.chdir(tmp_path / "empty")
    with pytest.raises(InputError, match="^--out: '.' is the working directory"):
        parse(["--out", "."])


def test_each_number_of_several_has_the_range(tmp_path):
    with pytest.raises(InputError, match="cards: -1.0; give more than 0"):
        parse_check(["check", "tiny", "--cards", "24", "-1"])


@pytest.mark.parametrize("encoding", ["utf-8", "UTF-8", "latin-1", "ascii"])
def test_errors_are_the_same_line_on_any_terminal(encoding, tmp_path, monkeypatch):
    for flags, message in (
        (["--optim.clip", "-1"], "optim.clip: -1.0; give more than 0"),
        (["--optim.clip", "a----b"], "--optim.clip: 'a----b'; give a number"),
        (["--optim.steps", "abc"], "--optim.steps: 'abc'; give a whole number"),
        (["--seed", "1.5"], "--seed: '1.5'; give a whole number"),
    ):
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding=encoding))
        with pytest.raises(InputError) as error:
            parse([*flags, "--out", str(tmp_path / "run")])
        assert str(error.value) == message


def test_one_image_a_class_will_do_for_proxies_alone(tmp_path):
    flags = ["--data.images-per-class", "1", "--lambda.lm", "0", "--lambda.kl", "0", "--dml.loss", "proxy-anchor"]
    assert parse([*flags, "--out", str(tmp_path / "run")]).config.data.images_per_class == 1


def test_a_switch_before_a_file_is_a_switch():
    parsed = parse_flags(SearchArguments(), ["--json", "true.jpg"], "search", "")
    assert parsed.json and parsed.queries == ("true.jpg",)


@pytest.mark.parametrize("seed", [0, 20240615, 2**63 - 1])
def test_any_seed_that_is_accepted_seeds_all_there_is_to_seed(seed, tmp_path):
    config = parse(["--seed", str(seed), "--data.seed", str(seed), "--out", str(tmp_path / "run")]).config
    torch.manual_seed(config.seed)
    labels = torch.arange(4).repeat_interleave(4)
    next(ClassBalancedSampler(labels.tolist(), 2, 2, config.seed))
    drawn = [draw_pairs(labels, 32, config.seed, (7 << 20) + pair) for pair in (0, 1, 0)]
    assert torch.equal(drawn[0], drawn[2]) and not torch.equal(drawn[0], drawn[1])


# ── A resumed run ───────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def out(tmp_path) -> Path:
    (out := tmp_path / "run").mkdir()
    write(out, {"run": "1", "config": DEFAULT.to_dict()})
    return out


def write(out: Path, described: Any) -> None:
    (out / "config.json").write_text(json.dumps(described))


@pytest.mark.parametrize(
    "flags,field,value",
    [
        (["--data.root", "/elsewhere"], "data.root", Path("/elsewhere")),
        (["--data.workers", "3"], "data.workers", 3),
        (["--rollout.slots", "2"], "rollout.slots", 2),
        (["--rollout.token-budget", "64", "--rollout.recompute", "full"], "rollout.recompute", "full"),
        (["--encoder.checkpointing"], "encoder.checkpointing", True),
        (["--log.checkpoint-every", "1"], "log.checkpoint-every", 1),
        (["--supervisor.model", "moved/here"], "supervisor.model", "moved/here"),
    ],
)
def test_what_changes_no_result_may_change(out, flags, field, value):
    config = parse(["--out", str(out), "--resume", *flags]).config
    assert {field.name: field.value for field in fields_of(config)}[field] == value
    assert Config.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    "flags,message",
    [
        (
            ["--optim.steps", "48"],
            "--optim.steps: 48, but .* was started with 70; .* followed a cosine over that many",
        ),
        (
            ["--optim.clip", "2"],
            "--optim.clip: 2.0, but .* was started with 1.0; .* keeps that, as earlier updates",
        ),
        (["--optim.states", "8bit"], "the checkpoint's optimizer states are of that kind"),
        (["--seed", "1"], "batches, pairs and rollouts are drawn by it"),
        (["--data.skip-unreadable"], "it determines which images there are"),
        (["--lambda.lm", "2"], "--lambda.lm: 2.0, but .* earlier gradients have these weights"),
        (["--log.evaluate-every", "5"], "it determines which classes are held out"),
        (["cub"], "preset: 'cub', but .* is a run on drawn-birds"),
        (["--optim.stps", "48"], "did you mean --optim.steps?"),
    ],
)
def test_the_rest_says_why_not(out, flags, message):
    named = [flags.pop(0)] if not flags[0].startswith("-") else []
    with pytest.raises(InputError, match=message):
        parse([*named, "--out", str(out), "--resume", *flags])


def test_every_other_field_has_a_reason():
    for field in fields_of(DEFAULT):
        kept = any(f"{field.name}.".startswith(f"{name}.") for name in KEEP_REASONS)
        assert kept or RESUMABLE in field.metadata, field.name


@pytest.mark.parametrize(
    "content,message",
    [
        (None, "holds no run"),
        (b"", "config.json': truncated, or not the file of a run; restore the file"),
        (b'{"run": "1", "config": {"data": {"na', "config.json': truncated"),
        (b"[" * 100_000, "config.json': truncated"),
        (b"[]", "config.json': truncated"),
        (b'{"config": []}', "config.json': truncated"),
        ({"config": {"optim": {"stps": 3}}}, "config.json': optim.stps: unknown field; did you mean steps?; restore"),
        ({"config": {"optimm": {}}}, "config.json': optimm: unknown field; did you mean optim?"),
        ({"config": {"optim": 3}}, "config.json': optim: a int, where fields are expected"),
        ({"config": {"optim": {"steps": "many"}}}, """config.json': optim.steps: "many" is no int or null"""),
        ({"config": {"optim": {"steps": True}}}, "config.json': optim.steps: true is no int or null"),
        ({"config": {"optim": {"steps": 2.5}}}, "config.json': optim.steps: 2.5 is no int or null"),
        ({"config": {"optim": {"clip": None}}}, "config.json': optim.clip: null is no float"),
        ({"config": {"optim": {"clip": math.nan}}}, "config.json': optim.clip: nan; give a finite number"),
        ({"config": {"encoder": {"pooler": ["mean"]}}}, """config.json': encoder.pooler: ["mean"] is no """),
        ({"config": {"encoder": {"checkpointing": 1}}}, "config.json': encoder.checkpointing: 1 is no true or false"),
        ({"config": {"rollout": {"group_size": 1}}}, "config.json': rollout.group-size: 1; an advantage needs"),
    ],
)
def test_a_damaged_or_edited_config_is_named(out, content, message):
    if content is None:
        (out / "config.json").unlink()
    elif isinstance(content, bytes):
        (out / "config.json").write_bytes(content)
    else:
        write(out, content)
    with pytest.raises(InputError) as error:
        parse(["--out", str(out), "--resume"])
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_config_of_before_a_field_was_has_its_default(out):
    values = DEFAULT.to_dict()
    del values["rollout"]["max_batches"], values["tracker"]
    write(out, {"run": "1", "config": values})
    assert stored(out) == DEFAULT and record_of(out)["run"] == "1"


def test_a_dictionary_is_read_as_it_was_written():
    config = dataclasses.replace(DEFAULT, data=dataclasses.replace(DEFAULT.data, root=Path("/a"), train_classes=3))
    assert from_dict(Config, json.loads(json.dumps(config.to_dict()))) == config


# ── What is imported ────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "code,spared",
    sweep(
        [
            (["-m", "saga_fast.train", "--help"], {"torch", "transformers", "numpy"}),
            (["-m", "saga_fast.train", "--optim.stps", "3"], {"torch", "transformers", "numpy"}),
            (["-c", "import saga_fast.encoder"], {"transformers", "sklearn", "bitsandbytes"}),
            (["-m", "saga_fast.search", "--help"], {"transformers", "sklearn", "bitsandbytes", "tensorboard"}),
            (["-m", "saga_fast.embed", "--help"], {"transformers", "sklearn", "bitsandbytes", "tensorboard"}),
            (["-m", "saga_fast.evaluate", "--help"], {"transformers", "sklearn", "bitsandbytes", "tensorboard"}),
            (["-m", "saga_fast.export", "--help"], {"transformers", "sklearn", "bitsandbytes", "onnxruntime"}),
            (["-m", "saga_fast.models", "check", "--help"], {"torch", "transformers", "numpy"}),
            (["-m", "saga_fast.data", "--help"], {"transformers", "sklearn", "bitsandbytes", "tensorboard"}),
        ],
        fast=2,
        several=True,
    ),
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_takes_seconds_to_import_waits_until_it_is_used(code, spared):
    """Counted in modules: seconds are the machine's."""
    done = subprocess.run([sys.executable, "-X", "importtime", *code], capture_output=True, text=True)
    imported = set(re.findall(r"^import time: .*\| +(\S+)$", done.stderr, re.MULTILINE))
    assert done.returncode == (2 if "--optim.stps" in code else 0), done.stderr[-2000:]
    assert "saga_fast" in imported and not spared & imported
