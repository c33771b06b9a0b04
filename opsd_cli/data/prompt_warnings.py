"""What is odd about a tokenizer, its chat template and its settings for generation, said before the first step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from opsd_cli.data.chat import CLOCK, opens_thinking

SUPPRESSING = ("suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "forced_bos_token_id")


def prompt_notes(template: str, ending: str, *, date: str | None) -> list[str]:
    """What the template does that the user should know of, a line each."""
    notes = []
    if CLOCK in template:
        notes.append(f"chat template: it asks for the date and is told {date} (prompts.date)")
    if opens_thinking(ending):
        notes.append("chat template: it opens a block of thinking; a reference solution closes it before it begins")
    return notes


def prompt_warnings(
    tokenizer: Any, prompt_ids: Sequence[int], *, vocabulary: int | None, generation: Any | None
) -> dict[str, str]:
    """Name -> what may be wrong with prompts and completions. `prompt_ids` is one prompt; `vocabulary` how many ids the
    model has (None: not known); `generation` its settings for generation, if it has any."""
    warnings = {}
    bos = tokenizer.bos_token_id
    if bos is not None and bos not in prompt_ids[:1] and tokenizer("a").input_ids[:1] == [bos]:
        warnings["no_bos"] = (
            f"prompts begin without the beginning-of-sequence token {tokenizer.bos_token!r} that the tokenizer puts "
            "before a text; if the model was trained with it, use a chat template that writes it: "
            "model.chat_template=FILE"
        )
    suppressed = [] if generation is None else [name for name in SUPPRESSING if vars(generation).get(name)]
    if suppressed:
        warnings["suppressed"] = (
            f"the model's generation settings have {', '.join(suppressed)}, which is not applied: completions may hold "
            "tokens that the model does not give elsewhere"
        )
    if vocabulary is not None and (missing := vocabulary - len(tokenizer)) > 0:
        warnings["no_token"] = (
            f"the model has {missing} more ids than its tokenizer has tokens; one that is drawn all the same stands "
            "for no text, and is graded as if it were not there"
        )
    return warnings
