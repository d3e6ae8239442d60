import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]

PROBE = """
import kernels
assert not hasattr(kernels, "group_attention"), "the folder exports its ops under the probed name"
from transformers import Qwen3VLForConditionalGeneration
from transformers.utils import is_kernels_available
assert not is_kernels_available(), "transformers takes our folder for the package it probes for"
import bitsandbytes, saga_kernels
assert saga_kernels.group_attention
"""


def test_the_folder_named_kernels_does_not_pass_for_the_package_of_that_name():
    done = subprocess.run([sys.executable, "-c", PROBE], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_imports_from_elsewhere(tmp_path):
    code = "import saga_kernels, sys; assert 'transformers' not in sys.modules; print(saga_kernels.__all__)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
