"""Triton kernels: faster twins of the definitions in nanorlhf/logprobs.py, advantages.py and losses.py.

Nothing is imported here: other libraries look for a package of this name and must be able to import it where Triton is absent.
"""
