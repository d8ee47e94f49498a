"""Names for how much may be lost, and what counts when more is said."""

from dataclasses import replace

import pytest

from alisa.cli.main import parse
from alisa.cli.plan import Plan
from alisa.config import EngineConfig, with_options
from alisa.errors import InputError
from alisa.planner.presets import PRESETS
from alisa.planner.shapes import SHAPES
from alisa.quality import QUALITIES, qualities_help


def chosen(config):
    return config.policy, config.sparsity, config.kv_dtype


def test_without_a_name_all_is_as_it_was():
    assert chosen(EngineConfig()) == ("sketch", 0.8, "auto")


@pytest.mark.parametrize("name", QUALITIES)
def test_a_name_stands_for_its_options(name):
    rung = QUALITIES[name]
    config = EngineConfig(quality=name)
    assert chosen(config) == (rung.policy, rung.sparsity, rung.kv_dtype)
    assert {"quality": name, **rung.options}.items() <= config.describe().items()
    assert with_options(None, {"quality": name}) == config
    assert replace(config, max_num_seqs=3) == EngineConfig(quality=name, max_num_seqs=3)
    assert f"{name}: {rung.policy}" in qualities_help()


def test_what_is_said_besides_counts_even_where_it_is_the_default():
    assert chosen(EngineConfig(quality="small", sparsity=0.8)) == ("sketch", 0.8, QUALITIES["small"].kv_dtype)
    assert chosen(with_options(None, {"quality": "small", "kv_dtype": "auto"}))[2] == "auto"
    assert chosen(with_options(EngineConfig(sparsity=0.5), {"quality": "exact"})) == ("dense", 0.0, "auto")


@pytest.mark.parametrize("command", [["generate", "x"], ["chat"], ["serve"]])
def test_every_command_that_runs_a_model_knows_the_names(command):
    engine = parse([*command, "--quality", "high"]).engine
    assert (engine.quality, *chosen(engine)) == ("high", *QUALITIES["high"].options.values())
    engine = parse([*command, "--quality=high", "--sparsity", "0.8", "--kv_dtype=auto"]).engine
    assert (engine.quality, *chosen(engine)) == ("high", "sketch", 0.8, "auto")
    assert chosen(parse(command).engine) == ("sketch", 0.8, "auto")


def test_an_unknown_name_is_told_what_there_is():
    with pytest.raises(InputError, match="quality 'best' is unknown, there is exact, high"):
        EngineConfig(quality="best")


@pytest.mark.parametrize("name", QUALITIES)
def test_plans_are_made_for_what_the_name_stands_for(name):
    rung, hardware = QUALITIES[name], PRESETS["v100-32gb"]
    methods = Plan(shape="opt-1.3b", hardware="v100-32gb", quality=name)._methods(hardware, SHAPES["opt-1.3b"], "float")
    rows = "float16" if rung.kv_dtype == "auto" else rung.kv_dtype
    assert [(each.policy, each.sparsity, each.kv_dtype) for each in methods] == [(rung.policy, rung.sparsity, rows)]
    own = Plan(shape="opt-1.3b", quality=name, kv_dtype="int8", sparsity=0.5)._methods(
        hardware, SHAPES["opt-1.3b"], "float"
    )
    assert [(each.policy, each.sparsity, each.kv_dtype) for each in own] == [(rung.policy, 0.5, "int8")]
