"""What runs beside the trainer: the walls, and the three kinds of process behind them. Standard library only.

    judge   (1 a worker)  judge.py   holds the tests; where they call the code it asks a child, and compares values
    zygote  (1 a worker)  zygote.py  clean interpreter behind namespaces, Landlock, an own user; sees no code, no test
    child   (1 a sample)  child.py   forked, limited by rlimits and seccomp; runs the code and answers the judge

`values.py` is what they say to each other, `walls.py` what stands between them, `../sandbox.py` the trainer's side.
"""
