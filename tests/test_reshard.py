"""A checkpoint is read in any layout: what one number of ranks saved at one ZeRO stage another number continues at
another, exactly as it was and with the same next update."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from gradient_ranks import make_model
from reshard_ranks import KINDS, READERS, WRITERS
from safetensors.torch import save_file
from support import TESTS, run_ranks

from opsd_cli.engine.tensor_shards import Piece, TensorShards, refuse_other_weights, shard_file, write_pieces
from opsd_cli.engine.training_state import FOLDER, MOMENTS, WEIGHTS
from opsd_cli.engine.weight_copies import COPY
from opsd_cli.settings.errors import DataError


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("reshard")
    for tied in (True, False):
        make_model(root / ("tied" if tied else "untied"), tied=tied)
    run_ranks([TESTS / "reshard_ranks.py", "write", root], 2)
    for ranks in READERS:
        run_ranks([TESTS / "reshard_ranks.py", "read", root], ranks)
    return root


def held(folder: Path) -> dict[str, torch.Tensor]:
    """Everything that was saved, whole, by kind and name."""
    found = {}
    for kind in (WEIGHTS, *MOMENTS, COPY):
        with TensorShards(folder if kind == COPY else folder / FOLDER, kind) as shards:
            found |= {f"{kind} {name}": shards.whole(name) for name in shards.shapes}
    return found


def counts(folder: Path) -> dict[str, int]:
    files = sorted((folder / FOLDER).glob("updates_*.json"))
    return {name: count for file in files for name, count in json.loads(file.read_text())["updates"].items()}


LAYOUTS = [f"{ranks} ranks, stage {stage}" for ranks, stages in READERS.items() for stage in stages]


@pytest.mark.slow
@pytest.mark.parametrize("reader", LAYOUTS)
@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_is_continued_in_another_layout(root: Path, kind: str, writer: str, reader: str) -> None:
    wrote, read = root / kind / writer, root / kind / writer / reader
    before, after = held(wrote / "saved"), held(read / "saved")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)  # not a bit is lost
    assert counts(wrote / "saved") == counts(read / "saved")
    unbroken, continued = held(wrote / "next"), held(read / "next")
    for name in unbroken:
        moved = not torch.equal(before[name], unbroken[name])
        assert moved, name
        # In bfloat16 the gradient of another split differs by what its products are rounded.
        tolerance = {"rtol": 0.05, "atol": 2e-3} if kind == "half" else {"rtol": 1e-4, "atol": 1e-6}
        torch.testing.assert_close(continued[name].float(), unbroken[name].float(), **tolerance, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("reader", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_from_before_the_first_update_takes_everything_back(root: Path, kind: str, reader: str) -> None:
    wrote, read = (
        held(root / kind / "2 ranks, stage 2" / "start"),
        held(root / kind / "2 ranks, stage 2" / reader / "start"),
    )
    assert all(torch.equal(read[name], wrote[name]) for name in wrote)
    assert not any(read[name].any() for name in read.keys() - wrote.keys())  # moments of zero
    assert set(counts(root / kind / "2 ranks, stage 2" / reader / "start").values()) <= {0}


def test_pieces_from_any_ranks_are_one_tensor(tmp_path: Path) -> None:
    whole = torch.arange(35.0)
    for rank, (start, stop) in enumerate([(0, 9), (9, 9), (9, 30), (30, 35)]):
        write_pieces(
            shard_file(tmp_path, "weights", rank), [Piece("w", (5, 7), start, whole[start:stop], torch.bfloat16)]
        )
    with TensorShards(tmp_path, "weights") as shards:
        assert torch.equal(shards.whole("w"), whole.view(5, 7))
        assert torch.equal(shards.read("w", 8, 31), whole[8:31])
        assert shards.read("w", 12, 12).numel() == 0
        assert shards.dtypes == {"w": torch.bfloat16}
        with pytest.raises(DataError, match=r"does not hold the trained weights of this model: w is \(5, 7\)"):
            refuse_other_weights(shards, {"w": (7, 5)})
        with pytest.raises(DataError, match="v is not there in the checkpoint"):
            refuse_other_weights(shards, {"w": (5, 7), "v": (1,)})


def test_a_missing_or_foreign_file_of_pieces_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no weights_"):
        TensorShards(tmp_path, "weights")
    whole = torch.arange(10.0)
    write_pieces(shard_file(tmp_path, "weights", 1), [Piece("w", (10,), 4, whole[4:], torch.float32)])
    with TensorShards(tmp_path, "weights") as shards, pytest.raises(DataError, match="lacks entries 0 to 10 of w"):
        shards.whole("w")
    shard_file(tmp_path, "weights", 0).write_bytes(b"no tensors")
    with pytest.raises(DataError, match=r"weights_00000.safetensors holds no pieces of tensors"):
        TensorShards(tmp_path, "weights")
    save_file({"w": whole}, shard_file(tmp_path, "weights", 0), metadata={"pieces": '{"w": {"dtype": "load"}}'})
    with pytest.raises(DataError, match=r"weights_00000.safetensors holds no pieces of tensors"):
        TensorShards(tmp_path, "weights")
