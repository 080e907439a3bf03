"""Triton kernels and the device functions they share. No torch, no autograd, no shape checks: see ``fastreg.ops``."""
