"""`alisa profile`: measures this machine for `alisa plan`."""

from __future__ import annotations

import sys
import tempfile
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Annotated

from tyro.conf import arg

from alisa.cli.files import to_json
from alisa.cli.options import DisplayOptions
from alisa.cli.screen import error_console, say


@dataclass(frozen=True, kw_only=True)
class Profile:
    """Measure this machine for plans; takes about half a minute, and nothing else should run meanwhile.

    The figures are kept in the user's cache directory, with a stamp of processor, cores, torch and alisa: a plan does
    not use them any more when one of these has changed.

    For instance:
      alisa profile
      alisa profile --output this.json
    """

    output: Annotated[Path | None, arg(metavar="FILE.json", help_behavior_hint="(default: the cache directory)")] = None
    """Write the figures here instead, for `alisa plan --hardware FILE.json`."""
    kv_disk_path: Annotated[
        Path | None, arg(metavar="DIR", help_behavior_hint="(default: the directory for temporary files)")
    ] = None
    """Directory whose disk takes the rows that do not fit."""
    display: DisplayOptions = field(default_factory=DisplayOptions)

    def run(self) -> int:
        """Do it; returns the exit status."""
        import torch

        from alisa.kernels.choose import choose_backend
        from alisa.lab.bench.calibration import calibrate
        from alisa.model.choose_linear import choose_linear
        from alisa.planner.profile.machine import Tools, measure_machine
        from alisa.planner.saved import machine_stamp, save_profile

        cpu = torch.device("cpu")
        kernels = choose_backend(cpu)
        stamp = machine_stamp()
        date = datetime.now(UTC).date().isoformat()
        tools = Tools(
            kernels.prefill,
            kernels.attend,
            kernels.append,
            kernels.selection,
            kernels.move_rows,
            partial(choose_linear, device=cpu),
        )
        directory = self.kv_disk_path or Path(tempfile.gettempdir())
        where = f"measured on {stamp['cpu']}, {stamp['cores']} cores, torch {stamp['torch']}, {date}"
        with error_console().status("measuring") as status, torch.inference_mode():

            def progress(what: str) -> None:
                if not self.display.quiet:
                    status.update(what)

            hardware = calibrate(measure_machine(tools, directory, where, progress), directory, progress)
        path = save_profile(hardware, date, self.output)
        if not self.display.quiet:
            say(f"{hardware.where}: {path}")
        if self.display.json:
            record = {"kind": "profile", "stamp": stamp, "date": date, "hardware": asdict(hardware)}
            sys.stdout.write(to_json(record) + "\n")
        return 0
