"""Golden runs: a change that should change nothing shows equal bytes. `python -m tests.golden`, see __main__.py."""
