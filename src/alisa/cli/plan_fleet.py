"""`alisa plan --prompts N`: a job on many machines of the kind that is planned for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from rich.table import Table
from tyro.conf import arg

from alisa.config import format_bytes, parse_bytes
from alisa.errors import InputError
from alisa.planner.fleet import FleetPlan, FleetRequest, plan_fleet, replicas_for

SIZES = (1, 10, 100, 1000)
"""Replicas that are compared where nobody says how many."""


@dataclass(frozen=True, kw_only=True)
class FleetQuestion:
    """A job of many prompts on replicas that are each as planned above."""

    prompts: Annotated[float | None, arg(metavar="N", help_behavior_hint="")] = None
    """Prompts of a whole job, such as 1e9, each of --prompt-len and --output-len: how long, and how many bytes."""
    replicas: Annotated[int | Literal["?"], arg(metavar="N|?")] = "?"
    """Machines, or GPUs, that work on it; ?: what --hours needs, or several numbers to choose from."""
    hours: Annotated[float | None, arg(metavar="H", help_behavior_hint="")] = None
    """How long the job may take."""
    storage_bandwidth: Annotated[str, arg(metavar="SIZE")] = "1GB"
    """What the disk that all machines share gives or takes in a second."""

    def __post_init__(self) -> None:
        if self.prompts is None:
            if (self.replicas, self.hours) != ("?", None):
                raise InputError("--replicas and --hours are of a job; say with --prompts how large it is.")
            return
        if not 1 <= self.prompts <= 1e15:
            raise InputError(f"--prompts is {self.prompts:g}, allowed is 1 to 1e15.")
        if self.replicas != "?" and self.replicas < 1:
            raise InputError(f"--replicas is {self.replicas}, at least 1 is needed.")
        if self.hours is not None and self.replicas != "?":
            raise InputError("--hours asks for a number of --replicas, and one is given; leave one of the two out.")
        if self.hours is not None and not self.hours > 0:
            raise InputError(f"--hours is {self.hours:g}, more than 0 is needed.")
        parse_bytes(self.storage_bandwidth)

    def answers(self, plan: Mapping[str, Any]) -> tuple[FleetPlan, ...]:
        """The job on each number of replicas that was asked for.

        Args:
            plan: the record of one replica.

        Raises:
            InputError: one replica is too small for its batch, or there is no such number.
        """
        if self.prompts is None:
            return ()
        if not plan["fits"]:
            raise InputError(
                "The job cannot be planned: its batch does not fit one machine. Ask for a smaller --batch."
            )
        request = FleetRequest(
            num_prompts=int(self.prompts),
            prompt_len=plan["prompt_len"],
            output_len=plan["output_len"],
            prompts_per_s=plan["batch"] / plan["seconds"],
            weight_bytes=plan["bytes"]["weights"],
            storage_bandwidth=parse_bytes(self.storage_bandwidth),
        )
        if self.hours is not None:
            return (plan_fleet(request, replicas_for(request, self.hours)),)
        sizes = SIZES if self.replicas == "?" else (self.replicas,)
        return tuple(plan_fleet(request, replicas) for replicas in sizes)


def fleet_table(question: FleetQuestion, answers: Sequence[FleetPlan]) -> Table:
    """One line for each number of replicas."""
    first = answers[0]
    table = Table(
        title=f"{question.prompts:,.0f} prompts: input {format_bytes(first.input_bytes)}, results "
        f"{format_bytes(first.output_bytes)}",
        title_justify="left",
    )
    for name in (
        "replicas",
        "hours",
        "replica hours",
        "working",
        "driver busy",
        "disk busy",
        "limited by",
    ):
        table.add_column(name, justify="left" if name == "limited by" else "right")
    for answer in answers:
        table.add_row(
            f"{answer.replicas:,}",
            f"{answer.seconds / 3600:,.1f}",
            f"{answer.replica_hours:,.0f}",
            f"{answer.efficiency:.0%}",
            f"{answer.driver_share:.1%}",
            f"{answer.storage_share:.1%}",
            answer.bottleneck,
        )
    return table
