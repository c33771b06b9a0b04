"""Untrusted text, files and code: secrets, terminal escapes, plain YAML, killable child processes."""
