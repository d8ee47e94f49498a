"""`GenerateStage`: an engine as a stage of a Ray Dataset, for those whose prompts are in one already.

For a file of prompts `alisa generate --ray` gives more: it resumes, and no prompt that kills its process stops it. Ray
Data runs a block again when an actor dies, so a row may be generated twice; its seed comes from its id, so that both
times give the same tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from alisa.config import NUM_SEEDS, EngineConfig, SamplingParams, per_request
from alisa.errors import CapacityError, InputError, PromptError
from alisa.llm import LLM
from alisa.outputs import RequestOutput

Batch = Mapping[str, np.ndarray]
"""Columns of equal length."""


def seed_offset(row_id: object) -> int:
    """What is added to the seed of all rows for this one: a whole number as it is, anything else by its hash.

    A row whose id is its place in a list draws what that prompt draws in `LLM.generate` and `alisa generate`.
    """
    match row_id:
        case np.integer() | int() if not isinstance(row_id, bool) and row_id >= 0:
            return int(row_id)
        case _:
            return int.from_bytes(hashlib.sha256(str(row_id).encode()).digest()[:8], "big") % NUM_SEEDS


class GenerateStage:
    """A class for `map_batches`: each actor loads the model once and adds columns to the batches that it gets.

    The columns are `text`, `token_ids`, `finish_reason` and `error`, which is empty where all went well: a row that
    cannot be used gets an error and no text, and neither ends the job nor takes its block with it.

    Args:
        config: how to run it; None: the defaults.
        params: how to sample, one text for each row; row r draws with seed + `seed_offset(id of r)`; None: greedy, 128
            tokens.
        prompt: name of the column of prompts.
        row_id: name of the column of ids.

    Raises:
        InputError: `params` ask for more than one text.
        ModelError: the model cannot be had.

    Example:
        >>> dataset.map_batches(
        ...     GenerateStage,
        ...     fn_constructor_kwargs={"config": EngineConfig(kv_device_memory="2GiB"), "params": SamplingParams()},
        ...     batch_size=128,
        ...     num_cpus=8,
        ...     compute=ray.data.ActorPoolStrategy(size=4),
        ... )
    """

    def __init__(
        self,
        config: EngineConfig | None = None,
        params: SamplingParams | None = None,
        *,
        prompt: str = "prompt",
        row_id: str = "id",
    ) -> None:
        self._params = params or SamplingParams()
        if self._params.n != 1:
            raise InputError(
                f"n is {self._params.n}; a row has room for 1 text. Repeat the rows, each with its own id."
            )
        self._prompt = prompt
        self._row_id = row_id
        self._llm = LLM(config=config)

    def __call__(self, batch: Batch) -> dict[str, np.ndarray]:
        """The batch with the new columns.

        Raises:
            InputError: a column is missing.
        """
        if missing := [name for name in (self._prompt, self._row_id) if name not in batch]:
            raise InputError(f"The batch has no column {missing[0]!r}; it has {', '.join(batch)}.")
        prompts = [*batch[self._prompt]]
        rules = [per_request(self._params, seed_offset(row_id)) for row_id in batch[self._row_id]]
        outputs, errors = self._generate(prompts, rules)
        places = range(len(prompts))
        found = [outputs.get(place) for place in places]
        token_ids = np.empty(len(prompts), dtype=object)  # lists of different lengths
        token_ids[:] = [np.array(output.token_ids if output else (), dtype=np.int64) for output in found]
        return {
            **batch,
            "text": _column([output.text if output else "" for output in found]),
            "token_ids": token_ids,
            "finish_reason": _column([output.finish_reason if output else "error" for output in found]),
            "error": _column([errors.get(place, "") for place in places]),
        }

    def _generate(
        self, prompts: Sequence[Any], rules: Sequence[SamplingParams]
    ) -> tuple[dict[int, RequestOutput], dict[int, str]]:
        """Outputs and errors, by the place of the row."""
        errors = {
            place: f"The prompt is a {type(prompt).__name__}, a text is needed."
            for place, prompt in enumerate(prompts)
            if not isinstance(prompt, str)
        }
        while todo := [place for place in range(len(prompts)) if place not in errors]:
            try:
                run = self._llm.generate([prompts[place] for place in todo], [rules[place] for place in todo])
            except PromptError as error:
                errors[todo[error.index]] = str(error.problem)
                continue
            except CapacityError as error:
                errors |= dict.fromkeys(todo, str(error))
                continue
            outputs = {todo[output.index]: output for output in run}
            errors |= {place: output.error for place, output in outputs.items() if output.finish_reason == "error"}
            return outputs, errors
        return {}, errors


def _column(values: Sequence[str]) -> np.ndarray:
    return np.array(values, dtype=object)
