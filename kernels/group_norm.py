"""Group and instance normalization: ``channel_norm.py`` has their kernels, which batch normalization shares."""
