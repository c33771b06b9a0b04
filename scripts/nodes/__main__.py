"""Carries out the rows of scripts/nodes.sh and prints their table: `python -m nodes`, as root."""

from __future__ import annotations

import argparse
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import product

from nodes.faults import FAKETIME, FAULTS, LISTENS, Fault
from nodes.network import Network, network
from nodes.runs import WORDS, Command, largest_difference, over, run_locally, start, typed_again, wait_until
from opsd_cli.run.folder import RunFolder

NAMES = ("nodea", "nodeb", "head")  # ranks on the first two
TOLERANCE = 1e-5  # of weights around 0.1 that sums over ranks in another order have moved
GIVE_UP = 60.0  # seconds past what was promised


@dataclass
class Result:
    name: str
    wrong: list[str] = field(default_factory=list)
    code: int | None = None
    seconds: float = 0.0
    orphans: float = 0.0  # seconds after the command until nothing ran on any node
    said: str = ""
    after: str = ""

    def line(self) -> str:
        verdict = "FAILS" if self.wrong else "ok"
        code = "-" if self.code is None else str(self.code)
        figures = f"{self.seconds:6.1f} s {self.orphans:6.1f} s"
        lines = [f"{verdict:6}{self.name:42}{code:>4} {figures}  {self.after}"]
        return "\n".join(
            [*lines, *(f"      {wrong}" for wrong in self.wrong), *([f"      {self.said}"] if self.said else [])]
        )


def name_of(runner: str, slots: int, stage: int) -> str:
    return f"{runner}, {2 * slots} ranks, ZeRO {stage}"


def rows(runners: list[str], only: list[str]) -> list[tuple[str, Callable[[Network], Result]]]:
    """Names and what carries them out, in the order of the parts of names that were asked for."""
    runs = [(name_of(*run), "runs", partial(compare, run=run)) for run in product(runners, (1, 2), (1, 2, 3))]
    faults = [
        (fault.name, "faults", partial(meet, fault=fault, name=f"fault-{number}"))
        for number, fault in enumerate(FAULTS)
        if fault.runner in runners and (FAKETIME not in fault.far_environ.values() or shutil.which("faketime"))
    ]
    wanted = [
        (next(i for i, part in enumerate(only) if part == family or part in name), name, carry_out)
        for name, family, carry_out in [*runs, *faults]
        if any(part == family or part in name for part in only)
    ]
    return [(name, carry_out) for _, name, carry_out in sorted(wanted, key=lambda row: row[0])]


def compare(made: Network, *, run: tuple[str, int, int]) -> Result:
    """A run on two nodes against one on this machine with as many ranks."""
    runner, slots, stage = run
    ranks, zero = 2 * slots, f"zero=stage{stage}"
    result = Result(name_of(runner, slots, stage))
    local = RunFolder(made.folder / "shared" / f"local-{ranks}-{stage}")
    if not local.summary.exists():
        local = run_locally(made, local.name, [zero], ranks=ranks)
    begun = time.monotonic()
    command = start(made, f"{runner}-{ranks}-{stage}", [*WORDS, *over(made, runner, slots), zero], node=made.nodes[0])
    result.code, result.seconds = command.wait(600), time.monotonic() - begun
    if result.code != 0:
        result.wrong, result.said = [f"ended in {result.code}"], command.last_line()
    else:
        difference = largest_difference(local, command.folder)
        result.after = "equal to the bit" if difference == 0 else f"weights differ by {difference:.1e} at most"
        result.wrong = ["weights differ"] if difference > TOLERANCE else []
    result.wrong += leftovers(made, result, 2.0)
    return result


def meet(made: Network, *, fault: Fault, name: str) -> Result:
    """Carry out one row: the run, what happens to it, its end, what is left of it, and its continuation."""
    result = Result(fault.name)
    if fault.prepare:
        fault.prepare(made)
    for number, node in enumerate(made.nodes):
        node.start_sshd({**fault.environ, **(fault.far_environ if number == 1 else {})})
    launch = over(made, fault.runner, 1, hosts=fault.hosts)
    begun = time.monotonic()
    command = start(made, name, [*WORDS, *launch, *fault.words], node=made.nodes[fault.typed_on])
    if fault.when and fault.harm:
        if not wait_until(lambda: bool(fault.when and fault.when(command)), command):
            result.wrong.append("the moment for it never came")
        time.sleep(0.5)
        begun = time.monotonic()
        if not result.wrong:
            fault.harm(made, command)
    result.code, result.seconds = command.wait(fault.seconds + GIVE_UP), time.monotonic() - begun
    result.said = command.last_line()
    result.wrong += judged(fault, result, command)
    result.wrong += leftovers(made, result, fault.longest_orphan, but=fault.stays_until_mended)
    if fault.mend:
        fault.mend(made)
        result.wrong += leftovers(made, Result(fault.name), 10.0)
    for node in made.nodes:
        node.start_sshd()
    if fault.goes_on and fault.code != 0:
        result.wrong += resumed(made, fault, command.folder, result)
    elif fault.code == 0:
        result.wrong += same_end(made, command.folder, result)
    elif command.folder.path.exists():
        result.wrong.append("left a run folder")
    shutil.rmtree(command.folder.path, ignore_errors=True)
    return result


