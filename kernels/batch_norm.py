"""Batch normalization: ``channel_norm.py`` has its kernels, which group and instance normalization share."""
