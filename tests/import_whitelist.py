"""A contract for import-linter: a folder of the package imports what is listed for it, and reaches nothing else through
what it imports. Apart from test_architecture because import-linter loads it by name, from pyproject.toml."""

from __future__ import annotations

from collections.abc import Iterator

from grimp import ImportGraph
from importlinter import Contract, ContractCheck, fields, output

ANYTHING = "anything"


class Whitelist(Contract):
    """`allowed` has one line for each folder or loose module of the package, `FOLDER -> WHAT, IT, IMPORTS`, from the
    top down: a folder may import what a later line is about, or single modules of it. `owners` has one line for each
    library, `LIBRARY -> MODULE`. Imports inside functions and under TYPE_CHECKING count."""

    type_name = "whitelist"
    package = fields.StringField()
    allowed = fields.ListField(subfield=fields.StringField())
    owners = fields.ListField(subfield=fields.StringField())

    def check(self, graph: ImportGraph, verbose: bool) -> ContractCheck:
        lines = self._lines(self.allowed)
        problems = [*self._wrong_lines(graph, lines), *self._wrong_owners(graph)]
        present = {folder: listed for folder, listed in lines.items() if f"{self.package}.{folder}" in graph.modules}
        problems += [*self._wrong_imports(graph, present), *self._wrong_reach(graph, present)]
        return ContractCheck(kept=not problems, metadata={"problems": problems})

    def render_broken_contract(self, check: ContractCheck) -> None:
        for problem in check.metadata["problems"]:
            output.print_error(problem, bold=False)

    def _lines(self, lines: list[str]) -> dict[str, list[str]]:
        split = [line.partition("->") for line in lines]
        return {name.strip(): [word.strip() for word in listed.split(",") if word.strip()] for name, _, listed in split}

    def _wrong_lines(self, graph: ImportGraph, lines: dict[str, list[str]]) -> Iterator[str]:
        """Folders without a line, and lines about what is not there or about what has a line above."""
        folders = {self._short(child) for child in graph.find_children(self.package)}
        for folder in sorted(folders - lines.keys()):
            yield f"{folder} has no line in the whitelist"
        for folder in sorted(lines.keys() - folders):
            yield f"{folder} has a line in the whitelist and is not in {self.package}"
        order = list(lines)
        for place, (folder, listed) in enumerate(lines.items()):
            for name in listed:
                if name != ANYTHING and name.partition(".")[0] not in order[place + 1 :]:
                    yield f"{folder} may import {name}, which has no line below its own"
                elif name != ANYTHING and f"{self.package}.{name}" not in graph.modules:
                    yield f"{folder} may import {name}, which is not in {self.package}"

    def _wrong_imports(self, graph: ImportGraph, lines: dict[str, list[str]]) -> Iterator[str]:
        """What no line allows. It leaves the graph, so that the report does not repeat it for all who reach it."""
        for folder, listed in lines.items():
            whole = f"{self.package}.{folder}"
            for module in sorted({whole} | graph.find_descendants(whole)):
                for imported in sorted(graph.find_modules_directly_imported_by(module)):
                    if self._is_foreign(imported, folder) and not self._belongs(imported, listed):
                        yield f"{self._short(module)} imports {self._short(imported)}"
                        graph.remove_import(importer=module, imported=imported)

    def _wrong_reach(self, graph: ImportGraph, lines: dict[str, list[str]]) -> Iterator[str]:
        """What a folder that may import one module of another reaches beyond it."""
        for folder, listed in lines.items():
            whole = f"{self.package}.{folder}"
            reachable = self._reachable(listed, lines)
            for module in sorted(graph.find_upstream_modules(whole, as_package=True)):
                if self._is_foreign(module, folder) and not self._belongs(module, reachable):
                    chain = graph.find_shortest_chain(whole, module, as_packages=True) or ()
                    yield f"{folder} reaches {self._short(module)}: {' > '.join(map(self._short, chain))}"

    def _wrong_owners(self, graph: ImportGraph) -> Iterator[str]:
        for library, owners in self._lines(self.owners).items():
            if library not in graph.modules:
                yield f"{library} has an owner and is imported nowhere"
                continue
            for importer in sorted(graph.find_modules_that_directly_import(library)):
                if not self._belongs(importer, owners):
                    yield f"{self._short(importer)} imports {library}, which is for {', '.join(owners)}"

    def _reachable(self, listed: list[str], lines: dict[str, list[str]]) -> set[str]:
        """What is listed, and all that it may import in turn."""
        return set(listed).union(*(self._reachable(lines.get(name.partition(".")[0], []), lines) for name in listed))

    def _is_foreign(self, module: str, folder: str) -> bool:
        """Whether a module is in another folder of the package."""
        return module.startswith(f"{self.package}.") and not self._belongs(module, [folder])

    def _belongs(self, module: str, names: list[str] | set[str]) -> bool:
        short = self._short(module)
        return any(name == ANYTHING or short == name or short.startswith(f"{name}.") for name in names)

    def _short(self, module: str) -> str:
        return module.removeprefix(f"{self.package}.")
