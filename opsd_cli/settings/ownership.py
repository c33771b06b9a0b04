"""Who may set what (design decision 3): a recipe says what, a method says how, and neither sets the knobs of
an option that it did not choose itself. Owns that one rule, which Hydra would break in silence.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from opsd_cli.settings.folders import GROUPS, RecipeFolders
from opsd_cli.settings.origins import overrides_of, with_siblings
from opsd_cli.settings.recipe_scan import METHOD_OWNS


def leaked_keys(folders: RecipeFolders, choices: Mapping[str, str | None]) -> Iterator[str]:
    """The problems of the chosen recipe and method: keys that would reach an option they were not written
    for."""
    for group in ("recipe", "method"):
        option = choices.get(group)
        if option is None:
            continue
        own = {entry.group: entry.option for _, entry in overrides_of(folders, group, option)}
        for file in with_siblings(folders, group, option):
            for key in file.keys:
                section = key.name.partition(".")[0]
                problem = _problem(group, key.name, section, own=own, chosen=choices.get(section))
                if problem:
                    yield f"{file.at(key.line)}: {problem}"


def _problem(group: str, key: str, section: str, *, own: Mapping[str | None, str], chosen: str | None) -> str | None:
    if section not in GROUPS:
        return f"a method sets no numbers; {key} belongs to a recipe" if group == "method" else None
    if group == "recipe" and section in METHOD_OWNS:
        return f"a recipe does not set {key}: {section} belongs to a method; make {section}/NAME.yaml and choose it"
    if section not in own:
        return f"{key} is set without choosing a {section}; add `- override /{section}: NAME` to the defaults list"
    if own[section] != chosen:
        return (
            f"{key} was written for {section}={own[section]}, but {section}={chosen} is chosen; "
            f"put it into a {section} file of its own"
        )
    return None
