"""Functions, drop-in for ``torch.nn.functional``: a list of names, the logic is in ``fastreg.ops``."""
