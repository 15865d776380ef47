"""What a rule found, and how findings are shown."""

from __future__ import annotations

import io
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal, get_args

from bnfinetune.bn.saved_report import SavedReport, plain

Severity = Literal["error", "warning", "info"]
Format = Literal["table", "json", "lines"]

SEVERITIES: tuple[Severity, ...] = get_args(Severity)
FORMATS: tuple[Format, ...] = get_args(Format)
_COLOURS = {"error": "bold red", "warning": "yellow", "info": "cyan"}


@dataclass(frozen=True)
class Finding:
    """One pitfall found in a set-up.

    Attributes:
        code: stable code of the rule, such as BN102.
        severity: `error` (results are wrong), `warning` (results suffer) or `info` (worth knowing).
        title: the pitfall in a few words.
        where: names of the BN layers, parameters or other parts concerned.
        scope: the same as a few globs, for people.
        measured: what was found, in numbers.
        why: why it matters, in one sentence.
        fix: a line to paste: an API call or a recipe key.
    """

    code: str
    severity: Severity
    title: str
    where: tuple[str, ...]
    scope: str
    measured: str
    why: str
    fix: str

    @property
    def page(self) -> str:
        """The rule's page in the documentation."""
        return f"docs/checks/{self.code}.md"

    def __str__(self) -> str:
        return f"{self.code} {self.scope}: {self.title}; {self.measured}"


class Findings(SavedReport, list[Finding]):
    """Findings, the gravest first; prints as a table, saves as JSON.

    Attributes:
        unjudged: what each rule would have needed to look at, for rules that had nothing to judge by.
    """

    def __init__(self, findings: Iterable[Finding] = (), unjudged: Mapping[str, str] | None = None) -> None:
        super().__init__(sorted(findings, key=lambda found: (SEVERITIES.index(found.severity), found.code)))
        self.unjudged: dict[str, str] = dict(sorted((unjudged or {}).items()))

    def joined(self, others: Findings) -> Findings:
        """These findings and others of the same model, each once; a rule that judged in either has judged."""
        both = self.unjudged.keys() & others.unjudged.keys()
        return Findings(dict.fromkeys([*self, *others]), {code: others.unjudged[code] for code in both})

    @property
    def exit_code(self) -> int:
        """1 if an error is among them, else 0."""
        return int(any(found.severity == "error" for found in self))

    def to_dict(self) -> dict[str, Any]:
        """The findings as dicts, each with its rule's page, the exit code, and what could not be judged."""
        return {
            "exit_code": self.exit_code,
            "findings": [plain(asdict(found)) | {"page": found.page} for found in self],
            "unjudged": dict(self.unjudged),
        }

    def __str__(self) -> str:
        return render(self)


def render(
    findings: Sequence[Finding],
    format: Format = "table",  # noqa: A002  (as on the command line)
    *,
    width: int = 120,
    color: bool = False,
) -> str:
    """Findings as text.

    Args:
        findings: what `check_bn` or `watch_bn` found.
        format: `table` for people; `json`, a list of objects; `lines`, one `code layers message` per line. The first
            and the last of these end with a line about rules that had nothing to judge by, where there are some.
        width: columns of the table.
        color: mark severities of the table with terminal colours.

    Raises:
        ValueError: `format` is none of these.
    """
    if format == "json":
        return json.dumps([asdict(found) | {"page": found.page} for found in findings], indent=2)
    if format not in ("lines", "table"):
        raise ValueError(f"format={format!r} is not one of {', '.join(FORMATS)}")
    silent = _silence(getattr(findings, "unjudged", {}))
    if format == "lines":
        return "\n".join([*map(_line, findings), *silent])
    return "\n\n".join([_table(findings, width, color) if findings else "no BatchNorm pitfall found", *silent])


def _silence(unjudged: Mapping[str, str]) -> list[str]:
    """The line that keeps silence for want of evidence from being read as an all-clear; none if all was judged."""
    if not unjudged:
        return []
    lacking = ", ".join(dict.fromkeys(unjudged.values()))
    return [f"{len(unjudged)} rule{'s' if len(unjudged) > 1 else ''} had nothing to look at: {lacking}"]


def _line(found: Finding) -> str:
    place = found.scope.replace(", ", ",").replace(" ", "_") or "-"
    return f"{found.code} {place} {found.severity}: {found.title}; {found.measured}; fix: {found.fix}".replace(
        "\n", " "
    )


def _table(findings: Sequence[Finding], width: int, color: bool) -> str:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, width=width, show_lines=True)
    table.add_column("rule", no_wrap=True)
    table.add_column("where", ratio=1, overflow="fold")
    table.add_column("what, why and the fix", ratio=3, overflow="fold")
    for found in findings:
        text = Text.assemble(
            (found.title, "bold"), f": {found.measured}\n{found.why}\n", ("fix  ", "bold"), (found.fix, "green")
        )
        table.add_row(Text(f"{found.code}\n{found.severity}", _COLOURS[found.severity]), Text(found.scope), text)
    out = io.StringIO()
    console = Console(
        file=out,
        width=width,
        force_terminal=color,
        force_jupyter=False,  # or a notebook would show the table at once, and the text would be without it
        color_system="standard" if color else None,
    )
    console.print(table)
    return out.getvalue().rstrip("\n")


def as_globs(names: Collection[str], universe: Collection[str]) -> tuple[str, ...]:
    """The fewest globs of the form `prefix.*` that match all of `names` and nothing else of `universe`.

    Args:
        names: qualified names, a part of `universe`.
        universe: every name that a glob could match.
    """
    wanted, others = set(names), set(universe) - set(names)
    if not others:
        return ("*",)
    globs: list[str] = []
    for name in universe:
        if name not in wanted or any(fnmatchcase(name, glob) for glob in globs):
            continue
        globs.append(next(glob for glob in _prefix_globs(name) if _is_worth(glob, wanted, others)))
    return tuple(globs)


def _is_worth(glob: str, wanted: Collection[str], others: Collection[str]) -> bool:
    """Whether a glob matches nothing else, and more than one name if it is not the name itself."""
    if any(fnmatchcase(name, glob) for name in others):
        return False
    return not glob.endswith(".*") or sum(fnmatchcase(name, glob) for name in wanted) > 1


def _prefix_globs(name: str) -> list[str]:
    """`a.*`, `a.b.*` and at last the name itself, brackets escaped, for `a.b.c`."""
    escaped = name.replace("[", "[[]")
    parts = escaped.split(".")
    return [".".join(parts[:depth]) + ".*" for depth in range(1, len(parts))] + [escaped]


def scope_of(names: Sequence[str], universe: Collection[str]) -> str:
    """Names for people: as few globs as will do, and a count where these are still many."""
    if not names:
        return ""
    if not set(names) <= set(universe):
        return _shortened(names)
    if len(names) == len(universe) > 1:
        return f"all {len(names)} BN layers"
    return _shortened(as_globs(names, universe))


def _shortened(names: Sequence[str], most: int = 4) -> str:
    shown = [name or "(the model itself)" for name in names]
    rest = len(shown) - most
    return ", ".join(shown) if rest < 2 else f"{', '.join(shown[:most])} and {rest} more"
