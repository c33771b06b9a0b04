"""The child process that renders chat templates, for `chat`: transformers' own sandboxed renderer, plus the limits on
time and memory that it lacks.
"""

from __future__ import annotations

from typing import Any

from transformers.utils.chat_template_utils import render_jinja_template

from opsd_cli.safety.sandbox import serve


def render(request: dict[str, Any]) -> Any:
    """The text of each conversation (a list of messages with role and content)."""
    return render_jinja_template(
        conversations=request["conversations"],
        chat_template=request["template"],
        add_generation_prompt=request["generation_prompt"],
        **request["variables"],
    )[0]


if __name__ == "__main__":
    serve(render)
