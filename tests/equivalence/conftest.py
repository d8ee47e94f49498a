"""Tiny checkpoints on disk, with a tokenizer, made once per test run."""

import json

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from tests import tiny_models


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """Directory of a tiny model by name; its tokenizer knows the words w0, w1, ..."""
    made = {}

    def directory_of(name):
        if name not in made:
            directory = tmp_path_factory.mktemp(name)
            model = tiny_models.build(name)
            tiny_models.save(model, directory)
            words = {f"w{i}": i for i in range(model.config.vocab_size)}
            tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
            tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
            tokenizer.save(str(directory / "tokenizer.json"))
            (directory / "tokenizer_config.json").write_text(json.dumps({"unk_token": "w0"}))
            made[name] = directory
        return made[name]

    return directory_of
