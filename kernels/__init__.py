"""Triton kernels: faster twins of the definitions in nanorlhf/logprobs.py, advantages.py and losses.py.

The names below are imported when first asked for: other libraries look for a package called kernels and must be able
to import it where Triton is absent.
"""
import importlib

HOMES = {"token_logprobs": "logprobs", "linear_token_logprobs": "linear_logprobs", "exact_kl": "kl",
         "gae": "advantages", "fused_ppo_loss": "ppo", "fused_dpo_loss": "dpo"}


def __getattr__(name):
    if name not in HOMES:
        raise AttributeError(f"module 'kernels' has no attribute {name!r}")
    return getattr(importlib.import_module(f"kernels.{HOMES[name]}"), name)
