"""One process of a run: what it is given, what it builds, what it records and how it ends."""
