"""The benchmark suite: ``python -m bench`` in a checkout, ``fastreg bench`` where installed."""

FAMILIES = ("dropout",)  # a family is one stem: bench/<family>.py declares CASES (timed) and kernels() (inspected)
