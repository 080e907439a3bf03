"""Named tuples of constants, changed while a kernel is compiled."""

import triton


@triton.constexpr_function
def of_constants(struct, kind):
    """``struct`` as a ``kind``, with plain values: between functions, Triton may hand it on as a tuple of its
    own, without ``_replace``, and its fields as constants of its own."""
    return kind(*(getattr(value, "value", value) for value in struct))
