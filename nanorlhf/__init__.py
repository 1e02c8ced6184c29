"""nanorlhf: RLHF for code generation, from scratch in PyTorch: reward models, PPO with GAE, DPO."""

__version__ = "0.1.0"
