"""Readers of events and reports: the only files that import rich."""
