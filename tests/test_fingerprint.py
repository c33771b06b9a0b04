"""The fingerprint of a model: of its bytes, the same wherever and however it is computed."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from gradient_ranks import make_model
from torch import nn
from transformers import PreTrainedModel, Qwen3ForCausalLM

from opsd_cli.engine import fingerprint as module
from opsd_cli.engine.fingerprint import OF_BYTES, fingerprint
from opsd_cli.engine.loading import add_adapter
from opsd_cli.settings.config import LoraSettings


@pytest.fixture
def model(tmp_path: Path) -> PreTrainedModel:
    make_model(tmp_path, tied=True)
    return Qwen3ForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)


class Layers(nn.Module):
    """Two weights and a stored buffer, registered in the given order."""

    def __init__(self, *names: str, size: int = 6) -> None:
        super().__init__()
        for name in names:
            values = torch.arange(float(size)) + len(name)
            if name == "buffer":
                self.register_buffer(name, values)
            else:
                self.register_parameter(name, nn.Parameter(values.view(2, -1)))


def test_it_is_the_sha256_of_names_types_shapes_and_bytes():
    layers = Layers("long", "b", "buffer")
    layers.register_buffer("table", torch.ones(3), persistent=False)  # a file would not hold it
    each = [
        hashlib.sha256(f"{name} torch.float32 {list(tensor.shape)}\n".encode() + tensor.detach().numpy().tobytes())
        for name, tensor in (("b", layers.b), ("buffer", layers.buffer), ("long", layers.long))
    ]
    assert fingerprint(layers) == OF_BYTES + hashlib.sha256(b"".join(one.digest() for one in each)).hexdigest()


def test_threads_pieces_layout_and_the_order_of_layers_change_nothing(monkeypatch: pytest.MonkeyPatch):
    expected, threads = fingerprint(Layers("long", "b", "buffer")), torch.get_num_threads()
    assert fingerprint(Layers("buffer", "b", "long")) == expected
    turned = Layers("long", "b", "buffer")
    turned.long.data = turned.long.data.T.contiguous().T
    assert not turned.long.is_contiguous()
    assert fingerprint(turned) == expected
    monkeypatch.setattr(module, "CHUNK_BYTES", 8)
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            assert fingerprint(Layers("long", "b", "buffer")) == expected
    finally:
        torch.set_num_threads(threads)


def test_an_adapter_and_a_tied_name_do_not_count(model: PreTrainedModel):
    expected = fingerprint(model)
    lm = add_adapter(model, LoraSettings(rank=2, alpha=4, dropout=0.0, targets=("q_proj", "down_proj")), seed=0)
    assert sum("lora_" in name for name, _ in lm.named_parameters()) > 0
    assert fingerprint(model) == expected


def test_every_change_of_the_weights_is_seen(model: PreTrainedModel):
    found = {"as loaded": fingerprint(model)}
    weight = model.model.layers[0].mlp.down_proj.weight.data
    weight[0, [0, 1]] = weight[0, [1, 0]]
    found["two numbers change places, with the same sum"] = fingerprint(model)
    weight[0, [0, 1]] = weight[0, [1, 0]]
    assert fingerprint(model) == found["as loaded"]
    before = weight[0, 0].clone()
    weight[0, 0] = before.nextafter(torch.tensor(torch.inf))
    found["the last bit of one"] = fingerprint(model)
    weight[0, 0] = before
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    found["a head of its own, with the same numbers"] = fingerprint(model)
    model.to(torch.bfloat16)
    found["another type"] = fingerprint(model)
    model.to(torch.float32)
    found["rounded to it and back"] = fingerprint(model)
    assert len(set(found.values())) == len(found) == 6
