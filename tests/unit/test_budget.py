from typing import get_args

import pytest

from alisa.budget import reads_of
from alisa.config import PolicyName
from alisa.policy.registry import make_policy


@pytest.mark.parametrize("policy", get_args(PolicyName))
def test_a_plan_reads_as_many_tokens_as_the_policy(policy):
    plan, run = reads_of(policy, 0.8), make_policy(policy, 0.8).reads
    assert [plan(n) for n in range(200)] == [run(n) for n in range(200)]
