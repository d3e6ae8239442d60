"""The shape that tests of benchmarks run."""

from dataclasses import replace

from bench.record import SHAPES

SHAPE = replace(SHAPES["small"], layers=3, pairs=2, group=2, short=6)
