"""Independent random streams from one ``--seed``."""

import hashlib


def seed_for(seed: int, *purpose: str | int) -> int:
    """A seed in ``[0, 2**63)`` for one purpose: the weights, the order of the examples, a worker's masks.

    Purposes do not share random numbers, so that two settings with the same seed start from the same weights
    and see the examples in the same order, whatever else one of them draws.
    """
    digest = hashlib.sha256(repr((seed, *purpose)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
