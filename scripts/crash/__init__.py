"""Parts of the crash matrix: `python scripts/crash_matrix.py`."""