def judged(fault: Fault, result: Result, command: Command) -> list[str]:
    """What is not as promised about the end of the command."""
    wrong = []
    if result.code is None:
        wrong.append(f"was killed after {result.seconds:.0f} s")
    elif result.code not in (fault.code, 128 - fault.code if fault.code > 128 else fault.code):
        wrong.append(f"exit code {result.code}, not {fault.code}")
    if result.seconds > fault.seconds:
        wrong.append(f"took {result.seconds:.1f} s, promised {fault.seconds:.0f}")
    if not re.search(fault.message, result.said):
        wrong.append(f"the last line does not match {fault.message!r}")
        wrong += [f"  | {line[:200]}" for line in command.lines()[-4:]]
    return wrong


def leftovers(made: Network, result: Result, seconds: float, *, but: str = "none") -> list[str]:
    """Wait for the last process on any node; those that outlived the promise, which are ended. The port that a row
    occupies is its own."""
    begun, wrong, last = time.monotonic(), list[str](), list[tuple[str, str]]()
    while left := [
        (node.name, words)
        for node in made.nodes
        for words in node.leftovers()
        if LISTENS not in words and not words.startswith(but)
    ]:
        if time.monotonic() - begun > seconds + GIVE_UP:
            wrong = [f"orphan on {name}: {words[:120]}" for name, words in left]
            break
        last = left
        time.sleep(0.1)
    result.orphans = time.monotonic() - begun
    if result.orphans > seconds and not wrong:
        name, words = last[-1]
        wrong = [
            f"the last process ended {result.orphans:.1f} s after the command, promised {seconds:.0f}: on {name} "
            f"{words[:160]}"
        ]
    for node in made.nodes:
        if wrong:
            node.clear()
    return wrong


def resumed(made: Network, fault: Fault, folder: RunFolder, result: Result) -> list[str]:
    """Continue the run to its end and compare it with one that nothing happened to."""
    if not folder.config.exists():
        return ["left nothing to resume"]
    words = [*typed_again(fault.runner), *(["launcher.stall_seconds=1200"] if fault.words else [])]
    command = start(made, folder.name, ["--resume", *words], node=made.nodes[0])
    if (code := command.wait(400)) != 0:
        return [f"the resumed run ended in {code}: {command.last_line()}", *leftovers(made, Result(fault.name), 2.0)]
    return same_end(made, folder, result)


def same_end(made: Network, folder: RunFolder, result: Result) -> list[str]:
    local = RunFolder(made.folder / "shared" / "local-2-2")
    if not local.summary.exists():
        local = run_locally(made, local.name, [], ranks=2)
    if not folder.model.exists():
        return ["has no model"]
    difference = largest_difference(local, folder)
    result.after = "ends equal to the bit" if difference == 0 else f"ends {difference:.1e} away"
    return ["its end differs"] if difference else []


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/nodes.sh", description=__doc__)
    parser.add_argument("--only", nargs="+", default=[""], help="runs, faults, or parts of rows' names, in that order")
    parser.add_argument("--list", action="store_true", help="name the rows")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    runners = ["pdsh", *(["openmpi"] if shutil.which("mpirun") else [])]
    wanted = rows(runners, arguments.only)
    if arguments.list:
        print("\n".join(name for name, _ in wanted))
        return 0
    results, begun = [], time.monotonic()
    with network(NAMES) as made:
        print(f"{'':6}{'':42}code    end after orphans")
        for _, carry_out in wanted:
            results.append(carry_out(made))
            print(results[-1].line(), flush=True)
    failed = sum(bool(result.wrong) for result in results)
    print(f"{len(results)} rows in {time.monotonic() - begun:.0f} s; {failed} not as promised")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
