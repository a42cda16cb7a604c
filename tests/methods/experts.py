"""A small model of transformers with three experts, each token of which goes to one."""

from __future__ import annotations

from typing import Any

import pytest
import torch


def mixtral() -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=50, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=3, num_experts_per_tok=1,
    )  # fmt: skip
    return transformers.MixtralForCausalLM(config).eval()
