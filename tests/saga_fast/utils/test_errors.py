"""What a user reads, whatever names are in it."""

from __future__ import annotations

import subprocess
import sys

import pytest

from saga_fast.utils.errors import InputError, printable


@pytest.mark.parametrize("encoding,seen", [("utf-8", "caf\\udce9 猫\n"), ("ascii", "caf\\udce9 \\u732b\n")])
def test_names_that_are_no_text_can_be_printed(encoding, seen):
    code = "from saga_fast.utils.errors import exit_on_input_error as e\nwith e():\n  print('caf\\udce9 猫')"
    environment = {"PYTHONIOENCODING": encoding, "PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment)
    assert (done.returncode, done.stdout.decode(), done.stderr) == (0, seen, b"")


def test_ctrl_c_leaves_no_trace():
    code = "from saga_fast.utils.errors import exit_on_input_error as e\nwith e():\n  raise KeyboardInterrupt"
    environment = {"PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "\ninterrupted\n")


def test_a_reader_that_is_gone_leaves_no_trace():
    code = (
        "from saga_fast.utils.errors import exit_on_input_error as e\n"
        "with e():\n  while True: print('a line', flush=True)"
    )
    environment = {"PYTHONPATH": ":".join(sys.path)}
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", code], stdout=pipe, stderr=pipe, env=environment) as process:
        process.stdout.readline()
        process.stdout.close()
        assert (process.stderr.read(), process.wait(60)) == (b"", 141)


def test_a_message_is_one_printable_line():
    assert printable("a\nb\x1b[2J\udce9\u2028猫") == "a\\nb\\x1b[2J\\udce9\\u2028猫"
    assert str(InputError("a\nb")) == "a\\nb" and len(str(InputError("x" * 10**6))) < 2000
