"""`python -m bench.gpu OP [--json FILE]`: see the package. The file is written anew after every case."""

import argparse
import sys
from importlib import import_module
from pathlib import Path

import torch

from bench import write_json
from bench.gpu import ceilings, measure, table


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description="Time one op beside its rivals.")
    parser.add_argument("op", choices=sorted(p.stem for p in Path(__file__).parent.glob("[!_]*.py")))
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("bench.gpu: no GPU that PyTorch can use; nothing measured", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    ceiling = ceilings()
    print(f"{torch.cuda.get_device_name()}: {ceiling.flops / 1e12:.0f} TFLOP/s, {ceiling.bytes / 1e12:.2f} TB/s")
    rows = []
    for case in import_module(f"bench.gpu.{arguments.op}").cases():
        rows.append(measure(case, ceiling))
        print(*table(rows[-1]), sep="\n", flush=True)
        write_json(arguments.json, {"ceiling": ceiling._asdict(), "cases": rows})
        del case
        torch.cuda.empty_cache()
    return int(any("wrong" in row["implementations"]["ours"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
