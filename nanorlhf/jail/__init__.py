"""What runs beside the trainer: the walls, and the three kinds of process behind them. Standard library only.

    judge   (1 a worker)  judge.py   holds the tests; where they call the code it asks a child, and compares values
    zygote  (1 or 2)      zygote.py  clean interpreter in namespaces of its own; sees no code, no test
    child   (1 a sample)  child.py   forked, behind every other wall; runs the code and answers the judge

`values.py` is what they say to each other, `walls.py` what stands between them, `../sandbox.py` the trainer's side.
"""
