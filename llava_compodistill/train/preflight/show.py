"""A report for people: a verdict, tables, and what to do next."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table

from .check import CANNOT, SKIPPED, Report, versions
from .findings import NOTE, SKIPS, STOPS, Example

_PLAIN = {"box": box.SIMPLE_HEAD, "pad_edge": False, "padding": (0, 0, 0, 1), "title_justify": "left"}
_STYLE = {STOPS: "bold red", SKIPS: "yellow", NOTE: "cyan"}
_BAR = 40


def show(report: Report, console: Console) -> None:
    """Print a report."""
    _models(report, console)
    _lengths(report, console)
    _images(report, console)
    _findings(report, console)
    counts = report.counts
    if counts:
        console.print(
            f"{counts['read']:,} samples in {counts['files']} file(s), {counts['usable']:,} usable, "
            f"{counts['with_image']:,} with an image, {counts['in_an_epoch']:,} in an epoch.",
            markup=False,
        )
    installed = ", ".join(f"{name} {version}" for name, version in versions().items() if version)
    console.print(f"Versions: {installed}.", markup=False, soft_wrap=True)
    spent = ", ".join(f"{name} {value:.1f} s" for name, value in report.seconds.items())
    console.print(f"Time: {spent}.", markup=False, soft_wrap=True)
    for text in report.unchecked:
        console.print(f"Not looked at: {text}.", markup=False, soft_wrap=True)
    verdict = report.verdict
    if verdict == SKIPPED:
        verdict = f"ready with {report.skipped:,} samples skipped"
    style = "bold red" if report.verdict == CANNOT else "bold yellow" if report.verdict == SKIPPED else "bold green"
    console.print(f"Verdict: {verdict}.", style=style, markup=False)
    if report.written:
        listed = sum(len(samples) for samples in report.findings.unwanted.values())
        console.print(f"{report.written} lists {listed:,} samples to leave out.", markup=False, soft_wrap=True)
    if report.command and report.verdict != CANNOT:
        console.print("The command that leaves them out:", markup=False)
        console.print(f"  {report.command}", markup=False, soft_wrap=True)


def _models(report: Report, console: Console) -> None:
    if report.models is None:
        return
    table = Table(title="models", **_PLAIN)
    for column in ("", "student", "teacher", ""):
        table.add_column(column, overflow="fold")
    for row in report.models.rows:
        table.add_row(*row)
    console.print(table, markup=False)
    for aligned in report.models.aligned_layers():
        if aligned["measured"]:
            text = f"chosen by measurement before training ({aligned['measured']})"
        else:
            pairs = zip(aligned["student"], aligned["groups"], strict=True)
            text = ", ".join(f"{layer} <- {_range(group)}" for layer, group in pairs)
        console.print(f"Layers that {aligned['term']} aligns: {text}.", markup=False, soft_wrap=True)


def _range(layers: list[int]) -> str:
    whole = layers == list(range(layers[0], layers[-1] + 1))
    return f"{layers[0]}-{layers[-1]}" if whole and len(layers) > 1 else ",".join(map(str, layers))


def _lengths(report: Report, console: Console) -> None:
    found = report.lengths
    if found is None or not len(found.lengths):
        return
    table = Table(title=f"tokens a sample, images included ({len(found.lengths):,} samples)", **_PLAIN)
    table.add_column("tokens", justify="right")
    table.add_column("samples", justify="right")
    table.add_column("")
    rows = found.histogram()
    most = max(count for _, _, count in rows)
    for low, high, count in rows:
        over = low > found.limit
        table.add_row(
            f"{low}-{high}" if low != high else str(low),
            f"{count:,}",
            "#" * -(-_BAR * count // most) + (" cut" if over else ""),
            style="yellow" if over else None,
        )
    console.print(table, markup=False)
    values = found.as_json()
    shares = ", ".join(f"{share} %: {value}" for share, value in values["percentiles"].items())
    console.print(
        f"Percentiles: {shares}. Limit {found.limit}: {found.cut:,} cut, {found.lost:,} without any answer left. "
        f"Visual tokens a sample: {', '.join(f'{count} ({n:,})' for count, n in values['visual_tokens'].items())}.",
        markup=False,
        soft_wrap=True,
    )


def _images(report: Report, console: Console) -> None:
    if report.images is None:
        return
    values = report.images.as_json()
    parts = [f"{values['decoded']:,} images decoded, {values['damaged']:,} damaged"]
    parts += [", ".join(f"{name} {count:,}" for name, count in values[what].items()) for what in ("formats", "modes")]
    for side in ("width", "height"):
        if side in values:
            parts.append(f"{side} {values[side]['least']} to {values[side]['most']}, median {values[side]['median']}")
    console.print(f"Images: {'; '.join(part for part in parts if part)}.", markup=False, soft_wrap=True)


def _findings(report: Report, console: Console) -> None:
    rows = list(report.findings)
    if not rows:
        return
    table = Table(title="findings", show_lines=False, **_PLAIN)
    table.add_column("", no_wrap=True)
    table.add_column("count", justify="right", no_wrap=True)
    for column in ("what", "for example", "what to do"):
        table.add_column(column, overflow="fold")
    for finding in rows:
        examples = "\n".join(filter(None, map(_named, finding.examples)))
        table.add_row(
            finding.level, f"{finding.count:,}", finding.kind, examples, finding.remedy, style=_STYLE[finding.level]
        )
    console.print(table, markup=False)


def _named(example: Example) -> str:
    where = "" if example.index is None else f"{example.file}, sample {example.index} (id {example.id!r})"
    if not where and example.file:
        where = example.file
    return ": ".join(part for part in (where, example.detail) if part)
