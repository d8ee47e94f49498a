"""`alisa plan`: what will happen when a model answers a batch on a machine, from its config alone."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import arg

from alisa.cli.files import refuse_same_file, to_json, write_whole
from alisa.cli.options import DisplayOptions
from alisa.cli.plan_fleet import FleetQuestion, fleet_table
from alisa.cli.plan_modes import ModeQuestion
from alisa.config import KvDtypeName, PolicyName, WeightDtypeName, WeightFormat, parse_bytes, with_options
from alisa.errors import InputError
from alisa.planner.fleet import fleet_record
from alisa.policy.layer_budgets import layer_sparsities
from alisa.quality import QualityName

if TYPE_CHECKING:
    from alisa.planner.hardware import Hardware
    from alisa.planner.load import RunConfig
    from alisa.planner.plan import PlanRequest
    from alisa.planner.simulate import MemoryBudget, UniformWorkload
    from alisa.spec import ModelSpec

_FREE_SHARE = 0.5
"""As `alisa generate`: what grows with tokens may take half of the memory that the weights leave free."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Say whether a batch fits, what moves when, how long it takes, and what would help. No weights are needed.

    For instance:
      alisa plan --shape opt-13b --hardware v100-32gb --batch 64 --prompt-len 128 --output-len 512
      alisa plan --model DIR --kv-device-memory 512MiB --save schedule.json
      alisa plan --shape llama-7b --hardware h100-80gb --batch 64 --prompts 1e9 --hours 48
      alisa plan --shape llama-7b --hardware h100-80gb --batch 64 --prompt-len 1024 --exact --sparsity 0.9
    """

    model: Annotated[str | None, arg(metavar="ID_OR_DIR", help_behavior_hint="")] = None
    """A directory or a Hugging Face id; its config.json is read, nothing else."""
    shape: Annotated[str | None, arg(metavar="NAME", help_behavior_hint="")] = None
    """A built-in shape instead: opt-125m, opt-1.3b, opt-6.7b, opt-13b, opt-30b, llama-1.1b, llama-7b, llama-13b,
    llama-33b, pythia-6.9b, pythia-12b."""
    batch: Annotated[int, arg(metavar="N")] = 16
    """Prompts."""
    prompt_len: Annotated[int, arg(metavar="N")] = 128
    """Tokens of each."""
    output_len: Annotated[int, arg(metavar="N")] = 512
    """Tokens that each gets."""
    hardware: Annotated[str, arg(metavar="NAME|FILE.json")] = "this"
    """this (what `alisa profile` saved), v100-16gb, v100-32gb, rtx4090, h100-80gb, h200, or a file."""
    quality: QualityName | None = None
    """A name for policy, sparsity and rows together, as for `alisa generate`; where one of these is given, too, that
    counts."""
    policy: Annotated[PolicyName | None, arg(help_behavior_hint="(default: sketch)")] = None
    """Which earlier tokens a step reads."""
    sparsity: Annotated[float | None, arg(metavar="SHARE", help_behavior_hint="(default: 0.8)")] = None
    """Share of the earlier tokens that a step does not read."""
    budgets: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="")] = None
    """A file of `alisa tune`; every layer is counted as the one that reads most."""
    dtype: Annotated[str | None, arg(metavar="NAME", help_behavior_hint="(default: what suits the machine)")] = None
    """What the model computes in: float32, bfloat16 or float16."""
    weight_dtype: WeightDtypeName = "auto"
    """What the linear layers are kept in. float: the same as --dtype; auto: int4 for a GGUF file in Q4_0 or Q4_1 on a
    machine that has figures for it, else float."""
    kv_dtype: Annotated[KvDtypeName | None, arg(help_behavior_hint="(default: auto)")] = None
    """What rows are kept in; auto: the same as --dtype, or int8 where that is faster and neither a quality nor --exact
    asks for less loss."""
    kv_device_memory: Annotated[str | None, arg(metavar="SIZE", help_behavior_hint="(default: what is left)")] = None
    """Cap of the rows on the device."""
    kv_host_memory: Annotated[str | None, arg(metavar="SIZE", help_behavior_hint="(default: what there is)")] = None
    """Cap of the rows in main memory below a GPU; on a CPU it means nothing."""
    kv_disk_memory: Annotated[str | None, arg(metavar="SIZE", help_behavior_hint="(default: what there is)")] = None
    """Cap of the rows on disk below a CPU; a plan puts nothing on a disk below a GPU."""
    schedule: Annotated[Path | None, arg(metavar="FILE.json", help_behavior_hint="(default: the best)")] = None
    """Price this schedule, as `alisa generate --schedule` takes it."""
    max_num_seqs: Annotated[int | None, arg(metavar="N", help_behavior_hint="(default: as many as is best)")] = None
    """Prompts that may run together."""
    serial: bool = False
    """Add loading, computing and storing up, as the paper does, instead of hiding what can be hidden."""
    plot: Annotated[Path | None, arg(metavar="FIG.svg|.png|.pdf", help_behavior_hint="")] = None
    """Draw memory and time over the steps."""
    save: Annotated[Path | None, arg(metavar="FILE.json", help_behavior_hint="")] = None
    """Write the schedule for `alisa generate --schedule FILE.json`."""
    modes: ModeQuestion = field(default_factory=ModeQuestion)
    fleet: FleetQuestion = field(default_factory=FleetQuestion)
    display: DisplayOptions = field(default_factory=DisplayOptions)

    def run(self) -> int:
        """Do it; returns the exit status."""
        from alisa.cli.plan_report import plan_tables
        from alisa.cli.screen import error_console, say
        from alisa.planner.plan import make_plan

        refuse_same_file(
            {
                "--hardware": Path(self.hardware),
                "--budgets": self.budgets,
                "--schedule": self.schedule,
                "--save": self.save,
                "--plot": self.plot,
            }
        )
        record = make_plan(self.question())
        answers = self.fleet.answers(record)
        if answers:
            record["fleet"] = [fleet_record(answer) for answer in answers]
        if not self.display.quiet:
            for table in (*plan_tables(record), *([fleet_table(self.fleet, answers)] if answers else [])):
                error_console().print(table)
        if self.plot is not None:
            from alisa.lab.plot.canvas import save
            from alisa.lab.plot.plan import draw_plan

            save(draw_plan([record]), self.plot)
        if self.save is not None:
            _save(record, self.save)
            if not self.display.quiet:
                say(self._use(record, self.save))
        if self.display.json:
            sys.stdout.write(to_json(record) + "\n")
        return 0

    def question(self) -> PlanRequest:
        """The options as the planner's own type.

        Raises:
            InputError: a value is out of range.
            ModelError: the model's config cannot be read.
        """
        from alisa.planner.plan import PlanRequest
        from alisa.planner.simulate import UniformWorkload
        from alisa.scheduler.placement.file import load_schedule

        wrong = [
            f"--{name.replace('_', '-')} is {value}, at least {least} is needed"
            for name, value, least in (
                ("batch", self.batch, 1),
                ("prompt_len", self.prompt_len, 1),
                ("output_len", self.output_len, 2),
                ("max_num_seqs", self.max_num_seqs, 1),
            )
            if value is not None and value < least
        ]
        if self.sparsity is not None and not 0 <= self.sparsity < 1:
            wrong.append(f"--sparsity is {self.sparsity}, allowed is 0 up to but not 1")
        if wrong:
            raise InputError("; ".join(wrong) + ".")
        name, spec, stored = self._model()
        if self.prompt_len + self.output_len > spec.max_positions:
            raise InputError(
                f"{self.prompt_len} prompt and {self.output_len} new tokens are more than the model's "
                f"{spec.max_positions} positions."
            )
        hardware = find_hardware(self.hardware)
        workload = UniformWorkload(self.batch, self.prompt_len, self.output_len)
        methods = self._methods(hardware, spec, stored)
        return PlanRequest(
            name=name,
            spec=spec,
            workload=workload,
            hardware=hardware,
            methods=methods,
            room=self._room(spec, hardware, methods[0], workload),
            overlap=not self.serial,
            placement=None if self.schedule is None else load_schedule(self.schedule),
            max_num_seqs=self.max_num_seqs,
        )

    def _model(self) -> tuple[str, ModelSpec, WeightFormat]:
        """Name, spec, and what its layers are stored in."""
        if (self.model is None) == (self.shape is None):
            raise InputError("Say what to plan for: either --model DIR_OR_ID or --shape NAME.")
        if self.model is not None:
            from alisa.model.hub import resolve_config
            from alisa.model.stored import open_model

            stored = open_model(resolve_config(self.model))
            return self.model, stored.spec, stored.weight_format
        from alisa.planner.shapes import SHAPES

        name = str(self.shape)
        if name not in SHAPES:
            raise InputError(f"There is no shape {name!r}; there is {', '.join(SHAPES)}.")
        return name, SHAPES[name], "float"

    def _methods(self, hardware: Hardware, spec: ModelSpec, stored: WeightFormat) -> tuple[RunConfig, ...]:
        from alisa.planner.load import RunConfig

        known = [name for name in hardware.gemm if name not in ("int8", "int4")]
        dtype = self.dtype or known[0]
        if dtype not in known:
            raise InputError(f"{hardware.name} has no figures for {dtype}; there are {', '.join(known)}.")
        weights = self.weight_dtype
        if weights == "auto":
            weights = stored if stored in hardware.gemm else "float"
        if weights != "float" and weights not in hardware.gemm:
            raise InputError(
                f"{hardware.name} has no figures for {weights} weights, which are for CPUs; an older profile "
                "gets them from another `alisa profile`."
            )
        asked = {"policy": self.policy, "sparsity": self.sparsity, "kv_dtype": self.kv_dtype, "budgets": self.budgets}
        engine = with_options(None, {"quality": self.quality, **asked, **self.modes.engine_options()})
        drafts, sparse = self.modes.drafts(), self.modes.sparse(hardware)
        layers = layer_sparsities(engine.budgets, spec, engine.policy, engine.sparsity)
        own = (dtype,) if engine.kv_dtype == "auto" else (engine.kv_dtype,)
        may_round = engine.kv_dtype == "auto" and self.quality is None and not engine.exact
        kinds = (dtype, "int8") if may_round else own
        if missing := [kind for kind in kinds if kind not in hardware.attention]:
            raise InputError(f"{hardware.name} has no figures for rows of {missing[0]}.")
        return tuple(
            RunConfig(
                engine.policy,
                engine.sparsity,
                dtype,
                kind,
                weight_dtype=weights,
                layers=layers,
                drafts=drafts,
                sparse=sparse,
            )
            for kind in kinds
        )

    def _room(
        self, spec: ModelSpec, hardware: Hardware, method: RunConfig, workload: UniformWorkload
    ) -> MemoryBudget | None:
        """The caps; on this machine what is free now, shared out as `alisa generate` does."""
        from alisa.planner.footprint import weight_bytes
        from alisa.planner.simulate import MemoryBudget, room_for

        room = room_for(spec, method, hardware, workload)
        if self.hardware == "this":
            free = hardware.device_bytes - weight_bytes(
                spec, method.dtype, packs_tied=hardware.packs_tied, weight_dtype=method.weight_dtype
            )
            room = MemoryBudget(int(free * _FREE_SHARE), room.below_bytes)
        elif self.kv_device_memory is None and self._below_cap(hardware) is None:
            return None  # what is left depends on how many run together
        device = room.device_bytes if self.kv_device_memory is None else parse_bytes(self.kv_device_memory)
        cap = self._below_cap(hardware)
        return MemoryBudget(device, room.below_bytes if cap is None else parse_bytes(cap, least=0))

    def _below_cap(self, hardware: Hardware) -> str | None:
        """The cap of the tier that this machine has below its device."""
        return self.kv_host_memory if hardware.below == "host" else self.kv_disk_memory

    def _use(self, record: dict[str, Any], path: Path) -> str:
        """How to run what was planned: a schedule alone says nothing about policy, rows and batch."""
        weights = "" if self.weight_dtype == "auto" else f" --weight-dtype {self.weight_dtype}"
        shared = "" if self.budgets is None else f" --budgets {self.budgets}"
        return (
            f"use it with: alisa generate --policy {record['policy']} --sparsity {record['sparsity']:g}"
            f"{shared}{self.modes.flags()}{weights} --kv-dtype {record['kv_dtype']} "
            f"--max-num-seqs {record['together']} --schedule {path}"
        )


def find_hardware(name: str) -> Hardware:
    """The machine that is meant.

    Raises:
        InputError: there is no such preset or file, or no profile of this machine yet.
    """
    from dataclasses import replace

    from alisa.planner.presets import PRESETS
    from alisa.planner.saved import load_hardware, load_profile

    if name in PRESETS:
        return PRESETS[name]
    if name != "this":
        if not Path(name).is_file():
            raise InputError(f"There is no machine {name!r}; there is this, {', '.join(PRESETS)}, or a file.")
        return load_hardware(Path(name))
    hardware = load_profile()
    if hardware is None:
        raise InputError("There is no profile of this machine yet; run `alisa profile` once, or name a --hardware.")
    import psutil

    return replace(hardware, device_bytes=psutil.virtual_memory().available)


def _save(record: dict[str, Any], path: Path) -> None:
    if not record["fits"]:
        raise InputError(f"There is no schedule to save in {path}: the work does not fit.")
    write_whole(path, to_json(record["schedule"]) + "\n")
