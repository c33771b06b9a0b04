"""Dataset files: JSONL, CSV and bytes that call themselves so, loaded as `dataset=jsonl` loads them."""

from __future__ import annotations

import json
from pathlib import Path

from hypothesis import strategies as st

from fuzzing.world import in_lines
from opsd_cli.data.datasets import Jsonl

NAMES = ("question", "solution", "answer", "id", "Question", "", "a b", "\x1b[31m")
cells = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8),
        st.sampled_from(("#### 3", "\\boxed{1}", "1e999", "\x1b[0m", "</script>", "{{solution}}")),
        st.sampled_from(("\0", "\ud800", "\u2028", " ")),
    ),
    lambda below: st.lists(below, max_size=2) | st.dictionaries(st.sampled_from(NAMES), below, max_size=2),
    max_leaves=4,
)  # fmt: skip
objects = st.dictionaries(st.sampled_from(NAMES), cells, max_size=5)
good = st.fixed_dictionaries(
    {
        "question": st.text(max_size=5),
        "solution": st.just("so #### 3"),
        "answer": st.integers(),
        "id": st.integers(0, 3),
    }
)
lines = st.one_of(
    good.map(lambda o: json.dumps(o).encode()),
    good.map(lambda o: json.dumps(o, ensure_ascii=False).encode("utf-8", "surrogatepass")),
    objects.map(lambda o: json.dumps(o).encode()),
    objects.map(lambda o: json.dumps(o, ensure_ascii=False).encode("utf-8", "surrogatepass")),
    cells.map(lambda o: json.dumps(o).encode()),
    st.tuples(st.sampled_from((b"[", b'{"question":', b'{"a":[')), st.integers(1, 200_000)).map(lambda p: p[0] * p[1]),
    st.integers(1, 200_000).map(lambda n: b'{"question": ' + b"9" * n + b', "solution": "x", "answer": 1}'),
    st.integers(1, 2_000_000).map(lambda n: b'{"question": "' + b"x" * n + b'", "solution": "#### 1", "answer": 1}'),
    st.binary(max_size=20),
    st.sampled_from(
        (
            b"",
            b" ",
            b"\x00",
            b"\xff\xfe",
            b"\xef\xbb\xbf",
            b"NaN",
            b'{"question": NaN}',
            b'{"a":1,"a":2}',
            b"question,solution,answer",
            b'"a\n',
            b'q,"',
        )
    ),
)
ends = st.sampled_from((b"\n", b"\r\n", b"\r", b"\n\n", b"\x0b", b"\xe2\x80\xa8"))
contents = st.one_of(
    st.tuples(
        st.sampled_from((b"", b"", b"\xef\xbb\xbf", b"\xff\xfe", b"question,solution,answer,id\n")),
        ends,
        st.lists(lines, max_size=5),
    ).map(lambda p: p[0] + p[1].join(p[2])),
    st.lists(st.lists(st.text(max_size=6), max_size=5).map(",".join), max_size=4).map(
        lambda rows: ("question,solution,answer\n" + "\n".join(rows)).encode("utf-8", "surrogatepass")
    ),
    st.binary(max_size=200),
)
fields = st.sampled_from(NAMES)
cases = st.tuples(
    st.sampled_from((".jsonl", ".jsonl", ".csv", ".parquet", ".JSONL", ".txt", "")),
    contents,
    st.fixed_dictionaries(
        {
            "question_field": st.just("question") | fields,
            "solution_field": st.just("solution") | fields,
            "answer_field": st.none() | st.just("answer") | fields,
            "id_field": st.none() | st.just("id") | fields,
            "max_bad_share": st.sampled_from((0.0, 0.3)),
            "train_problems": st.none() | st.integers(1, 3),
            "validation_problems": st.none() | st.integers(0, 3),
            "test_problems": st.none() | st.integers(0, 3),
        }
    ),
    st.booleans(),
)


def check_rows(case: tuple[str, bytes, dict[str, object], bool]) -> None:
    """A file is problems whose texts can be written again, with ids of their own, or one line about a row."""
    ending, content, settings, as_folder = case
    file = Path("data") / f"train{ending}"
    for old in Path("data").glob("*"):
        old.unlink()
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(content)
    dataset = Jsonl(path=str(file.parent if as_folder else file), instruction="", **settings)  # type: ignore[arg-type]
    splits = in_lines(lambda: dataset.load())
    problems = [*splits.train, *splits.validation, *splits.test]
    assert len({problem.id for problem in problems}) == len(problems)
    for problem in problems:
        f"{problem.question}{problem.solution}{problem.answer}".encode()
