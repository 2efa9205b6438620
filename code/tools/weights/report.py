"""Report on a configuration's components: path, check results, download command."""

from collections.abc import Sequence
from typing import NamedTuple

from nextgpt.common.errors import UserError
from nextgpt.common.paths import project_path
from nextgpt.config.schema import Config
from nextgpt.tools.weights.checks import Finding, check_part
from nextgpt.tools.weights.parts import PartName, configured_path
from nextgpt.tools.weights.registry import Source, source_of


class _Checked(NamedTuple):
    """A checked component."""

    name: PartName
    path: str
    source: Source | None
    finding: Finding


def prepare_checkpoints(
    config: Config, components: Sequence[PartName], *, fetch: bool, command: str
) -> bool:
    """Check `components`, download missing ones if `fetch`, and print a report.

    Args:
        fetch: download what is missing; what is wrong is left unchanged.
        command: the download command, for the report; a component's name is appended.

    Returns:
        Whether all are right.
    """
    checked = []
    for name in components:
        component = _check(config, name)
        if fetch and component.finding.missing and component.source:
            component = _fetch(config, component, component.source)
        print(_report(component, command), end="\n\n")
        checked.append(component)
    wrong = [component.name for component in checked if component.finding.fault]
    print(f"{len(components) - len(wrong)} of {len(components)} components are right", end="")
    print(f"; missing or wrong: {', '.join(wrong)}" if wrong else "")
    return not wrong


def _check(config: Config, name: PartName) -> _Checked:
    path = configured_path(config, name)
    return _Checked(name, path, source_of(name, path), check_part(config, name))


def _fetch(config: Config, component: _Checked, source: Source) -> _Checked:
    """Download a component and check it again; a failed download becomes its fault."""
    print(f"downloading {source.title}: {source.downloader.origin}", flush=True)
    try:
        source.downloader.fetch(project_path(component.path))
    except UserError as error:
        return component._replace(
            finding=Finding(component.finding.facts, str(error), missing=True)
        )
    return _check(config, component.name)


def _report(component: _Checked, command: str) -> str:
    """Format a heading and the known facts."""
    finding, source = component.finding, component.source
    verdict = ("missing" if finding.missing else "WRONG") if finding.fault else "right"
    lines = [f"{component.name}: {source.title if source else component.path}: {verdict}"]
    lines.append(f"  path       {component.path}")
    lines += [f"  found      {fact}" for fact in finding.facts]
    lines.append(f"  licence    {source.licence if source else 'unknown'}")
    if finding.fault:
        lines.append(f"  fault      {finding.fault}")
    if finding.missing and source:
        lines.append(f"  from       {source.downloader.origin}")
        lines.append(f"  fetch      {command} {component.name}")
        lines += [f"  then       {source.next_step}"] if source.next_step else []
    elif finding.missing:
        lines.append("  fetch      no known source: put it there, or set its path")
    return "\n".join(lines)
