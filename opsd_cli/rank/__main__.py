"""`python -m opsd_cli.rank RUN_FOLDER TASK` is one rank. Apart from `entry`, because nothing may be collected as
garbage while that is imported: it stays, and to look through it again and again takes two of the seven seconds."""

import atexit
import gc
import sys
from importlib import import_module

if __name__ == "__main__":
    gc.disable()
    entry = import_module("opsd_cli.rank.entry")
    # DeepSpeed, too, collects garbage when it starts, and would look through all of it. At the end it is ordinary
    # garbage again, or libraries report it as leaked.
    gc.freeze()
    atexit.register(gc.unfreeze)
    gc.enable()
    raise SystemExit(entry.main(sys.argv[1:]))
