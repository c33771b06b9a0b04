"""Two generated datasets in GSM8K's format: `arithmetic`, word problems, and `puzzles`, a second skill.

The bundled tiny model was pretrained on stories told with KNOWN_WORDINGS. The words of NEW_WORDINGS (doubles, a dozen,
squanders, ...) never occurred in its pretraining text: what they mean can only be learnt from reference solutions.
That is the honest gap which `recipe=quickstart` closes. `puzzles` is a skill that the model has and that no
quickstart training shows, so that forgetting can be measured.

`scripts/make_tiny_model.py` made the tiny model from these problems.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from operator import add, floordiv, mul, sub
from random import Random
from typing import Annotated, Literal

from pydantic import Field

from opsd_cli.data.problems import Problem, Splits
from opsd_cli.data.rows import fingerprint
from opsd_cli.settings.errors import DataError
from opsd_cli.settings.registry import plugin

Operator = Literal["+", "-", "*", "/"]
Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")
Draw = Callable[[Random], "Exercise | None"]

LARGEST_VALUE = 99
OPERATIONS: dict[Operator, Callable[[int, int], int]] = {"+": add, "-": sub, "*": mul, "/": floordiv}
OPERANDS: dict[Operator, range] = {"+": range(2, 21), "-": range(2, 21), "*": range(2, 6), "/": range(2, 6)}

PEOPLE = ("Mia", "Tom", "Ana", "Ben", "Zoe", "Max", "Eva", "Sam", "Lea", "Joe", "Ida", "Leo")
THINGS = ("apples", "coins", "books", "cards", "shells", "stamps", "eggs", "pens", "nuts", "keys")


@dataclass(frozen=True)
class Wording:
    """A sentence that tells one operation. Slots: {who} and {things}; {n} is the operand unless the words fix it."""

    operator: Operator
    sentence: str
    operand: int | None = None  # fixed by the words ("doubles": 2), or None: the sentence names it as {n}


KNOWN_WORDINGS = (
    Wording("+", "{who} buys {n} more."),
    Wording("+", "{who} finds {n} {things}."),
    Wording("+", "Then {who} gets {n} more."),
    Wording("-", "{who} loses {n} of them."),
    Wording("-", "{who} sells {n} {things}."),
    Wording("-", "Then {who} gives away {n}."),
    Wording("*", "Now {who} has {n} times as many."),
    Wording("*", "The number of {things} grows {n} times."),
    Wording("/", "{who} keeps one of {n} equal parts."),
    Wording("/", "The {things} go into {n} equal bags and {who} takes one."),
)

# A frame is a sentence with a slot {word} for a word that the tiny model does not know.
AMOUNT_VERB = "Then {who} {word} {n} {things}."
ADDED_AMOUNT = "{who} buys a {word} more."
REMOVED_AMOUNT = "{who} loses a {word} of them."
CHANGE_VERB = "Then the {things} {word}."
ACTION_VERB = "Then {who} {word} the {things}."
SHARE_NOUN = "{who} keeps a {word} of them."


def new_wording(frame: str, word: str, operator: Operator, *, operand: int | None = None) -> Wording:
    """`frame` with `word` in its slot, and what it means."""
    return Wording(operator, frame.replace("{word}", word), operand)


NEW_WORDINGS = (
    new_wording(AMOUNT_VERB, "acquires", "+"),
    new_wording(AMOUNT_VERB, "harvests", "+"),
    new_wording(AMOUNT_VERB, "squanders", "-"),
    new_wording(AMOUNT_VERB, "forfeits", "-"),
    new_wording(ADDED_AMOUNT, "dozen", "+", operand=12),
    new_wording(REMOVED_AMOUNT, "dozen", "-", operand=12),
    new_wording(CHANGE_VERB, "double", "*", operand=2),
    new_wording(ACTION_VERB, "triples", "*", operand=3),
    new_wording(ACTION_VERB, "halves", "/", operand=2),
    new_wording(SHARE_NOUN, "third", "/", operand=3),
    new_wording(SHARE_NOUN, "quarter", "/", operand=4),
)


@dataclass(frozen=True)
class Equation:
    """`left operator right = result`, all positive whole numbers."""

    left: int
    operator: Operator
    right: int

    @property
    def result(self) -> int:
        return OPERATIONS[self.operator](self.left, self.right)

    @property
    def possible(self) -> bool:
        """The result is a whole number from 1 to LARGEST_VALUE."""
        whole = self.operator != "/" or self.left % self.right == 0
        return whole and 1 <= self.result <= LARGEST_VALUE

    def __str__(self) -> str:
        return f"{self.left}{self.operator}{self.right}={self.result}"


@dataclass(frozen=True)
class Exercise:
    """A question before it is a `Problem`: `equations` are its working, `remark` what is worked out without one."""

    key: str  # names structure and numbers, not wording: the splits are disjoint in it
    question: str
    equations: tuple[Equation, ...]
    remark: str
    answer: int
    unit: str  # what is counted, as the last word of a reference line; "": bare numbers


def split_of(key: str) -> Split:
    """The split that owns an exercise: 1 in 10 keys is test, 1 in 10 validation, whatever the seed and the wording."""
    number = zlib.crc32(key.encode()) % 10
    return "test" if number == 0 else "validation" if number == 1 else "train"


def draw_story(random: Random, wordings: Sequence[Wording]) -> Exercise | None:
    """A word problem that tells `wordings` in order, with random numbers, person, things; None if no numbers suit."""
    for _ in range(50):  # numbers, redrawn until every intermediate result is possible
        value, equations = random.randint(3, 40), list[Equation]()
        for wording in wordings:
            operand = wording.operand or random.choice(OPERANDS[wording.operator])
            equations.append(Equation(value, wording.operator, operand))
            value = equations[-1].result
        if all(equation.possible for equation in equations):
            break
    else:
        return None
    who, things = random.choice(PEOPLE), random.choice(THINGS)
    sentences = [
        wording.sentence.format(who=who, things=things, n=equation.right)
        for wording, equation in zip(wordings, equations, strict=True)
    ]
    opening = f"{who} has {equations[0].left} {things}."
    question = " ".join([opening, *sentences, f"How many {things} does {who} have now?"])
    key = "story " + " ".join([str(equations[0].left), *(f"{e.operator}{e.right}" for e in equations)])
    return Exercise(key, question, tuple(equations), "", value, things)


def draw_puzzle(random: Random) -> Exercise:
    """A number puzzle without a story: the next number of a series, the largest number, or the range of a list."""
    return random.choice((_series, _largest, _range))(random)


def _series(random: Random) -> Exercise:
    first, step = random.randint(1, 40), random.randint(2, 12)
    shown = [first + step * i for i in range(4)]
    question = f"Which number comes next: {_listed(shown)}?"
    equations = (Equation(shown[1], "-", shown[0]), Equation(shown[3], "+", step))
    return Exercise(f"series {first} {step}", question, equations, "", shown[3] + step, "")


def _largest(random: Random) -> Exercise:
    numbers = random.sample(range(1, LARGEST_VALUE + 1), 4)
    question = f"Which number is the largest: {_listed(numbers)}?"
    answer = max(numbers)
    return Exercise(f"largest {_listed(numbers)}", question, (), f"The largest is {answer}.", answer, "")


def _range(random: Random) -> Exercise:
    numbers = random.sample(range(1, LARGEST_VALUE + 1), 3)
    low, high = min(numbers), max(numbers)
    question = f"How far apart are the largest and the smallest: {_listed(numbers)}?"
    remark = f"The largest is {high} and the smallest is {low}."
    return Exercise(f"range {_listed(numbers)}", question, (Equation(high, "-", low),), remark, high - low, "")


def _listed(numbers: Iterable[int]) -> str:
    return ", ".join(str(number) for number in numbers)


COUNTED_LINES = (
    "This gives <<{equation}>>{result} {unit}.",
    "There are now <<{equation}>>{result} {unit}.",
    "The new count is <<{equation}>>{result} {unit}.",
)
BARE_LINES = ("This gives <<{equation}>>{result}.", "The result is <<{equation}>>{result}.")


def reference_solution(random: Random, exercise: Exercise) -> str:
    """The worked solution in a textbook's style: `<<left op right=result>>` per equation, last line `#### answer`."""
    lines = [exercise.remark] if exercise.remark else []
    for equation in exercise.equations:
        line = random.choice(COUNTED_LINES if exercise.unit else BARE_LINES)
        lines.append(line.format(equation=equation, result=equation.result, unit=exercise.unit))
    return "\n".join([*lines, f"#### {exercise.answer}"])


