"""What a benchmark declares: a Case is one operation on one kind of input, with its byte floor and its check.

A family file (``bench/dropout.py``) holds a tuple ``CASES``. Nothing here knows how a case is timed.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

DIRECTIONS = ("forward", "backward", "both")

# Rounding of the storage type through the two or three roundings an unfused peer makes; the check below looks
# for wrong masks and wrong formulas, the accuracy proper is the business of tests/.
TOLERANCE = {torch.float64: 1e-3, torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}


@dataclass(frozen=True)
class Case:
    """One operation under test.

    ``inputs(numel, dtype, device)`` makes the tensors; the first one has (about) ``numel`` elements and sets
    the size of the case, those that require a gradient are differentiated. ``ours`` and ``torch`` map these
    tensors to the output; ``torch`` is the plain PyTorch expression, timed eagerly and under
    ``torch.compile``. ``forward_bytes(e)`` and ``backward_bytes(e)`` are the floor in bytes per element of
    the first input, of ``e`` bytes each: every byte that must be read once plus every byte that must be
    written once. ``check(inputs, output, output_grad, input_grads)`` returns what is wrong, or None.
    ``peers`` maps the name of a library to a builder: called once, it imports the library and returns a
    function of the same inputs. ``eager_backend(*inputs)`` names what eager PyTorch runs for them, where it chooses.
    ``compiled(mode)`` is the function for ``torch.compile``, where that is not ``torch`` compiled as a whole.

    Where no input requires a gradient, only the forward direction is timed: the step of an optimizer.
    """

    name: str
    inputs: Callable[[int, torch.dtype, torch.device], tuple[Tensor, ...]]
    ours: Callable[..., Tensor]
    torch: Callable[..., Tensor]
    forward_bytes: Callable[[int], float]
    backward_bytes: Callable[[int], float]
    check: Callable[[tuple[Tensor, ...], Tensor, Tensor, tuple[Tensor, ...]], str | None]
    peers: Mapping[str, Callable[[], Callable[..., Tensor]]] = field(default_factory=dict)
    eager_backend: Callable[..., str] | None = None
    compiled: Callable[[str | None], Callable[..., Tensor]] | None = None

    def floor(self, direction: str, x: Tensor) -> int:
        """Bytes that must move between memory and chip for ``direction`` on first input ``x``."""
        e, forward, backward = x.element_size(), self.forward_bytes, self.backward_bytes
        per_element = {"forward": forward(e), "backward": backward(e), "both": forward(e) + backward(e)}
        return round(per_element[direction] * x.numel())


def twin(function: Callable[[Any], Callable[..., Tensor]]) -> Callable[[], Callable[..., Tensor]]:
    """The builder of the peer "plain": ``function`` takes the module ``bench/plain.py`` and returns what is timed."""

    def build() -> Callable[..., Tensor]:
        from . import plain  # imports Triton

        return function(plain)

    return build


def rows(numel: int, features: int = 4096) -> tuple[int, int]:
    """Shape of a batch of hidden states: (tokens, features); less than one row stays one ragged row."""
    features = min(features, numel)
    return numel // features, features


def images(numel: int, side: int = 32, channels: int = 256) -> tuple[int, int, int, int]:
    """Shape of a batch of feature maps (N, C, 32, 32), with fewer channels where the size asks for less."""
    channels = min(channels, max(1, numel // side**2))
    return max(1, numel // (channels * side**2)), channels, side, side


def width(numel: int) -> tuple[int]:
    """Shape of the bias that goes with ``rows``."""
    return rows(numel)[1:]


def random(*shapes: Callable[[int], tuple[int, ...]], channels_last: bool = False):
    """``inputs`` of a case: a normal tensor for each shape function, all requiring a gradient.

    Never zeros: they hide outputs that were not written, and the data change a GPU's power and clock.
    """
    layout = torch.channels_last if channels_last else torch.contiguous_format

    def inputs(numel: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
        return tuple(
            torch.randn(shape(numel), dtype=dtype, device=device).to(memory_format=layout).requires_grad_()
            for shape in shapes
        )

    return inputs


def masked(p: float, kept: Callable[..., Tensor], dropped: Callable[..., Tensor], unit: int | None = None):
    """The check of a random mask: every output is ``kept(*inputs)`` or ``dropped(*inputs)``, at rate ``p``,
    and the gradient follows the same mask.

    ``unit`` is the number of leading dimensions that index the draws (2 for channel dropout); None: every
    element. Looks at both ends of the batch (2¹⁹ elements each) in fp32, so it stays cheap and still sees an
    offset that overflows. Elements where keeping and dropping give almost the same number say nothing and are
    left out.
    """

    def check(inputs: tuple[Tensor, ...], y: Tensor, dy: Tensor, grads: tuple[Tensor, ...]) -> str | None:
        x, tolerance = inputs[0], TOLERANCE[inputs[0].dtype]
        if y.shape != x.shape or y.dtype != x.dtype:
            return f"output is {tuple(y.shape)} {y.dtype}, input {tuple(x.shape)} {x.dtype}"
        count = max(1, 2**19 // max(1, x[0].numel()))

        def ends(t: Tensor) -> Tensor:
            t = t.detach()
            batch = t.dim() == x.dim() and len(t) == len(x) > 2 * count
            return (torch.cat([t[:count], t[-count:]]) if batch else t).float()

        def close(a: Tensor, b: Tensor, times: int = 1) -> Tensor:
            return torch.isclose(a, b, rtol=times * tolerance, atol=times * tolerance)

        small = [ends(t).requires_grad_() for t in inputs]
        y, dy, dx = ends(y), ends(dy), ends(grads[0])
        with torch.enable_grad():
            high, low = kept(*small), dropped(*small)
            (slope,) = torch.autograd.grad(high, small[0], dy)
        is_kept, is_dropped = close(y, high), close(y, low)
        if wrong := int((~(is_kept | is_dropped)).sum()):
            return f"{wrong} of {y.numel()} outputs are neither kept nor dropped values"

        clear = ~close(high, low, times=4)
        if unit is not None:
            one_mask = (is_kept | ~clear).flatten(unit).all(-1) | (is_dropped | ~clear).flatten(unit).all(-1)
            if not one_mask.all():
                return "an element has another mask than the rest of its unit"
        draws = y.numel() if unit is None else math.prod(y.shape[:unit])
        rate = float((is_dropped & clear).sum() / clear.sum().clamp(min=1))
        # 6 standard errors (one false alarm in 10⁹), plus the 1/256 to which some peers round p.
        if abs(rate - p) > 6 * math.sqrt(p * (1 - p) / draws) + 1 / 256:
            return f"drop rate {rate:.4f} of {draws} draws, not {p}"
        if not close(dx, torch.where(is_kept, slope, 0))[clear].all():
            return "the gradient does not follow the mask of the forward pass"
        return None

    return check


def close_to(reference: Callable[..., Tensor], rowwise: bool = False, relu: bool = False):
    """The check of a function without chance: output and gradients are those of ``reference``, in fp32 throughout.

    rowwise: the first dimensions are independent of each other, so that of a large batch only both ends (2²⁰
    elements each) are compared, and the gradients of parameters, sums over all of it, are not. Otherwise everything
    is. What a sum over the batch may differ by is measured against its largest element.

    relu: ``reference`` is what stands in front of one. Its gradient goes to the elements that are positive in the
    output that is checked: near zero, rounding may decide otherwise than exact arithmetic.
    """

    def check(inputs: tuple[Tensor, ...], y: Tensor, dy: Tensor, grads: tuple[Tensor, ...]) -> str | None:
        x, tolerance = inputs[0], TOLERANCE[inputs[0].dtype]
        if y.shape != x.shape or y.dtype != x.dtype:
            return f"output is {tuple(y.shape)} {y.dtype}, input {tuple(x.shape)} {x.dtype}"
        count = max(1, 2**20 // max(1, x[0].numel()))
        part = rowwise and len(x) > 2 * count

        def ends(t: Tensor) -> Tensor:
            t = t.detach()
            return (torch.cat([t[:count], t[-count:]]) if part and t.shape == x.shape else t).float()

        exact = [ends(t).requires_grad_() for t in inputs]
        with torch.enable_grad():
            expected = reference(*exact)
            slopes = torch.autograd.grad(expected, exact, ends(dy) * (ends(y) > 0) if relu else ends(dy))
        expected = expected.relu() if relu else expected
        found = [("output", ends(y), expected)]
        found += [
            (f"gradient of input {i}", ends(grad), slope)
            for i, (grad, slope) in enumerate(zip(grads, slopes, strict=True))
            if not part or grad.shape == x.shape
        ]
        for name, actual, wanted in found:
            scale = 1.0 if wanted.shape == expected.shape else max(1.0, float(wanted.abs().max()))
            wrong = ~torch.isclose(actual, wanted, rtol=tolerance, atol=tolerance * scale)
            if wrong.any():
                return (
                    f"{int(wrong.sum())} of {wrong.numel()} elements of the {name} differ from the reference"
                )
        return None

    return check
