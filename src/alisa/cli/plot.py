"""`alisa plot`: figures of what `alisa eval` and `alisa generate --report` wrote."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from alisa.cli.files import refuse_same_file
from alisa.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Plot:
    """Draw the records of alisa eval, or the report of alisa generate.

    accuracy: what each policy costs by sparsity. recall-map: depth against length. recall-distance: how far back things
    are still found. attention: sparsity of the weights and what the policies capture. steps: memory by tier and time by
    part over the steps of a run. A file with records for several figures gives one file for each.

    For instance:
      alisa plot report.jsonl --output steps.png
      alisa plot cells.jsonl --output accuracy.svg
      alisa plot ppl.jsonl recall.jsonl --figure accuracy --output figures/cost.png
    """

    files: Annotated[Positional[tuple[Path, ...]], arg(metavar="FILE.jsonl ...")]
    """Files that alisa eval wrote with --output, or alisa generate with --report."""
    output: Annotated[Path | None, arg(metavar="FIG.svg|.png|.pdf", help_behavior_hint="(default: beside FILE)")] = None
    """Where the figure goes; the name of the figure is added when there are several."""
    figure: Annotated[str | None, arg(metavar="NAME", help_behavior_hint="(default: all that there is data for)")] = (
        None
    )
    """Only this figure: accuracy, recall-map, recall-distance, steps or attention."""

    def run(self) -> int:
        """Do it; returns the exit status."""
        from alisa.lab.plot.canvas import save
        from alisa.lab.plot.drawings import DRAWINGS
        from alisa.lab.plot.records import read_lines

        if not self.files:
            raise InputError("There is nothing to draw; name a file that alisa eval or alisa generate --report wrote.")
        target = self.output or self.files[0].with_suffix(".svg")
        for path in self.files:
            refuse_same_file({"A file to draw": path, "the figure": target})
        records = read_lines(self.files)
        names = [drawing.name for drawing in DRAWINGS]
        if self.figure is not None and self.figure not in names:
            raise InputError(f"There is no figure {self.figure!r}; there is {', '.join(names)}.")
        chosen = {
            drawing: found
            for drawing in DRAWINGS
            if self.figure in (None, drawing.name)
            and (found := [record for record in records if drawing.takes(record)])
        }
        if not chosen:
            kinds = ", ".join(sorted({str(record["kind"]) for record in records})) or "nothing"
            raise InputError(f"No figure can be drawn from {kinds}; there is {', '.join(names)}.")
        for drawing, found in chosen.items():
            path = target if len(chosen) == 1 else target.with_stem(f"{target.stem}-{drawing.name}")
            save(drawing.draw(found), path)
            sys.stdout.write(f"{path}\n")
        return 0
