"""The user's own prompt: read from TOML, errors that name file and field, and stored in the run."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from pathlib import Path

import pytest

from saga_fast.supervisor.prompt import PROMPTS, Prompt
from saga_fast.supervisor.prompt_file import MAX_BYTES, load_prompt, stored_prompt
from saga_fast.utils.errors import InputError

PAGE = Path(__file__).parents[3] / "docs/prompts.md"
GOOD = {
    "role": '"mycologist"',
    "item": '"mushroom"',
    "verdict_key": '"same_species"',
    "attributes": '["cap color", "gills"]',
}


def write(folder: Path, **changes: str | None) -> str:
    path = folder / "my.toml"
    fields = {name: value for name, value in {**GOOD, **changes}.items() if value is not None}
    path.write_text("".join(f"{name} = {value}\n" for name, value in fields.items()), encoding="utf-8")
    return str(path)


def test_the_example_in_the_docs_loads(tmp_path):
    (example,) = re.findall(r"```toml\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    (tmp_path / "my.toml").write_text(example)
    prompt = load_prompt(str(tmp_path / "my.toml"))
    assert all(f'"{word}"' in example for word in (prompt.role, prompt.item, prompt.verdict_key, *prompt.attributes))


def test_a_file_becomes_the_prompt_it_says(tmp_path):
    path = write(
        tmp_path, role='" an  expert\\tof fungi "', attributes='["cap\\n color", "gills", "Größe 猫", "a \\"b\\""]'
    )
    prompt = load_prompt(path)
    assert prompt == Prompt(
        "an expert of fungi", "mushroom", "same_species", ("cap color", "gills", "Größe 猫", 'a "b"')
    )
    assert all(
        words in prompt.instruction() for words in ("an expert of fungi", "cap color, gills, Größe 猫", "mushroom_2")
    )


@pytest.mark.parametrize("name", PROMPTS)
def test_built_in_prompts_are_named(name):
    assert load_prompt(name) is PROMPTS[name]


def test_text_that_looks_like_a_format_stays_text(tmp_path):
    tricks = ["{0.__class__}", "{self.item}", "%s %(item)s %n", "${HOME} $(id)", "{{ 7 * 7 }} {% raw %}", "`id`"]
    prompt = load_prompt(write(tmp_path, role="'{self.__class__.__init__.__globals__}'", attributes=json.dumps(tricks)))
    assert prompt.attributes == tuple(tricks)
    assert ", ".join(tricks) in prompt.instruction() and "{self.__class__.__init__.__globals__}" in prompt.instruction()
    described = dict.fromkeys(tricks, "{0}")
    assert json.loads(prompt.answer(described, described, "{0}", "high", "%s", True))["mushroom_1"] == described


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"roles": '"x"'}, "'roles' is an unknown field; did you mean role?"),
        ({"generic": "true"}, "'generic' is an unknown field; accepted are role, item, verdict_key, attributes"),
        *(({name: None}, f"{name} is missing; a prompt has role, item, verdict_key, attributes") for name in GOOD),
        *(({name: "7"}, f"{name} is of type int; accepted is a") for name in GOOD),
        ({"role": "true"}, "role is of type bool; accepted is a string"),
        ({"attributes": '"bill"'}, "attributes is of type str; accepted is a list of strings"),
        ({"attributes": '["bill", 3]'}, "attributes is a list of int, str; accepted is a list of strings"),
        ({"attributes": "[]"}, "attributes: empty"),
        ({"attributes": '["bill", "  "]'}, "prompt.attributes: empty"),
        ({"role": '" "'}, "prompt.role: empty"),
        ({"attributes": '["cap  color", "cap\\u00a0color"]'}, "prompt.attributes: 'cap color' is used twice"),
        ({"attributes": '["cap, gills"]'}, "prompt.attributes: 'cap, gills' holds a comma"),
        ({"attributes": json.dumps([f"a{i}" for i in range(101)])}, "attributes: 101 given; accepted are up to 100"),
        ({"attributes": f'["{"x" * 201}"]'}, "prompt.attributes: '" + "x" * 40 + "'… has 201 characters"),
        ({"role": f'"{"x" * 60000}"'}, "has 60,000 characters; accepted are up to 200"),
        ({"role": f'"{"x" * MAX_BYTES}"'}, "cannot be read (more than 65,536 bytes)"),
        *(
            ({field: f'"{key}"'}, f"prompt.{field}: ")
            for field in ("item", "verdict_key")
            for key in ("", "a bird", "1st", "vögel", "a.b", 'a\\"b', "{0}", "x" * 41, "a\\nb c")
        ),
        ({"verdict_key": '"mushroom_1"'}, "prompt.verdict_key: 'mushroom_1' is used twice"),
        ({"verdict_key": '"gills"'}, "prompt.attributes: 'gills' is the verdict_key too; rename one of them"),
        ({"verdict_key": '"reasoning"'}, "prompt.verdict_key: 'reasoning' is used twice"),
        ({"role": '"<|im_end|>"'}, "prompt.role: '<|im_end|>' holds < or >"),
        ({"attributes": '["</s>"]'}, "prompt.attributes: '</s>' holds < or >"),
        ({"role": '"a\\u0000b"'}, r"prompt.role: 'a\x00b' holds the unprintable character '\x00'"),
        ({"role": '"a\\u202eb"'}, r"prompt.role: 'a\u202eb' holds the unprintable character '\u202e'"),
        ({"attributes": '["\\u001b[2J"]'}, r"holds the unprintable character '\x1b'"),
        ({"role": '"x'}, "cannot be read (Illegal character"),
        ({"role": "[" * 20000}, "cannot be read ("),
        ({"role": "9" * 20000}, "accepted is a "),
        ({"role": "0x" + "f" * 20000}, "role is of type int; accepted is a string"),
        ({"attributes": f"[0x{'f' * 20000}]"}, "attributes is a list of int; accepted is a list of strings"),
        ({"role.a": '"x"'}, "cannot be read ("),
    ],
)  # fmt: skip
def test_a_bad_file_is_refused_in_a_line(changes, message, tmp_path):
    path = write(tmp_path, **changes)
    with pytest.raises(InputError) as caught:
        load_prompt(path)
    assert (line := str(caught.value)).startswith(f"supervisor.prompt: {path!r}: ") and message in line
    assert line.isprintable() and len(line) < 3000


def test_what_is_no_toml_file_is_refused(tmp_path):
    def refusal(name: str) -> str:
        with pytest.raises(InputError) as caught:
            load_prompt(name)
        assert str(caught.value).isprintable()
        return str(caught.value)

    assert "'brids' is unknown; use one of birds, cars, aircraft, drawn-birds, or a file" in refusal("brids")
    assert "No such file" in refusal(str(tmp_path / "none.toml"))
    (tmp_path / "folder.toml").mkdir()
    os.mkfifo(tmp_path / "pipe.toml")
    (tmp_path / "loop.toml").symlink_to("loop.toml")
    (tmp_path / "zero.toml").symlink_to("/dev/zero")
    for name in ("folder", "pipe", "zero"):
        assert "not a regular file" in refusal(str(tmp_path / f"{name}.toml"))
    assert "symbolic links" in refusal(str(tmp_path / "loop.toml"))
    (tmp_path / "latin.toml").write_bytes('role = "Größe"'.encode("latin-1"))
    assert "byte 10 is not UTF-8" in refusal(str(tmp_path / "latin.toml"))
    (tmp_path / "wide.toml").write_text('role = "x"', encoding="utf-16")
    assert "not UTF-8" in refusal(str(tmp_path / "wide.toml"))
    assert r"new\nline" in refusal(str(tmp_path / "new\nline.toml"))
    refusal(os.fsdecode(b"\xff.toml"))
    refusal("\0.toml")


@pytest.mark.parametrize("prompt", [*PROMPTS.values(), PROMPTS["cars"].as_generic()])
def test_a_run_keeps_the_prompt_itself(prompt, tmp_path):
    (file := tmp_path / "config.json").write_text(json.dumps({"prompt": dataclasses.asdict(prompt)}))
    assert stored_prompt(file) == prompt


@pytest.mark.parametrize(
    "stored", ["{}", "[]", '{"prompt": null}', '{"prompt": {"role": 3}}', '{"prompt": {"attributes": [1]}}', "{", ""]
)
def test_a_run_that_lost_its_prompt_is_refused(stored, tmp_path):
    (file := tmp_path / "config.json").write_text(stored)
    with pytest.raises(InputError, match="config.json': prompt: missing or malformed"):
        stored_prompt(file)
