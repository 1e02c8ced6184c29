"""What runs beside the trainer, drawn in ../sandbox.py: `judge.py`, `zygote.py` and `child.py` are the processes, `values.py`
is what they say to each other, `walls.py` what stands between them. Standard library only.
"""
