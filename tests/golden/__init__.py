"""Golden runs: a change without numerical effect gives equal bytes. `python -m tests.golden`, see __main__.py."""
