import logging
import os

# At import it warns that an optional package for its own CPU forward is missing; our ops do not use that forward.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

# Groups of a replay differ in length, and so do the blocks they need: in fixed segments those fill the card with gaps,
# until the allocator frees and allocates all anew at every group. Read when CUDA starts; said by the user, it stands.
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
