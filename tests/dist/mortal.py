"""`python -m tests.dist.mortal generate ...` is `alisa generate ...` with replicas that die when a test wants it."""

from __future__ import annotations

import os
import resource
import signal
from dataclasses import dataclass

from alisa.cli.generate import Generate, chat_frame
from alisa.cli.main import run
from alisa.cli.ray_job import run_fleet
from alisa.cli.shard_work import GenerateWork
from alisa.llm import LLM

POISON = "poison"
BROKEN = "broken"
FULL_DISK = "full-disk"
"""A file of this name in the directory of a job: no file may grow beyond as many bytes as it says."""


class MortalLLM(LLM):
    """A process that is given a poison prompt is gone; a broken one fails as nobody foresaw."""

    def stream(self, prompts, params=None):
        texts = [self.tokenizer.decode(list(prompt)) for prompt in prompts]
        if any(POISON in text for text in texts):
            os.kill(os.getpid(), signal.SIGKILL)
        if any(BROKEN in text for text in texts):
            raise RuntimeError("a kernel has failed")
        return super().stream(prompts, params)


@dataclass(frozen=True, kw_only=True)
class MortalWork(GenerateWork):
    def open(self, share, progress):
        limit = self.directory / FULL_DISK
        if limit.exists():
            _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit.read_text()), most))
        return super().open(share, progress)

    def make_llm(self, share):
        llm = super().make_llm(share)
        return MortalLLM(config=llm.config, loaded=llm.model)


class MortalGenerate(Generate):
    def run(self) -> int:
        return run_fleet(self, chat_frame(self), make_work=MortalWork)


if __name__ == "__main__":
    run({"generate": MortalGenerate})
