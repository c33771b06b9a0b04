"""The text the tiny model is pretrained on: stories, puzzles and drills as chats of one user and one assistant turn.

The model reads nothing else, and no word of NEW_WORDINGS occurs in it. Under the teacher's prompt, part of the
stories use invented words, each time another word with another meaning, so that the model learns to look an unknown
word up in the reference solution; and part of the completions go on after slips (see `solution_with_slips`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

from opsd_cli.data.arithmetic import (
    ADDED_AMOUNT,
    AMOUNT_VERB,
    CHANGE_VERB,
    KNOWN_WORDINGS,
    OPERANDS,
    REMOVED_AMOUNT,
    SHARE_NOUN,
    Equation,
    Exercise,
    Operator,
    Wording,
    draw_puzzle,
    draw_story,
    new_wording,
    reference_solution,
    split_of,
)

# What recipes/context/solution.yaml renders to without an instruction; a test keeps the two equal.
TEACHER_PROMPT = (
    "{question}\n\nReference solution:\n{solution}\n\n"
    "Understand the reference solution, then solve the problem yourself, in your own words."
)

OPERATORS: tuple[Operator, ...] = ("+", "-", "*", "/")
DRILL_OPERANDS = OPERANDS | {"+": range(2, 99), "-": range(2, 99)}

FIRST_LINES = ("First {equation}.", "{equation}.", "We get {equation}.", "That makes {equation}.")
NEXT_LINES = ("Then {equation}.", "{equation}.", "So {equation}.", "Now {equation}.")

ONSETS = ("b", "bl", "c", "d", "dr", "f", "fl", "g", "gr", "h", "j", "k", "l", "m", "n", "p", "pl", "qu", "r", "s",
          "sk", "sn", "st", "t", "tr", "v", "w", "z")  # fmt: skip
VOWELS = ("a", "e", "i", "o", "u", "ai", "ea", "ee", "oo", "ou")
CODAS = ("b", "ck", "d", "ft", "g", "l", "lt", "m", "n", "nd", "nt", "p", "r", "rd", "rt", "ss", "st", "t", "ve", "x",
         "ze")  # fmt: skip


KNOWABLE, ARBITRARY, NOT_LEARNT = 1.0, 0.1, 0.0  # loss weights


@dataclass(frozen=True)
class Chat:
    """One pretraining document. The completion comes in pieces (text, loss weight), cut only between tokens."""

    prompt: str
    pieces: tuple[tuple[str, float], ...]

    @property
    def completion(self) -> str:
        return "".join(text for text, _ in self.pieces)


@dataclass(frozen=True)
class Mixture:
    """Shares of the kinds of chat; what is left is drills."""

    student_story: float
    teacher_story: float
    student_puzzle: float
    teacher_puzzle: float
    invented: float  # share of wordings under the teacher's prompt that use an invented word
    slips: float  # share of stories under the teacher's prompt whose completion contains slips


def draw_chats(random: Random, mixture: Mixture) -> Iterator[Chat]:
    """An endless stream of chats over training keys only."""
    kinds = {
        _student_story: mixture.student_story,
        _teacher_story: mixture.teacher_story,
        _student_puzzle: mixture.student_puzzle,
        _teacher_puzzle: mixture.teacher_puzzle,
    }
    kinds[_drill] = 1.0 - sum(kinds.values())
    while True:
        (kind,) = random.choices(list(kinds), list(kinds.values()))
        yield kind(random, mixture)


def own_solution(random: Random, exercise: Exercise) -> str:
    """The worked solution as the tiny model writes: short lines without `<<...>>`, worded independently of the
    reference."""
    lines = [exercise.remark] if exercise.remark else []
    for equation in exercise.equations:
        line = random.choice(NEXT_LINES if lines else FIRST_LINES)
        lines.append(line.format(equation=equation))
    return "\n".join([*lines, f"#### {exercise.answer}"])


def solution_with_slips(random: Random, exercise: Exercise) -> tuple[tuple[str, float], ...]:
    """Pieces of a solution in which some operations are not the exercise's, and what comes after follows from them.

    A slip itself carries no loss, so it is not learnt; what is learnt is to go on consistently after one, instead of
    copying results that no longer fit from a reference. Falls back on the right solution when numbers do not work out.
    """
    slips = [random.random() < 0.5 for _ in exercise.equations]
    slips[random.randrange(len(slips))] = True
    value = exercise.equations[0].left
    pieces: list[tuple[str, float]] = []
    for told, slip in zip(exercise.equations, slips, strict=True):
        operator: Operator = random.choice(OPERATORS) if slip else told.operator
        operand = random.choice((told.right, random.choice(OPERANDS[operator]))) if slip else told.right
        equation = Equation(value, operator, operand)
        if not equation.possible:
            return ((own_solution(random, exercise), KNOWABLE),)
        opening = random.choice(NEXT_LINES if pieces else FIRST_LINES).partition("{")[0]
        pieces.append((f"{opening}{value}", KNOWABLE))
        pieces.append((f"{operator}{operand}=", NOT_LEARNT if slip else KNOWABLE))
        pieces.append((f"{equation.result}.\n", KNOWABLE))
        value = equation.result
    return (*pieces, (f"#### {value}", KNOWABLE))


def _student_story(random: Random, mixture: Mixture) -> Chat:
    return _right(random, _training_story(random, invented=0.0))


def _teacher_story(random: Random, mixture: Mixture) -> Chat:
    exercise = _training_story(random, invented=mixture.invented)
    chat = _right(random, exercise, teacher=True)
    if random.random() < mixture.slips:
        return Chat(chat.prompt, solution_with_slips(random, exercise))
    return chat


def _student_puzzle(random: Random, mixture: Mixture) -> Chat:
    return _right(random, _training_puzzle(random))


def _teacher_puzzle(random: Random, mixture: Mixture) -> Chat:
    return _right(random, _training_puzzle(random), teacher=True)


def _right(random: Random, exercise: Exercise, *, teacher: bool = False) -> Chat:
    prompt = exercise.question
    if teacher:
        prompt = TEACHER_PROMPT.format(question=prompt, solution=reference_solution(random, exercise))
    return Chat(prompt, ((own_solution(random, exercise), KNOWABLE),))


def _drill(random: Random, mixture: Mixture) -> Chat:
    pieces: list[tuple[str, float]] = []
    while len(pieces) < 2 * 6:
        operator = random.choice(OPERATORS)
        equation = Equation(random.randint(1, 99), operator, random.choice(DRILL_OPERANDS[operator]))
        if equation.possible:
            pieces.append((f"{equation.left}{operator}{equation.right}=", ARBITRARY))
            pieces.append((f"{equation.result}.\n", KNOWABLE))
    return Chat("Calculate.", tuple(pieces))


def _training_story(random: Random, *, invented: float) -> Exercise:
    while True:
        wordings = [
            _invented_wording(random) if random.random() < invented else random.choice(KNOWN_WORDINGS)
            for _ in range(random.randint(1, 3))
        ]
        exercise = draw_story(random, wordings)
        if exercise is not None and split_of(exercise.key) == "train":
            return exercise


def _training_puzzle(random: Random) -> Exercise:
    while True:
        exercise = draw_puzzle(random)
        if split_of(exercise.key) == "train":
            return exercise


def _invented_wording(random: Random) -> Wording:
    """A frame with a word nobody knows, and one of the meanings that the frame allows."""
    frame = random.choice((AMOUNT_VERB, ADDED_AMOUNT, REMOVED_AMOUNT, CHANGE_VERB, SHARE_NOUN))
    word = invented_word(random)
    if frame == AMOUNT_VERB:
        return new_wording(frame, word + "s", random.choice(OPERATORS))
    operator: Operator
    if frame == CHANGE_VERB:
        operator = random.choice(OPERATORS)
    else:
        operator = {ADDED_AMOUNT: "+", REMOVED_AMOUNT: "-", SHARE_NOUN: "/"}[frame]
    return new_wording(frame, word, operator, operand=random.choice(OPERANDS[operator]))


def invented_word(random: Random) -> str:
    """One or two syllables of English sounds."""
    syllables = random.choice((1, 2))
    return "".join(random.choice(ONSETS) + random.choice(VOWELS) + random.choice(CODAS) for _ in range(syllables))
