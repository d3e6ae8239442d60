import logging
import os

# At import it warns that an optional package for its own CPU forward is missing; our ops do not use that forward.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

# Groups of a replay differ in length, and so do their tensors: fixed segments would fragment the GPU's memory, until
# the allocator frees and reallocates everything at every group. Read when CUDA starts; a value set by the user is kept.
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
