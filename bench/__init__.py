"""The benchmark suite: ``python -m bench`` in a checkout, ``fastreg bench`` where installed."""

# A family is one stem: bench/<family>.py declares CASES, which are timed, and kernels(), which are inspected.
FAMILIES = (
    *("dropout", "drop_connect", "dual_linear", "noise", "noisy_linear"),
    *("batch_norm", "group_norm", "layer_norm", "local_response_norm"),
    *("optimizers", "penalties", "averages"),
)
