"""Batch normalization: ``test_channel_norm.py`` tests it, with group and instance normalization.

Over several processes: ``test_sync_batch_norm.py``. PyTorch's own suites: ``conformance/test_norm_conformance.py``.
"""
