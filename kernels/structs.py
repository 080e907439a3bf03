"""Named tuples of constants, changed while a kernel is compiled."""

import triton


@triton.constexpr_function
def of_constants(struct, kind):
    """``struct`` as a ``kind``, with plain values: Triton may hand it to a function of constants as a tuple of its
    own or of Python, without names, and its fields as constants of its own."""
    return kind(*(getattr(value, "value", value) for value in struct))
