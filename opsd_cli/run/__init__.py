"""The run folder: its layout, its lock, its events, its summary, and the heartbeat of its ranks."""
