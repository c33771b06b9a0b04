"""`python -m opsd_cli` is the `opsd` command."""

from opsd_cli.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