def _draw_split(random: Random, split: Split, count: int, *, draw: Draw) -> tuple[Problem, ...]:
    """`count` problems of one split, no key twice. Raises DataError when there are not that many."""
    problems: list[Problem] = []
    keys: set[str] = set()
    misses = 0
    while len(problems) < count:
        exercise = draw(random)
        if exercise is None or split_of(exercise.key) != split or exercise.key in keys:
            misses += 1
            if misses > 1000 + 200 * count:
                raise DataError(
                    f"the generator found only {len(problems)} different {split} problems, {count} were requested; "
                    f"lower dataset.{split}_problems"
                )
            continue
        keys.add(exercise.key)
        solution = reference_solution(random, exercise)
        name = f"{split}-{len(problems):05d}"
        problems.append(Problem(name, exercise.question, solution, str(exercise.answer)))
    return tuple(problems)


def _draw_splits(source: str, dataset: Arithmetic | Puzzles, *, draw: Draw) -> Splits:
    """The three splits, each from its own stream of random numbers: changing one count leaves the others alone."""
    drawn: dict[Split, tuple[Problem, ...]] = {}
    for split in SPLITS:
        random = Random(f"{source} {dataset.data_seed} {split}")
        drawn[split] = _draw_split(random, split, asdict(dataset)[f"{split}_problems"], draw=draw)
    origin = f"{source}, generated with data_seed={dataset.data_seed}"
    train, validation, test = (drawn[split] for split in SPLITS)
    return Splits(train, validation, test, source=origin, fingerprint=fingerprint(train, validation, test))


