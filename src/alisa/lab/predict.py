"""What the decode steps of a run should have cost on a machine, from the plans that were executed."""

from __future__ import annotations

from alisa.engine.report import RunReport
from alisa.planner.cost import StepCost
from alisa.planner.hardware import Hardware
from alisa.planner.load import RunConfig
from alisa.planner.simulate import price_run


def predict(report: RunReport, hardware: Hardware) -> StepCost | None:
    """The price of the decode steps of a run; None where the machine's figures say nothing about a dtype of it."""
    setup = report.setup
    method = RunConfig(setup.policy, setup.sparsity, setup.dtype, setup.kv_dtype, weight_dtype=setup.weight_format)
    if method.products not in hardware.gemm or setup.kv_dtype not in hardware.attention:
        return None
    timeline = price_run(setup.spec, method, hardware, report.plans, setup.limits, tiers=setup.placement.uses_tiers)
    return timeline.total(prefill=False)
