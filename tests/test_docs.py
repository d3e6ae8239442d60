"""Links, files, modules, flags and make's targets in README, docs/ and CONTRIBUTING exist."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from saga_fast.config import PRESETS
from saga_fast.supervisor.prompt_file import load_prompt

REPOSITORY = Path(__file__).parents[1]
DOCS = sorted((REPOSITORY / "docs").glob("*.md"))
PAGES = [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *DOCS]

# Documented before the code that has it is in: each leaves this list when it comes.
AHEAD: set[str] = set()

LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
FILE = re.compile(r"(?<![\w./-])((?:\.ci|bench|csrc|docs|kernels|saga_fast|tests)/[\w./-]*[\w/])")
MODULE = re.compile(r"python -m ([a-z_][\w.]*\w)")
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z-]*\.[a-z][a-z-]*")
OF_OTHERS = {"pytest", "venv"}

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def without_code(text: str) -> str:
    return re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.DOTALL)


def anchors(page: Path) -> set[str]:
    """Of the headings, as GitHub makes them."""
    found: list[str] = []
    for heading in re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL), re.MULTILINE):
        name = re.sub(r"[^\w\- ]", "", re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()).replace(" ", "-")
        found.append(f"{name}-{found.count(name)}" if name in found else name)
    return set(found)


def broken_links(page: Path) -> Iterator[str]:
    for link in LINK.findall(without_code(page.read_text())):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists():
            yield f"{link}: no such file"
        elif anchor and anchor not in anchors(target):
            yield f"{link}: no such heading; there are {sorted(anchors(target))}"


@pages
def test_links_lead_somewhere(page):
    assert not list(broken_links(page))


def test_broken_links_are_found(tmp_path):
    (tmp_path / "other.md").write_text("# One `thing`, and more\n```\n# not a heading\n```\n")
    page = tmp_path / "page.md"
    page.write_text("[a](other.md#one-thing-and-more) [b](gone.md) [c](other.md#not-a-heading) `[d](gone.md)` [e](#no)")
    assert [fault.split(":")[0] for fault in broken_links(page)] == ["gone.md", "other.md#not-a-heading", "#no"]


def test_every_page_is_linked_from_the_readme():
    linked = {(REPOSITORY / link.split("#")[0]).resolve() for link in LINK.findall(PAGES[0].read_text())}
    assert not set(DOCS) - linked


def test_the_readme_is_short():
    assert len(PAGES[0].read_text().splitlines()) <= 250


@pages
def test_files_that_are_named_are_there(page):
    named = {name for name in FILE.findall(re.sub(r"\]\([^)]*\)", "", page.read_text())) if "NAME" not in name}
    assert not {name for name in named if not (REPOSITORY / name).exists()}


@pages
def test_modules_that_are_run_are_there(page):
    def there(module: str) -> bool:
        path = REPOSITORY / module.replace(".", "/")
        return path.with_suffix(".py").exists() or (path / "__main__.py").exists() or (path / "__init__.py").exists()

    named = {name for name in MODULE.findall(page.read_text()) if "NAME" not in name} - OF_OTHERS
    assert not {module for module in named - AHEAD if not there(module)}
    assert not {module for module in named & AHEAD if there(module)}, "AHEAD: it is there now"


def flags(config: object, prefix: str = "--") -> Iterator[str]:
    for field in dataclasses.fields(config):
        name, value = field.name.rstrip("_").replace("_", "-"), getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from flags(value, f"{prefix}{name}.")
        else:
            yield prefix + name
            if isinstance(value, bool):
                yield f"{prefix}no-{name}"


@pages
def test_flags_are_the_trainers(page):
    known, named = set(flags(PRESETS["cub"])), set(FLAG.findall(page.read_text())) - {"--section.field"}
    assert not named - known - AHEAD
    assert not named & known & AHEAD, "AHEAD: it is there now"


@pages
def test_targets_are_makes(page):
    named = set(re.findall(r"(?:^|`)make ([a-z][\w-]*)", page.read_text(), re.MULTILINE))
    assert named <= set(re.findall(r"^([a-z][\w-]*):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE))


def test_the_fuzzing_that_is_counted_is_that_of_the_tests():
    fuzz = [REPOSITORY / "tests/saga_fast/test_fuzz.py", REPOSITORY / "tests/saga_fast/supervisor/test_fuzz.py"]
    tried = [int(many) for file in fuzz for many in re.findall(r"^@cases\(\d+, ([\d_]+)\)$", file.read_text(), re.M)]
    table = (REPOSITORY / "docs/security.md").read_text().partition("| input | cases |")[2].partition("\n\n")[0]
    told = [int(count.replace(",", "")) for count in re.findall(r"^\|[^|]*\| ([\d,]+) \|", table, re.M)]
    assert sorted(told) == sorted(tried) and len(tried) > 5


def test_presets_and_prompts_that_are_named_are_all_there_are():
    table = (REPOSITORY / "docs/quickstart.md").read_text().split("| preset |")[1].split("\n\n")[0]
    assert set(re.findall(r"`([a-z-]+)`", table)) == set(PRESETS)


def test_the_prompt_file_in_the_docs_is_one(tmp_path):
    (example,) = re.findall(r"```toml\n(.*?)```", (REPOSITORY / "docs/prompts.md").read_text(), re.DOTALL)
    (tmp_path / "mushrooms.toml").write_text(example)
    prompt = load_prompt(str(tmp_path / "mushrooms.toml"))
    assert (prompt.item_keys, len(prompt.attributes)) == (("mushroom_1", "mushroom_2"), 7)
