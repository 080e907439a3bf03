"""Tests of hypotheses about random numbers, and their one decision."""

import math

import torch
from scipy import stats

ALPHA = 1e-4


def assert_plausible(p_values) -> None:
    """Fails with probability ``ALPHA`` = 1e-4 at most where the null hypothesis behind ``p_values`` is true.

    However many p-values a test hands over and however they depend on each other, the smallest is held against
    ALPHA / their number (Bonferroni), so the rate is that of the call as a whole. Every seed in this file is
    fixed: a test passes always or never, and ALPHA is how often a faultless generator would have needed
    another seed.
    """
    p = torch.as_tensor(p_values, dtype=torch.float64).flatten()
    assert not p.isnan().any()
    assert p.min() * p.numel() > ALPHA, f"smallest p-value {p.min():.3g} of {p.numel()}"


def z_test(z):
    """Two-sided p-value of standard normal statistics."""
    return torch.special.erfc(torch.as_tensor(z, dtype=torch.float64).abs() / math.sqrt(2))


def binomial_test(count, trials: int, probability):
    """Two-sided p-value of counts, without the normal approximation: rare events are tested too."""
    binomial = stats.binom(trials, probability)
    return torch.as_tensor(2 * min(binomial.cdf(count), binomial.sf(count - 1), 0.5))


def chi_square_test(counts, expected, lost_degrees: int = 1):
    """p-value of counts (last dimension: the categories) against what is expected of them."""
    counts = torch.as_tensor(counts, dtype=torch.float64)
    statistic = ((counts - expected) ** 2 / expected).sum(-1)
    return torch.as_tensor(stats.chi2.sf(statistic, counts.shape[-1] - lost_degrees))


def correlation_test(a, b):
    """p-value of no correlation between two large samples: r sqrt(n) is standard normal."""
    a, b = a.double() - a.double().mean(), b.double() - b.double().mean()
    return z_test((a * b).mean() / (a.square().mean() * b.square().mean()).sqrt() * math.sqrt(a.numel()))
