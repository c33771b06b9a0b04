"""One attempt at a run: processes, devices, signals, and the message about how it ended."""
