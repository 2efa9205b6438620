"""Report on a configuration's components: path, check results, download command."""

from collections.abc import Sequence
from typing import NamedTuple

from nextgpt.common.errors import UserError
from nextgpt.common.paths import project_path
from nextgpt.config.schema import Config
from nextgpt.tools.weights.checks import Finding, check_part
from nextgpt.tools.weights.registry import PartName, Source, configured_path, source_of


class _Checked(NamedTuple):
    """A checked component."""

    name: PartName
    path: str
    source: Source | None
    finding: Finding


def prepare_checkpoints(
    config: Config, parts: Sequence[PartName], *, fetch: bool, command: str
) -> bool:
    """Check `parts`, download missing ones if `fetch`, and print a report.

    Args:
        fetch: download what is missing; what is wrong is left unchanged.
        command: the download command, for the report; a part's name is appended.

    Returns:
        Whether all are right.
    """
    checked = []
    for name in parts:
        part = _check(config, name)
        if fetch and part.finding.missing and part.source:
            part = _fetch(config, part, part.source)
        print(_report(part, command), end="\n\n")
        checked.append(part)
    wrong = [part.name for part in checked if part.finding.fault]
    print(f"{len(parts) - len(wrong)} of {len(parts)} components are right", end="")
    print(f"; missing or wrong: {', '.join(wrong)}" if wrong else "")
    return not wrong


def _check(config: Config, name: PartName) -> _Checked:
    path = configured_path(config, name)
    return _Checked(name, path, source_of(name, path), check_part(config, name))


def _fetch(config: Config, part: _Checked, source: Source) -> _Checked:
    """Download a component and check it again; a failed download becomes its fault."""
    print(f"downloading {source.title}: {source.downloader.origin}", flush=True)
    try:
        source.downloader.fetch(project_path(part.path))
    except UserError as error:
        return part._replace(finding=Finding(part.finding.facts, str(error), missing=True))
    return _check(config, part.name)


def _report(part: _Checked, command: str) -> str:
    """Format a heading and the known facts."""
    finding, source = part.finding, part.source
    verdict = ("missing" if finding.missing else "WRONG") if finding.fault else "right"
    lines = [f"{part.name}: {source.title if source else part.path}: {verdict}"]
    lines.append(f"  path       {part.path}")
    lines += [f"  found      {fact}" for fact in finding.facts]
    lines.append(f"  licence    {source.licence if source else 'unknown'}")
    if finding.fault:
        lines.append(f"  fault      {finding.fault}")
    if finding.missing and source:
        lines.append(f"  from       {source.downloader.origin}")
        lines.append(f"  fetch      {command} {part.name}")
        lines += [f"  then       {source.next_step}"] if source.next_step else []
    elif finding.missing:
        lines.append("  fetch      no known source: put it there, or set its path")
    return "\n".join(lines)