Count = Annotated[int, Field(ge=0)]


@plugin("dataset", "arithmetic")
class Arithmetic:
    """Generated word problems about one person's things, of `steps_min` to `steps_max` operations. Train, validation
    and test share no combination of start, operations and operands. The problems are a function of the fields alone:
    `run.seed` does not change them, so that seeds of a run are compared on the same data."""

    instruction: str
    data_seed: Annotated[int, Field(ge=0)]
    train_problems: Count
    validation_problems: Count
    test_problems: Count
    steps_min: Annotated[int, Field(ge=1, le=4)]
    steps_max: Annotated[int, Field(ge=1, le=4)]
    known_share: Annotated[float, Field(ge=0, le=1)]
    retention_problems: Count  # number puzzles

    def load(self) -> Splits:
        """Generate the splits. Raises DataError for an impossible range or count."""
        if self.steps_min > self.steps_max:
            raise DataError(f"dataset.steps_min is {self.steps_min}, above dataset.steps_max ({self.steps_max})")
        splits = _draw_splits("arithmetic word problems", self, draw=self._draw)
        random = Random(f"number puzzles {self.data_seed} test")
        return replace(splits, retention=_draw_split(random, "test", self.retention_problems, draw=draw_puzzle))

    def _draw(self, random: Random) -> Exercise | None:
        """A story in known wordings, or with at least one unknown wording, the others unknown half the time."""
        steps, new = random.randint(self.steps_min, self.steps_max), random.random() >= self.known_share
        forced = random.randrange(steps)
        return draw_story(
            random,
            [
                random.choice(NEW_WORDINGS if new and (i == forced or random.random() < 0.5) else KNOWN_WORDINGS)
                for i in range(steps)
            ],
        )


@plugin("dataset", "puzzles")
class Puzzles:
    """Generated number puzzles: the second skill of the tiny model, for measuring what training made it forget."""

    instruction: str
    data_seed: Annotated[int, Field(ge=0)]
    train_problems: Count
    validation_problems: Count
    test_problems: Count

    def load(self) -> Splits:
        """Generate the splits. Raises DataError for an impossible count."""
        return _draw_splits("number puzzles", self, draw=draw_puzzle)
