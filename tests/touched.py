"""The fast set touches everything: a run of it fails where there is a module of ours none of whose functions ran.

Of `saga_kernels` every public op must have run as well. Only the whole fast set is looked at, all of the folder that
pytest is told of in pyproject.toml with the marks left out that stand there; nothing else pays for the profiler. What
runs as a module is imported, and what runs in other processes, do not count.
"""

from __future__ import annotations

import ast
import cProfile
import inspect
from collections.abc import Iterator
from pathlib import Path
from types import CodeType

import pytest

PACKAGES = ("saga_fast", "kernels")
OPS = "kernels/__init__.py"  # names what is public


def functions(code: CodeType) -> Iterator[CodeType]:
    """Of a module that was compiled: its functions and methods, also those within others."""
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            if _is_function(inner):
                yield inner
            yield from functions(inner)


def _is_function(code: CodeType) -> bool:
    return bool(code.co_flags & inspect.CO_OPTIMIZED) and not code.co_name.startswith("<")


def untouched(root: Path, ran: set[tuple[str, str]]) -> list[str]:
    """The modules below `root` that have functions of which none is in `ran`, (file below `root`, function); then the
    public ops that are not."""
    missing = []
    for file in sorted(file for package in PACKAGES for file in (root / package).rglob("*.py")):
        name = file.relative_to(root).as_posix()
        names = {code.co_name for code in functions(compile(file.read_text(), name, "exec"))}
        if names and not any((name, function) in ran for function in names):
            missing.append(name)
    called = {function for name, function in ran if name.startswith("kernels/")}
    return missing + [f"op {op}" for op in public_ops(root) if op not in called]


def public_ops(root: Path) -> list[str]:
    """What the package exports that is no class."""
    tree = ast.parse((root / OPS).read_text())
    (names,) = (
        node.value for node in ast.walk(tree) if isinstance(node, ast.Assign) and "__all__" in ast.unparse(node)
    )
    return sorted(name for name in ast.literal_eval(names) if name.islower())


class Touched:
    """A plugin of a session, or of a worker of one, which then tells the session what ran."""

    def __init__(self) -> None:
        self.profile = cProfile.Profile(builtins=False, subcalls=False)
        self.ran: set[tuple[str, str]] = set()  # of this process: (file, function)
        self.missing: list[str] = []

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self):
        self.profile.enable()
        try:
            return (yield)
        finally:
            self.profile.disable()

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node) -> None:
        node.workerinput["touched"] = True

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node) -> None:
        self.ran |= {(file, name) for file, name in getattr(node, "workeroutput", {}).get("touched", ())}

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        codes = [entry.code for entry in self.profile.getstats() if isinstance(entry.code, CodeType)]
        self.ran |= {(code.co_filename, code.co_name) for code in codes if _is_function(code)}
        if hasattr(session.config, "workeroutput"):
            session.config.workeroutput["touched"] = sorted(self.ran)
            return
        root, files = session.config.rootpath.resolve(), {}
        for file in {file for file, _ in self.ran}:
            path = Path(file).resolve()
            if path.is_relative_to(root):
                files[file] = path.relative_to(root).as_posix()
        if session.exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
            self.missing = untouched(root, {(files[file], name) for file, name in self.ran if file in files})
        if self.missing:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter) -> None:
        if self.missing:
            terminalreporter.section("not touched by the fast set", red=True)
            terminalreporter.line("\n".join(self.missing))
            terminalreporter.line("Give each a test without a mark, or one of its tests' cases.")


def asked_for(config: pytest.Config) -> bool:
    """Whether this session, or that of this worker, is the whole fast set."""
    if hasattr(config, "workerinput"):
        return "touched" in config.workerinput
    said, options = config.getini("addopts"), config.option
    fast = said[said.index("-m") + 1]
    whole = config.args_source is pytest.Config.ArgsSource.TESTPATHS and options.markexpr == fast
    chosen = options.keyword or options.deselect or options.collectonly or config.getoption("lf", False)
    return whole and not chosen
