"""opsd with the loss that most code has: logits of all tokens at once, and autograd. For `memory.py` only.

Run as `python naive_worker.py train ...` it is the command line, which then starts this file as its ranks; there the
arguments are a run folder and a task.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path


def naive_distill(student_ND, inputs):  # type: ignore[no-untyped-def]
    """Forward KL over [N, V], written out."""
    import torch

    from opsd_cli.loss.types import TokenLoss

    teacher, temperature = inputs.teacher, inputs.temperature
    student_NV = (inputs.head.logits(student_ND) / temperature).log_softmax(dim=1)
    with torch.no_grad():
        head = replace(teacher.head or inputs.head)
        teacher_NV = (head.logits(teacher.hidden_ND) / temperature).log_softmax(dim=1)
    value_N = torch.nn.functional.kl_div(student_NV, teacher_NV, reduction="none", log_target=True).sum(dim=1)
    sampled_N = student_NV.detach().gather(1, inputs.target_ids_N.unsqueeze(1)).squeeze(1)
    return TokenLoss((value_N * inputs.weights_N).sum(), value_N.detach(), {"logprob/student": sampled_N})


def main() -> int:
    if sys.argv[1] == "train":
        import opsd_cli.launch.launchers
        from opsd_cli.cli import main as command_line

        opsd_cli.launch.launchers.WORKER = ("-P", str(Path(__file__).resolve()))
        return command_line(sys.argv[1:])
    import opsd_cli.loss.chunked_head
    from opsd_cli.rank.entry import main as rank

    opsd_cli.loss.chunked_head.distill = naive_distill
    return rank(sys.argv[1:])


if __name__ == "__main__":
    raise SystemExit(main())
