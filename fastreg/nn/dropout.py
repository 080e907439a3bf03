import torch


class Dropout(torch.nn.Dropout):
    """Placeholder while the house is built."""
