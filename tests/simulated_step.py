"""A step of the student without numbers: the product's own policy, loss and AdamW on fake tensors, and how many bytes
are alive at the highest point of it. Two micro-batches' worth of gradients, as in a run."""

from __future__ import annotations

import weakref
from functools import partial
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM

from opsd_cli.data.pairing import PairedBatch, pair
from opsd_cli.data.problems import Problem, PromptPair, Rollout
from opsd_cli.engine import packed
from opsd_cli.engine.loading import add_adapter
from opsd_cli.engine.policy import Policy, score_tokens
from opsd_cli.loss.chunked_head import Objective
from opsd_cli.settings.config import Config


class LiveBytes(TorchDispatchMode):
    """Counts the storages that operations make while it is on, until each is freed."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: set[int] = set()

    def add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if id(storage) in self._seen:
            return
        self._seen.add(id(storage))
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._drop, id(storage), storage.nbytes())

    def _drop(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(made):
            if isinstance(leaf, Tensor):
                self.add(leaf)
        return made


def batch_of(rows: int, *, prompt: int, teacher: int, completion: int) -> PairedBatch:
    problem = Problem(id="p", question="q", solution="s", answer="1")
    prompts = PromptPair(problem, tuple(range(prompt)), tuple(range(teacher)))
    drawn = [Rollout(prompts, tuple(range(completion)), "length", (), place) for place in range(rows)]
    (batch,) = pair([[(rollout, [1.0] * completion) for rollout in drawn]])
    return batch


def materialise(module: nn.Module) -> None:
    """Parameters and buffers of the meta device become fake ones of a CPU; tied ones stay one."""
    made: dict[int, Tensor] = {}
    for owner in module.modules():
        for table in (owner._parameters, owner._buffers):
            for name, old in table.items():
                if old is None:
                    continue
                if id(old) not in made:
                    new = torch.empty(old.shape, dtype=old.dtype)
                    made[id(old)] = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
                table[name] = made[id(old)]


def simulated_peak(config: Config, folder: str, batch: PairedBatch) -> int:
    """The most bytes alive in the student's pass of a step after the first: two micro-batches alike, teacher=live."""
    with torch.device("meta"):
        causal = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.float32)
        causal.requires_grad_(False)
        lm = add_adapter(causal, config.lora, seed=0)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        materialise(lm)
        AttentionInterface.register(packed.NAME, packed.packed_attention)
        causal.set_attn_implementation(packed.NAME)
        policy = Policy(lm, layout="packed")
        if config.train.gradient_checkpointing:
            causal.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
        optimizer, objective = torch.optim.AdamW(trained, lr=1e-3, foreach=False), Objective.of(config)
        live, groups = LiveBytes(), packed.row_groups

        def grouped(lengths, device, *, shared=()):
            """Lengths are numbers, not tensors of the model."""
            with unset_fake_temporarily():
                found = groups(lengths, device, shared=shared)
            places = tuple((mode.from_tensor(place), count) for place, count in found.places)
            return packed.RowGroups(places, mode.from_tensor(found.place_in_groups_L))

        weights = [parameter.untyped_storage() for parameter in policy.parameters()]  # held, so that they stay counted
        with patch.object(packed, "row_groups", grouped), live:
            for parameter in policy.parameters():
                live.add(parameter)
            for step in range(2):
                for _ in range(2):
                    policy.eval()
                    target = score_tokens(policy, policy, batch.teacher, keeps_head=False, copies=False)
                    policy.train()
                    live.peak = live.now if step else 0
                    loss, *_ = policy(batch.student, partial(objective, batch=batch, target=target))
                    loss.backward()
                    del loss, target
                found = live.peak
                optimizer.step()
                optimizer.zero_grad()
    assert live.now >= sum(storage.nbytes() for storage in weights)
    return found
