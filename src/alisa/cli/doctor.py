"""`alisa doctor`: one screen that says what this installation can do, and what to do about what it cannot."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from rich.table import Table
from rich.text import Text
from tyro.conf import arg

from alisa.cli.files import to_json
from alisa.cli.screen import output_console
from alisa.doctor.finding import REINSTALL, Finding, Status

if TYPE_CHECKING:
    from alisa.doctor.facts import Facts

_STYLES = {Status.OK: "green", Status.NOTE: "yellow", Status.PROBLEM: "bold red"}


@dataclass(frozen=True, kw_only=True)
class Doctor:
    """Check this installation and machine: what runs, how fast it can be, and the way out of what does not run.

    The exit status is 1 when something is broken, 0 otherwise. For instance:
      alisa doctor
      alisa doctor --kv-disk-path /mnt/nvme --json
      alisa doctor --model FILE.gguf
    """

    model: Annotated[str | None, arg(metavar="DIR|FILE|ID")] = None
    """A model to look at too, without reading its weights: a directory, a .gguf file or a Hugging Face id."""
    kv_disk_path: Annotated[
        Path | None, arg(metavar="DIR", help_behavior_hint="(default: the directory for temporary files)")
    ] = None
    """Where rows would go that fit no memory: looked at for space and kind."""
    json: bool = False
    """End standard output with one JSON record on one line."""

    def run(self) -> int:
        """Do it; returns the exit status."""
        temporary = Path(tempfile.gettempdir())
        try:
            from alisa.doctor.facts import gather
            from alisa.doctor.findings import diagnose
            from alisa.doctor.model import examine
        except (ImportError, OSError) as error:  # a missing package, or a torch whose libraries do not load
            broken = f"alisa cannot be imported: {type(error).__name__}: {error}"
            return report([Finding(Status.PROBLEM, "installation", broken, REINSTALL)], None, json_record=self.json)
        facts = gather(temporary, self.kv_disk_path or temporary)
        findings = [*diagnose(facts), *([] if self.model is None else [examine(self.model)])]
        return report(findings, facts, json_record=self.json)


def report(findings: Sequence[Finding], facts: Facts | None, *, json_record: bool) -> int:
    """Show the findings, with `json_record` also as the last line; returns the exit status."""
    output_console().print(findings_table(findings))
    broken = any(finding.status is Status.PROBLEM for finding in findings)
    if json_record:
        record = {
            "command": "doctor",
            "broken": broken,
            "findings": [asdict(finding) for finding in findings],
            "facts": asdict(facts) if facts else None,
        }
        sys.stdout.write(to_json(record) + "\n")
    return int(broken)


def findings_table(findings: Sequence[Finding]) -> Table:
    """One line for each finding, and under it the way out."""
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(style="dim", no_wrap=True)
    table.add_column()
    for finding in findings:
        # Text, not str: a name such as [model] must not be read as markup.
        table.add_row(Text(finding.status, style=_STYLES[finding.status]), finding.topic, Text(finding.text))
        if finding.way_out:
            table.add_row("", "", Text(f"-> {finding.way_out}"))
    return table
