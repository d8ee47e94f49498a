"""Engines whose drafts a test decides: right ones, wrong ones, or those of the policy."""

import random

from alisa.engine.builder import CacheOptions, build_engine
from alisa.outputs import TextDelta


class ScriptedDrafts:
    """A speculator that tries what it is told, whether it pays or not.

    Args:
        most: drafts of a request in one step.
        seed: of how many, and of which are wrong.
        truth: tokens of every request as they will come, by its id; None: the policy makes drafts up.
        wrong: the share of drafts that are replaced by any token.
        vocab_size: of the model.
    """

    def __init__(self, most, seed=0, truth=None, wrong=0.3, vocab_size=2000):
        self.most = most
        self.tried = self.came = 0
        self._draw = random.Random(seed)
        self._truth = truth
        self._wrong = wrong
        self._vocab_size = vocab_size

    def propose(self, requests):
        for request in requests:
            request.num_drafts, request.draft_ids = 0, []
            left = request.max_new_tokens - len(request.output_ids) - 1
            if left < 1 or request.num_cached != len(request.token_ids) - 1:
                continue
            count = self._draw.randint(0, min(self.most, left))
            if self._truth is not None:
                done = len(request.output_ids)
                ahead = list(self._truth[request.request_id][done : done + count])
                ahead += [0] * (count - len(ahead))  # after the end that it will have
                request.draft_ids = [
                    self._draw.randrange(self._vocab_size) if self._draw.random() < self._wrong else token
                    for token in ahead
                ]
            request.num_drafts = count

    def learn(self, requests, step):
        for _, tried, came in requests:
            assert 0 <= came <= tried <= self.most
            self.tried += tried
            self.came += came

    def forget(self, request_id):
        pass


class Run:
    """What an engine gave: outputs by request id, and how its text came."""

    def __init__(self, model, config, prompts, params, speculator=None, *, arrive_after=0, check=True):
        options = CacheOptions() if speculator is None else CacheOptions(speculator=speculator)
        engine, _ = build_engine(model, config, options)
        self.engine = engine
        self.outputs, self.records = {}, []
        self.texts = dict.fromkeys(map(str, range(len(prompts))), "")
        waiting = list(enumerate(zip(prompts, params, strict=True)))
        steps = 0
        while waiting or engine.has_requests:
            while waiting and (steps % (arrive_after + 1) == 0 or not engine.has_requests):
                index, (prompt, rules) = waiting.pop(0)
                engine.add_request(prompt, rules, request_id=str(index))
                if arrive_after:
                    break
            output = engine.step()
            steps += 1
            if check:
                engine._session.cache.store.check()
            if output.record is not None:
                self.records.append(output.record)
            for delta in output.deltas:
                assert isinstance(delta, TextDelta)
                self.texts[delta.request_id] += delta.text
            for done in output.finished:
                self.outputs[done.request_id] = done
        engine.close()
        assert all(self.texts[name] == output.text for name, output in self.outputs.items())

    @property
    def results(self):
        """All of the outputs that must not depend on drafts."""
        return {
            name: (o.token_ids, o.text, o.finish_reason, o.stop_reason, o.error, o.logprobs, o.prompt_logprobs)
            for name, o in self.outputs.items()
        }

    @property
    def truth(self):
        return {name: output.token_ids for name, output in self.outputs.items()}
