"""A whole model, or an optimizer, onto fastreg's, in one line; and an account of it."""

from fastreg.conversion.apply import convert, revert
from fastreg.conversion.optimizer import convert_optimizer
from fastreg.conversion.report import Explanation, explain

__all__ = ["Explanation", "convert", "convert_optimizer", "explain", "revert"]
