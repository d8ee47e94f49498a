"""How a model wants to be sampled from: generation_config.json against transformers."""

import json

import pytest
import transformers

from alisa.config import SamplingParams
from alisa.errors import InputError, ModelError
from alisa.model.own_sampling import read_sampling, with_own_sampling


@pytest.mark.parametrize(
    "fields",
    [
        {"do_sample": True, "temperature": 0.6, "top_p": 0.95, "top_k": 20},
        {"do_sample": True},
        {"do_sample": True, "top_k": 0, "min_p": 0.1, "repetition_penalty": 1.05},
        {"do_sample": False, "temperature": 0.7, "repetition_penalty": 1.1},
        {"eos_token_id": 2},
    ],
)
def test_it_is_read_as_in_transformers(fields, tmp_path):
    (tmp_path / "generation_config.json").write_text(json.dumps(fields))
    reference = transformers.GenerationConfig.from_pretrained(tmp_path)
    params = with_own_sampling(SamplingParams(max_tokens=7), read_sampling(tmp_path))
    assert params.max_tokens == 7
    assert params.repetition_penalty == (reference.repetition_penalty or 1.0)
    if not reference.do_sample:
        assert params == SamplingParams(max_tokens=7, repetition_penalty=params.repetition_penalty)
        return
    assert params.temperature == (1.0 if reference.temperature is None else reference.temperature)
    assert params.top_k == (50 if reference.top_k is None else reference.top_k)
    assert params.top_p == (1.0 if reference.top_p is None else reference.top_p)
    assert params.min_p == (reference.min_p or 0.0)


def test_options_come_first():
    own = {"temperature": 0.6, "top_k": 20, "top_p": 0.9}
    params = with_own_sampling(SamplingParams(temperature=1.2, top_p=0.5), own)
    assert (params.temperature, params.top_k, params.top_p) == (1.2, 20, 0.5)


def test_files_that_say_nothing_or_nonsense(tmp_path):
    assert read_sampling(tmp_path) == {}
    (tmp_path / "generation_config.json").write_text("[]")
    with pytest.raises(ModelError, match="holds a list instead"):
        read_sampling(tmp_path)
    with pytest.raises(InputError, match=r"top_p is 3"):
        with_own_sampling(SamplingParams(), {"top_p": 3.0})
