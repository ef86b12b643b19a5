"""What a grid has found: tables of means and standard errors beside the paper's figures, and a verdict a claim."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from .claims import Verdict, interval, judge, judge_family
from .studies import Gap, Study
from .world import World

#: The paper's figures, as a table calls them.
_PAPER = {"vqa": "VQA", "cr": "CR", "rbench": "R-Bench", "reefknot": "Reefknot"}
#: By (recipe's key, seed): what `grid.train_grid` returns.
Runs = Mapping[tuple[str, int], Mapping[str, Any]]


@dataclass(frozen=True)
class Found:
    """A study's results.

    Attributes:
        study: the study.
        scores: by metric, row and seed.
        verdicts: of its claims; of those alone that two seeds or more speak to.
    """

    study: Study
    scores: dict[str, dict[str, dict[int, float]]]
    verdicts: list[Verdict]


def collect(
    study: Study, runs: Runs, world: World, seeds: Sequence[int], teachers: Mapping[str, Mapping[str, Any]]
) -> Found:
    """Put a study's figures together; those of a teacher, by its name, stand in for rows without a recipe."""
    scores: dict[str, dict[str, dict[int, float]]] = {}
    for metric in shown_metrics(study, world):
        rows: dict[str, dict[int, float]] = {}
        for name, row in study.rows.items():
            if row.recipe is None:
                found = {seeds[0]: teachers.get(row.teacher, {})}
            else:
                records = {seed: runs.get((world.normal(row.recipe).key, seed)) for seed in seeds}
                found = {seed: record["scores"] for seed, record in records.items() if record}
            rows[name] = {seed: value[metric] for seed, value in found.items() if value.get(metric) is not None}
        scores[metric] = rows
    judged = (judge(claim, scores[claim.metric]) for claim in study.claims if claim.metric in scores)
    verdicts = [verdict for verdict in judged if verdict is not None]
    return Found(study, scores, judge_family(verdicts) if study.family else verdicts)


def shown_metrics(study: Study, world: World) -> dict[str, str]:
    """The columns of a study: a world's own, or those of the study's that the world has."""
    known = {**world.metrics, **world.more}
    return {name: known[name] for name in study.metrics if name in known} if study.metrics else world.metrics


def markdown(found: Found, world: World) -> str:
    """A study as a section of a report."""
    study, metrics = found.study, shown_metrics(found.study, world)
    papers = {name: text for name, text in _PAPER.items() if any(name in row.paper for row in study.rows.values())}
    lines = [f"## {study.title}", ""]
    if study.note:
        lines += [study.note, ""]
    first = next(iter(metrics), None)
    repeated = first is not None and any(len(values) > 1 for values in found.scores[first].values())
    by_seed = [f"{metrics[first]} by seed"] if repeated else []
    gap = study.gap if study.gap is not None and study.gap.metric in metrics else None
    closed = [] if gap is None else [f"gap closed ({metrics[gap.metric]})"]
    names = ["row", *metrics.values(), *closed, "seeds", *by_seed, *(f"paper: {text}" for text in papers.values())]
    lines += ["| " + " | ".join(names) + " |", "|---" * len(names) + "|"]
    for name, row in study.rows.items():
        values = [found.scores[metric][name] for metric in metrics]
        cells = [_cell(list(value.values()), metric) for value, metric in zip(values, metrics, strict=True)]
        count = str(max(map(len, values))) if row.recipe is not None else "–"
        paper = [f"{row.paper[key]:.1f}" if key in row.paper else "–" for key in papers]
        single = [", ".join(f"{value:.1f}" for value in found.scores[first][name].values())] if repeated else []
        if repeated and row.recipe is None:
            single = ["–"]
        if gap is not None:
            cells.append(_gap_closed(found.scores[gap.metric], name, gap))
        lines.append("| " + " | ".join([row.label, *cells, count, *single, *paper]) + " |")
    lines.append("")
    if found.verdicts and study.family:
        names = ("claim", "difference", "interval", "d", "seeds ahead", "p", "p (signs)", "p (Holm)", "verdict")
        lines += ["| " + " | ".join(names) + " |", "|---" * len(names) + "|"]
        lines += [f"| {_claim(verdict, metrics, family=True)} |" for verdict in found.verdicts]
        lines += ["", _FAMILY, ""]
    elif found.verdicts:
        lines += ["| the paper's claim | difference here | 95 % interval | p | verdict |", "|---|---|---|---|---|"]
        lines += [f"| {_claim(verdict, metrics)} |" for verdict in found.verdicts]
        lines.append("")
    return "\n".join(lines)


#: Below the claims that are judged together.
_FAMILY = (
    "d: mean difference over its standard deviation. p: paired t-test; with a margin, two one-sided t-tests, and the "
    "interval is the 90 % one. p (signs): paired permutation test. p (Holm): p corrected for the number of claims in "
    "this table; the verdict follows it."
)


