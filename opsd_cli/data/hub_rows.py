"""Splits of a dataset on the hub -> rows. Owns the one use of the `datasets` library and which copy is read:
the hub's newest, or the cached one when the hub cannot be reached. What a hub failure means is
`opsd_cli.data.hub`'s business.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from opsd_cli.data.hub import explain_hub_failure, hub_errors, look_up
from opsd_cli.data.rows import FieldMap, Table
from opsd_cli.settings.errors import DataError


class HubLoader:
    """One hub dataset. Making it asks the hub once, visibly, whether it can be reached and has the
    dataset."""

    def __init__(self, name: str, *, subset: str | None, revision: str | None) -> None:
        self.name = name
        self.subset = subset
        self.revision = revision
        self.commit = look_up("dataset", name, revision=revision)

    @property
    def source(self) -> str:
        """In words: which dataset at which commit, or that it is a cached copy."""
        name = self.name if self.subset is None else f"{self.name} ({self.subset})"
        if self.commit is None:
            return f"{name}, the cached copy (the hub was not reached)"
        return f"{name} at {self.commit[:12]} from the hub"

    def table(self, split: str, fields: FieldMap) -> Table:
        """The rows of one hub split. Raises DataError (name, subset, split) or OutsideError (hub, no cached
        copy)."""
        import datasets

        what = f"dataset {self.name}"
        with hub_errors(what), _cache_only(self.commit is None):
            try:
                loaded = datasets.load_dataset(self.name, self.subset, split=split, revision=self.revision)
            except (ValueError, datasets.exceptions.DatasetsError) as error:
                # For an unknown subset or split the library's first line lists those there are.
                reason = str(error).strip().split("\n")[0]
                raise explain_hub_failure(error, what) or DataError(f"{what}: {reason}") from error
        kept = loaded.select_columns([name for name in fields.columns if name in loaded.column_names])
        rows = tuple((number, dict(row)) for number, row in enumerate(kept, start=1))
        return Table(f"{what} ({split})", tuple(loaded.column_names), rows)


@contextmanager
def _cache_only(wanted: bool) -> Iterator[None]:
    """Keep the client libraries off the network inside the block, if `wanted`. On their own they would try
    again for half a minute per file although `look_up` has found that the hub cannot be reached."""
    from datasets import config
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE, config.HF_HUB_OFFLINE
    if wanted:
        constants.HF_HUB_OFFLINE = config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, config.HF_HUB_OFFLINE = before
