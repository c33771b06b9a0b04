"""Builds the documentation as a site: README, `docs/` and the pages at the top of the repository, by Sphinx with MyST.

    pip install '.[docs]'
    python scripts/make_site.py site            # site/index.html works from disk; a warning is an error

The pages stay plain Markdown that reads well where it lies: this script copies them into one folder, rewrites the links
between them, and names what the site does not hold (source files, the licence) by its path, or links to it there with
SOURCE_URL=https://... in the environment.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
TOP = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "SECURITY.md": "security.md"}
TOP |= {"CHANGELOG.md": "changelog.md", "AGENTS.md": "agents.md"}
# Every page is in one chapter: a test compares them with the files that are there.
CHAPTERS = {
    "Start": ["quickstart", "concepts", "data", "models", "moving"],
    "Before": ["before-you-train", "plan"],
    "Train": [
        "recipes", "configuration", "methods", "sampling", "sweeps", "launching", "clusters", "reliability",
        "troubleshooting",
    ],
    "See and judge": ["watching", "outputs", "reports", "evidence", "performance"],
    "Use": ["using-the-model", "api"],
    "Extend": ["adding", "code", "contributing", "agents", "security", "changelog", "notes/lab-notes"],
}  # fmt: skip
LINK = re.compile(r"(!?\[[^\]]*\])\(([^)\s]+)\)")
CONFIG = """
project = "opsd"
extensions = ["myst_parser"]
html_theme = "furo"
html_title = "opsd"
myst_heading_anchors = 4
myst_enable_extensions = ["dollarmath"]
html_show_copyright = html_show_sphinx = html_copy_source = False
exclude_patterns = []
suppress_warnings = ["misc.highlighting_failure"]
"""


def site_path(path: Path) -> str | None:
    """Where a file of the repository stands in the site; None where it is not part of it."""
    try:
        inside = path.relative_to(REPOSITORY).as_posix()
    except ValueError:
        return None
    if inside in TOP:
        return TOP[inside]
    if inside.startswith("docs/") and path.suffix in (".md", ".png"):
        return inside.removeprefix("docs/")
    return None


def with_site_links(text: str, page: Path) -> str:
    """A page whose links lead to other pages of the site, or name a file of the repository."""
    here = Path(site_path(page) or "").parent
    source = os.environ.get("SOURCE_URL", "").rstrip("/")

    def link(found: re.Match[str]) -> str:
        label, target = found.groups()
        if re.match(r"[a-z]+:|#", target):
            return found[0]
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve()
        there = site_path(path)
        if there is None:
            inside = path.relative_to(REPOSITORY).as_posix()
            shown = label.lstrip("!")
            return f"{shown}({source}/{inside})" if source else f"{shown[1:-1]} (`{inside}`)"
        relative = Path(os.path.relpath(there, here)).as_posix()
        return f"{label}({relative}{'#' + anchor if anchor else ''})"

    # Links are text's; what stands in a fenced block is shown as it is.
    parts = re.split(r"(^```.*?^```$)", text, flags=re.DOTALL | re.MULTILINE)
    return "".join(part if part.startswith("```") else LINK.sub(link, part) for part in parts)


def write_sources(folder: Path) -> None:
    """The pages, their pictures and Sphinx's settings, in a folder of their own."""
    (folder / "conf.py").write_text(CONFIG, encoding="utf-8")
    pages = [REPOSITORY / name for name in TOP] + sorted((REPOSITORY / "docs").rglob("*.md"))
    for page in pages:
        to = folder / str(site_path(page))
        to.parent.mkdir(parents=True, exist_ok=True)
        text = with_site_links(page.read_text("utf-8"), page)
        if page.name == "README.md":
            text += "".join(
                f"\n```{{toctree}}\n:hidden:\n:caption: {chapter}\n\n" + "\n".join(names) + "\n```\n"
                for chapter, names in CHAPTERS.items()
            )
        to.write_text(text, encoding="utf-8")
    shutil.copytree(REPOSITORY / "docs" / "pictures", folder / "pictures")


def main() -> int:
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        print(__doc__, file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        write_sources(Path(folder))
        # -W and --keep-going: every warning is shown, and any is an error.
        words = ["-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html", folder, sys.argv[1]]
        return subprocess.run([sys.executable, *words], check=False).returncode


if __name__ == "__main__":
    raise SystemExit(main())
