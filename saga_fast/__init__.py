import logging

# At import it warns that an optional package for its own CPU forward is missing; our ops do not use that forward.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
