"""Models with batch normalization for the tests of population statistics and folding."""

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


def state_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_state(model, state):
    assert model.state_dict().keys() == state.keys()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, state[name], rtol=0, atol=0, equal_nan=True, msg=name)


def batches_of(sizes, dtype=torch.float64, shape=(3, 5, 5)):
    return [torch.randn(size, *shape, dtype=dtype) * 2 + 1 for size in sizes]


def randomize(model):
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            if module.running_mean is not None:
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
            if module.weight is not None:
                nn.init.normal_(module.weight, 1)
            if module.bias is not None:
                nn.init.normal_(module.bias)
    return model