def _gap_closed(scores: Mapping[str, Mapping[int, float]], row: str, gap: Gap) -> str:
    """Share of the way from the bottom row's mean to the top row's, in %, with the 95 % interval over seeds."""
    if row in (gap.bottom, gap.top) or not all(scores.get(name) for name in (row, gap.bottom, gap.top)):
        return "–"
    bottom = scores[gap.bottom]
    top, shared = mean(scores[gap.top].values()), sorted(scores[row].keys() & bottom.keys())
    width = top - mean(bottom.values())
    if width <= 0 or not shared:
        return "–"
    shares = [100 * (scores[row][seed] - bottom[seed]) / width for seed in shared]
    if len(shares) < 2:
        return f"{shares[0]:.0f} %"
    low, high, _ = interval(shares)
    return f"{mean(shares):.0f} % ({low:.0f} to {high:.0f})"


def _p(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.3f}" if value >= 0.001 else "< 0.001"


def _cell(values: Sequence[float], metric: str) -> str:
    """mean ± standard error."""
    if not values:
        return "–"
    digits = 3 if metric == "similarity" else 1
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    return f"{mean(values):.{digits}f} ± {stdev(values) / math.sqrt(len(values)):.{digits}f}"


def _claim(verdict: Verdict, names: Mapping[str, str], family: bool = False) -> str:
    claim = verdict.claim
    text = verdict.verdict
    if verdict.needed is not None:
        text += f" (about {verdict.needed} seeds)"
    cells = [
        f"{claim.text} ({names.get(claim.metric, claim.metric)})",
        f"{verdict.difference:+.1f}",
        f"{verdict.low:+.1f} to {verdict.high:+.1f}",
    ]
    if family:
        effect = "–" if verdict.effect is None else f"{verdict.effect:.2f}"
        cells += [
            effect,
            f"{verdict.ahead} of {verdict.seeds}",
            _p(verdict.p),
            _p(verdict.signs),
            _p(verdict.adjusted),
        ]
    else:
        cells.append(_p(verdict.p))
    return " | ".join([*cells, f"**{text}**" if verdict.verdict != "undecided" else text])


def figure_markdown(drawn: Any) -> str:
    """A figure as a section of a report."""
    lines = [f"## {drawn.figure.title}", "", f"![{drawn.figure.title}]({drawn.picture.name})", ""]
    if drawn.verdicts:
        lines += ["| the paper's claim | difference here | 95 % interval | p | verdict |", "|---|---|---|---|---|"]
        lines += [f"| {_claim(verdict, {})} |" for verdict in drawn.verdicts]
        lines.append("")
    return "\n".join(lines)


def write(
    findings: Sequence[Found],
    runs: Runs,
    world: World,
    root: Path,
    command: str,
    environment: Mapping[str, Any],
    drawn: Sequence[Any] = (),
    teacher: Mapping[str, Any] | None = None,
    more: Sequence[str] = (),
    tuning: Mapping[str, Any] | None = None,
) -> list[Path]:
    """Write report.md and results.json; returns their paths.

    Args:
        drawn: figures, as `figures.draw` returns them.
        teacher: the teacher's figures.
        more: further sections.
        tuning: what `tuning.tune` found, for the results.
    """
    commits = sorted({record["environment"]["commit"] for record in runs.values() if record})
    hours = sum(record["seconds"] for record in runs.values() if record) / 3600
    head = [
        f"# The paper's tables: {world.title}",
        "",
        f"`{command}`; {sum(1 for record in runs.values() if record)} runs, {hours:.1f} hours of training, trained at "
        f"{', '.join(str(commit) for commit in commits)}, reported at {environment['commit']} "
        f"(torch {environment['torch']}, transformers {environment['transformers']}, {environment['device']}).",
        "",
        "Values are means ± standard errors over seeds. The paper's figures are those of its full-size models "
        "(arXiv 2510.12184): averages of VQA and of compositional reasoning (CR) benchmarks. They stand beside the "
        "others to compare orders, not sizes. A claim **holds** or **does not hold** where the 95 % interval of the "
        "difference, paired by seed, leaves 0 out; else it is undecided, with the number of seeds after which a "
        "difference of this size would be found in four of five experiments.",
        "",
    ]
    if teacher is not None:
        shown = [f"{text} {_cell([teacher[name]], name)}" for name, text in world.metrics.items() if name in teacher]
        head += [f"The teacher: {', '.join(shown)}.", ""]
    report, results = root / "report.md", root / "results.json"
    sections = [*(markdown(found, world) for found in findings), *map(figure_markdown, drawn), *more]
    report.write_text("\n".join([*head, *sections]), encoding="utf-8")
    content = {
        "world": world.settings(),
        "environment": dict(environment),
        "teacher": teacher,
        **({} if tuning is None else {"tuning": tuning}),
        "runs": [_portable(record, root) for record in runs.values() if record],
        "studies": {
            found.study.name: {
                "scores": found.scores,
                "verdicts": [{**asdict(verdict)} for verdict in found.verdicts],
            }
            for found in findings
        },
        "figures": {
            figure.picture.stem: {
                "values": figure.values,
                "verdicts": [asdict(verdict) for verdict in figure.verdicts],
            }
            for figure in drawn
        },
    }
    results.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return [report, results]


def _portable(record: Mapping[str, Any], root: Path) -> dict[str, Any]:
    """A run's record with its checkpoint's place below the folder of results."""
    path = Path(record["checkpoint"])
    return {**record, "checkpoint": str(path.relative_to(root)) if path.is_relative_to(root) else path.name}
