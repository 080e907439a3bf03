"""Group and instance normalization: ``test_channel_norm.py`` tests them, with batch normalization.

PyTorch's own suites: ``conformance/test_norm_conformance.py``.
"""
