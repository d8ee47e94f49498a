from __future__ import annotations

from importlib.util import find_spec

import numpy as np
import pytest

from alisa.config import EngineConfig, SamplingParams
from alisa.dist.ray_data import GenerateStage, seed_offset
from alisa.errors import InputError
from alisa.llm import LLM
from tests.dist.jobs import ENVIRONMENT

RULES = SamplingParams(max_tokens=8, temperature=0.9, seed=3)
TEXTS = ["The ship", "It was a dark night", "The old captain", "Men at sea"]


@pytest.fixture(scope="module")
def expected() -> list[tuple[int, ...]]:
    with LLM() as llm:
        return [output.token_ids for output in llm.generate(TEXTS, RULES)]


def batch(places: list[int], **columns: list) -> dict[str, np.ndarray]:
    made = {"id": places, "prompt": [TEXTS[place] for place in places], **columns}
    return {name: np.array(values, dtype=object) for name, values in made.items()}


def test_a_row_gets_the_tokens_of_its_place_in_any_batch(expected):
    stage = GenerateStage(EngineConfig(max_num_seqs=2), RULES)
    for places in ([3, 1], [0], [2, 0, 1]):
        rows = stage(batch(places, more=["x"] * len(places)))
        assert [tuple(ids) for ids in rows["token_ids"]] == [expected[place] for place in places]
        assert [*rows["error"]] == [""] * len(places)
        assert [*rows["more"]] == ["x"] * len(places)


def test_rows_that_cannot_be_used_have_an_error_and_the_others_run(expected):
    stage = GenerateStage(EngineConfig(max_model_len=40), RULES)
    rows = batch([0, 1, 2, 3])
    rows["prompt"][1], rows["prompt"][2] = "far too long " * 30, None
    done = stage(rows)
    assert [bool(error) for error in done["error"]] == [False, True, True, False]
    assert [*done["finish_reason"]] == ["length", "error", "error", "length"]
    assert tuple(done["token_ids"][3]) == expected[3]
    assert len(done["token_ids"][1]) == 0


def test_a_column_that_is_missing_and_several_texts_are_refused():
    with pytest.raises(InputError, match="no column 'id'; it has prompt"):
        GenerateStage(None, RULES)({"prompt": np.array(["a"], dtype=object)})
    with pytest.raises(InputError, match="n is 2"):
        GenerateStage(None, SamplingParams(n=2))


def test_seeds_depend_on_the_id_alone():
    assert [seed_offset(7), seed_offset(np.int64(7))] == [7, 7]
    assert seed_offset("7") == seed_offset("7") != 7
    assert 0 <= seed_offset(-1) < 2**64


@pytest.mark.slow
@pytest.mark.skipif(not find_spec("ray"), reason="Ray is not installed; `make ray-test` installs it")
@pytest.mark.filterwarnings("ignore")  # of Ray Data and pandas, about themselves
def test_a_dataset_goes_through_an_actor(expected, monkeypatch):
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    import ray

    ray.init("local", num_cpus=2, object_store_memory=200 * 2**20, include_dashboard=False)
    try:
        rows = ray.data.from_items([{"id": place, "prompt": text} for place, text in enumerate(TEXTS)])
        done = rows.map_batches(
            GenerateStage,
            fn_constructor_kwargs={"params": RULES},
            batch_size=2,
            num_cpus=1,
            compute=ray.data.ActorPoolStrategy(size=1),
        ).take_all()
    finally:
        ray.shutdown()
    assert {row["id"]: tuple(row["token_ids"]) for row in done} == dict(enumerate(expected))
