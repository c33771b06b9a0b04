"""What the looks ahead say on a terminal: findings a line each, a probe and its verdict, arms beside each other."""

from __future__ import annotations

import sys
from collections.abc import Iterator

from rich.text import Text

from opsd_cli.insight.arms import Comparison
from opsd_cli.insight.estimates import Estimate, points
from opsd_cli.insight.findings import Finding, Findings
from opsd_cli.insight.prospects import STUDENT, Probe, Verdict
from opsd_cli.ui.columns import aligned, terminal_width
from opsd_cli.ui.theme import console_for, percent, plural, print_line

STYLES = {"ok": "good", "warning": "warn", "error": "bad"}


def print_findings(findings: Findings, *, everything: bool) -> None:
    """Print every finding, or only what is not well and how much is; and what it comes to."""
    console = console_for(sys.stdout)
    width = max((len(one.area) for one in findings.found), default=0)
    for one in findings.found:
        if everything or one.level != "ok":
            print_line(console, _line(one, width), fold=True)
    well = findings.count("ok")
    counts = [plural(findings.count(level), level) for level in ("error", "warning")]
    print_line(console, Text(f"{plural(well, 'thing')} well, {', '.join(counts)}", "label"))


def _line(one: Finding, width: int) -> Text:
    message = one.message + (f"; {one.change}" if one.change else "")
    return Text.assemble((f"{one.level:<8}", STYLES[one.level]), f"{one.area:<{width}}  ", message)


HEADLINES = {
    "likely": "Training is likely to help",
    "uncertain": "Training may help, with cautions",
    "unlikely": "Training is unlikely to help",
}


def probe_lines(probe: Probe, verdict: Verdict) -> list[str]:
    """The table of prompts, what the rollouts say, and the verdict."""
    rows = []
    for name, arm in probe.arms.items():
        gain = None if name == STUDENT else probe.gain(name)
        rows.append(
            {
                "prompt": name,
                "accuracy": f"{percent(arm.accuracy)} [{100 * arm.low:.1f}, {100 * arm.high:.1f}]",
                "over the student": "" if gain is None else points(gain),
                "p": "" if gain is None else f"{gain.p_value:.2g}",
                "cut": percent(arm.truncated),
                "tokens": f"{arm.tokens:.0f}",
            }
        )
    return [
        f"{probe.problems} held-out problems, greedy, 95 % intervals\n",
        *aligned(rows, least=("tokens", "cut", "p"), width=terminal_width()),
        "",
        *_rollout_lines(probe),
        f"\n{HEADLINES[verdict.outlook]}:",
        *(f"- {reason}" for reason in verdict.reasons),
    ]


def _rollout_lines(probe: Probe) -> Iterator[str]:
    sampled = probe.sampled
    passed = [f"pass@{k} {percent(share)}" for k, share in sampled.passed.items() if k > 1]
    right = f"{sampled.rollouts} rollouts of each, as in training: {_share(sampled.average)} right"
    yield f"{', '.join([right, *passed])}; {percent(sampled.truncated)} cut, {percent(sampled.stated)} state an answer"
    if sampled.recovery is not None:
        yield (
            f"of the failed ones the context repairs {_share(sampled.recovered)}, another try {_share(sampled.again)}: "
            f"recovery {points(sampled.recovery)}"
        )
    if probe.copying is not None:
        yield (
            f"copy rate: shown a wrong answer, {_share(probe.copying.copied)} of the completions state it; "
            f"{percent(probe.copying.unprompted)} do so unprompted"
        )
    by_class = ", ".join(
        f"{name} {share.nats:.3g} ({percent(share.share)} of all, {plural(share.tokens, 'token')})"
        for name, share in probe.classes.items()
    )
    yield f"divergence by class of token, nats a token: {by_class}" if by_class else "no rollout has a token to compare"


def _share(found: Estimate | None) -> str:
    if found is None:
        return "-"
    low, high = max(0.0, found.low), min(1.0, found.high)
    return f"{100 * found.value:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"


def arm_lines(found: Comparison, place: str) -> list[str]:
    """The table of arms, the runs that are missing, and the verdict; `place` is where the runs are."""
    rows = []
    for arm in found.arms:
        rows.append(
            {
                "arm": arm.name,
                "before": percent(arm.before),
                "after": f"{percent(arm.after)} ({100 * arm.least:.1f}-{100 * arm.most:.1f})",
                "gain": points(arm.gain),
                f"{found.arms[0].name} over it": "" if arm.behind is None else points(arm.behind),
                "retention": "" if arm.retention is None else " -> ".join(map(percent, arm.retention)),
                "step": f"{arm.step:.0f}",
                "tokens": f"{arm.tokens:,.0f}",
                "seconds": f"{arm.seconds:.0f}",
                "seeds": str(len(arm.seeds)),
            }
        )
    at = "at the end of each run" if found.budget is None else f"at equal {found.basis}, {found.budget:,.0f} at most"
    return [
        f"\n{place}: {at}; 95 % intervals over problems and seeds",
        *aligned(rows, least=("seeds", "step", "tokens", "retention", "seconds"), width=terminal_width()),
        *(f"missing: {line}" for line in found.missing),
        f"\n{found.headline}.",
        *(f"- {reason}" for reason in found.reasons),
    ]
