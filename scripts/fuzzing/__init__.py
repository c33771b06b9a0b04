"""Hostile input by hypothesis and what must hold for it: `scripts/fuzz.py`, and a sample in `tests/test_fuzz.py`."""
