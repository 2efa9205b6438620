"""The report on a configuration's parts: where they are, what is found, how to get them."""

from collections.abc import Sequence
from typing import NamedTuple

from nextgpt.common.errors import UserError
from nextgpt.common.paths import project_path
from nextgpt.config.schema import Config
from nextgpt.tools.weights.checks import Finding, check_part
from nextgpt.tools.weights.registry import PartName, Source, configured_path, source_of


class _Part(NamedTuple):
    """One part and what is known of it."""

    name: PartName
    path: str
    source: Source | None
    finding: Finding


def prepare_checkpoints(
    config: Config, parts: Sequence[PartName], *, fetch: bool, command: str
) -> bool:
    """Look at `parts`, fetch those that are missing if asked to, and print what was found.

    Args:
        config: the whole configuration, of which a part's path counts.
        parts: which.
        fetch: whether to get what is missing. What is there and wrong is left alone.
        command: that fetches, to which a part's name is appended.

    Returns:
        Whether all of them are right.
    """
    looked_at = []
    for name in parts:
        part = _look_at(config, name)
        if fetch and part.finding.missing and part.source:
            part = _fetch(config, part, part.source)
        print(_report(part, command), end="\n\n")
        looked_at.append(part)
    wrong = [part.name for part in looked_at if part.finding.fault]
    print(f"{len(parts) - len(wrong)} of {len(parts)} parts are right", end="")
    print(f"; not so: {', '.join(wrong)}" if wrong else "")
    return not wrong


def _look_at(config: Config, name: PartName) -> _Part:
    path = configured_path(config, name)
    return _Part(name, path, source_of(name, path), check_part(config, name))


def _fetch(config: Config, part: _Part, source: Source) -> _Part:
    """Get a part and look at it again; if it cannot be got, that is what is found."""
    print(f"fetching {source.title}: {source.way.origin}", flush=True)
    try:
        source.way.fetch(project_path(part.path))
    except UserError as error:
        return part._replace(finding=Finding(part.finding.facts, str(error), missing=True))
    return _look_at(config, part.name)


def _report(part: _Part, command: str) -> str:
    """A heading, and a line for each thing known."""
    finding, source = part.finding, part.source
    verdict = ("missing" if finding.missing else "WRONG") if finding.fault else "right"
    lines = [f"{part.name}: {source.title if source else part.path}: {verdict}"]
    lines.append(f"  looked in  {part.path}")
    lines += [f"  found      {fact}" for fact in finding.facts]
    lines.append(f"  licence    {source.licence if source else 'not known here'}")
    if finding.fault:
        lines.append(f"  fault      {finding.fault}")
    if finding.missing and source:
        lines.append(f"  from       {source.way.origin}")
        lines.append(f"  fetch      {command} {part.name}")
        lines += [f"  then       {source.then}"] if source.then else []
    elif finding.missing:
        lines.append("  fetch      put it there, or set its path: no source is known for this one")
    return "\n".join(lines)
