"""Run as a program: the child process in which chat templates are rendered, by transformers' own sandboxed renderer.
Apart from `chat`, so that a child starts with little more than that.
"""

from __future__ import annotations

import sys
from datetime import datetime
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

from opsd_cli.safety.sandbox import serve

PACKAGE, RENDERER = "transformers", "transformers.utils.chat_template_utils"


def import_renderer() -> Any:
    """The module of transformers that renders templates. `import transformers` would bring half of the library, and a
    second of CPU time at the start of every run: so its packages are entered without running their own files, unless a
    version needs these."""
    spec = find_spec(PACKAGE)
    assert spec is not None, "a dependency"
    assert spec.origin is not None, "it is a package"
    folder = Path(spec.origin).parent
    for name, path in ((PACKAGE, folder), (f"{PACKAGE}.utils", folder / "utils")):
        package = ModuleType(name)
        package.__path__ = [str(path)]
        sys.modules[name] = package
    vars(sys.modules[PACKAGE])["__version__"] = version(PACKAGE)
    try:
        return import_module(RENDERER)
    except (ImportError, AttributeError):
        for name in [name for name in sys.modules if name.partition(".")[0] == PACKAGE]:
            del sys.modules[name]
        return import_module(RENDERER)


def render(renderer: Any, request: dict[str, Any]) -> list[str]:
    """The text of each conversation, with the run's date in place of the clock."""
    date = request.pop("date")
    # The renderer takes no functions from outside, so its own `strftime_now` is given a calendar with one day.
    vars(renderer)["datetime"] = datetime if date is None else one_day(datetime.fromisoformat(date))
    rendered: Any = renderer.render_jinja_template(**request)[0]
    return list(rendered)


def one_day(day: datetime) -> type[datetime]:
    """A datetime whose clock stands still."""

    class OneDay(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return day

    return OneDay


if __name__ == "__main__":
    module = import_renderer()  # before the memory that is in use is measured
    serve(lambda request: render(module, request))
