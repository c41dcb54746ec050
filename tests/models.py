"""Models for tests."""

from __future__ import annotations

from lit_mult.config import RunConfig
from lit_mult.method.plan import plan_run
from lit_mult.nn.init import initialize
from lit_mult.nn.llama import Llama


def initialized(config: RunConfig, vocab_size: int, seed: int = 0) -> Llama:
    plan = plan_run(config, vocab_size)
    model = Llama(config.model, plan)
    initialize(model, plan, seed)
    return model
