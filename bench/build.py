"""The extension, in place, for this machine: `python -m bench.build`.

With CUDA for this card alone, where there is one and a compiler for it, if need be without Hopper's own instructions;
in C++ alone elsewhere, and where that fails.
Nothing is done where the extension that lies here was built by this of the same sources for the same machine.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import torch

REPOSITORY = Path(__file__).parents[1]
STAMP = REPOSITORY / "build/extension.stamp"


def fingerprint() -> str:
    """Of what the extension is built of and for."""
    digest = hashlib.sha256(f"{sys.version} {torch.__version__} {capability()}".encode())
    for file in sorted([REPOSITORY / "setup.py", *(REPOSITORY / "csrc").iterdir()]):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def capability() -> str | None:
    """As TORCH_CUDA_ARCH_LIST has it; of Hopper with the instructions that no later GPU has."""
    if not torch.cuda.is_available():
        return None
    found = "{}.{}".format(*torch.cuda.get_device_capability())
    return {"9.0": "9.0a"}.get(found, found)


def main() -> int:
    if any((REPOSITORY / "kernels").glob("_C*.so")) and STAMP.exists() and STAMP.read_text() == fingerprint():
        print("built before, of the same sources")
        return 0
    headers = Path(torch.__file__).parents[1].glob("nvidia/cu*/include")  # PyTorch's own, if the toolkit lacks some
    environment = {**os.environ, "CPATH": os.pathsep.join(map(str, headers)), "MAX_JOBS": str(os.cpu_count())}
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace", "--force"]
    ways = [{"SAGA_CUDA": "0"}]
    if (card := capability()) is not None:
        ways = [{"TORCH_CUDA_ARCH_LIST": name} for name in dict.fromkeys((card, card.removesuffix("a")))] + ways
    for way in ways:
        if subprocess.run(command, cwd=REPOSITORY, env={**environment, **way}).returncode == 0:
            STAMP.parent.mkdir(parents=True, exist_ok=True)
            if way is ways[0]:  # of a build that was not what was wanted, try again the next time
                STAMP.write_text(fingerprint())
            print(f"built with {way}")
            return 0
    return 1


if __name__ == "__main__":
    sys.exit(main())
