"""Pages as single HTML files: no script, no request, and every text from models and data shown literally."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from opsd_cli.safety.secrets import redact
from opsd_cli.safety.terminal import escape_controls

PAGES = Path(__file__).parents[1] / "assets" / "pages"


def render(template: str, **values: Any) -> str:
    """A template of assets/pages with the common style sheet."""
    environment = Environment(
        loader=FileSystemLoader(PAGES), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: _literal(value) if type(value) is str else value,
    )  # fmt: skip
    css = (PAGES / "page.css").read_text(encoding="utf-8")
    return environment.get_template(template).render(css=css, **values)


def _literal(text: str) -> str:
    """As it is, except that what would reorder or hide text is shown by its code, and secrets are left out."""
    return redact(escape_controls(text))
