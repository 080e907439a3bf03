"""Optimizers as Lightning drives them, mixed precision with clipping; and the callback that converts."""

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from fastreg import optim

CLASSES = ("SGD", "SGDW", "Adam", "AdamW")
pytestmark = pytest.mark.usefixtures("aten")


@pytest.mark.parametrize("fused", [None, True])
@pytest.mark.parametrize("name", CLASSES)
def test_who_clips_may_take_the_scale_out_before_the_step(name, fused):
    """What Lightning reads before it clips: a yes means to it that scaled gradients are all there ever is."""
    p = nn.Parameter(torch.ones(3))
    optimizer = getattr(optim, name)([p], lr=0.1, fused=fused)
    for one in (optimizer, copy.deepcopy(optimizer)):
        assert not getattr(one, "_step_supports_amp_scaling", False)


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("unscaled", [True, False])
def test_a_scaler_of_torch_hands_over_what_it_found(name, unscaled):
    """And neither waits for the device, nor decides by itself whether to step."""
    p = nn.Parameter(torch.ones(3))
    optimizer = getattr(optim, name)([p], lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    seen = []
    optimizer.register_step_pre_hook(lambda self, *_: seen.append((self.grad_scale, self.found_inf)))
    for value in (1.0, torch.inf):
        optimizer.zero_grad()
        scaler.scale((p * value).sum()).backward()
        if unscaled:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
    assert [scale for scale, _ in seen] == ([None, None] if unscaled else [8.0, 8.0])
    assert [found.item() for _, found in seen] == [0.0, 1.0]
    assert_close(p.detach(), torch.full((3,), 0.9), atol=1e-3, rtol=0)


# --- with Lightning itself --------------------------------------------------------------------------------


def trained(optimizer_class, precision: str, **arguments) -> list[torch.Tensor]:
    lightning = pytest.importorskip("lightning.pytorch")

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.layer = nn.Linear(4, 2)

        def training_step(self, batch, _):
            return 100 * self.layer(batch[0]).square().mean()  # so that clipping shows

        def configure_optimizers(self):
            return optimizer_class(self.parameters(), lr=0.1, **arguments)

    data = torch.utils.data.TensorDataset(torch.randn(12, 4, generator=torch.Generator().manual_seed(1)))
    trainer = lightning.Trainer(
        max_epochs=2, accelerator="cpu", precision=precision, gradient_clip_val=0.5,
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    module = Module()
    trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=4))
    return [p.detach() for p in module.parameters()]


@pytest.mark.parametrize("precision", ["bf16-mixed", "32-true", "16-mixed"])
@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW"])
@pytest.mark.filterwarnings("ignore")
def test_a_trainer_with_mixed_precision_clips(name, precision):
    ours, theirs = (trained(getattr(where, name), precision) for where in (optim, torch.optim))
    for p, q in zip(ours, theirs, strict=True):
        assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_the_callback_converts_the_module_and_its_optimizers():
    lightning = pytest.importorskip("lightning.pytorch")
    from fastreg import nn as fnn
    from fastreg.integrations.lightning import Convert

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.layers = nn.Sequential(
                nn.Linear(4, 4, bias=False), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 1)
            )

        def training_step(self, batch, _):
            return self.layers(batch[0]).square().mean()

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=0.1)

    data = torch.utils.data.TensorDataset(torch.randn(12, 4, generator=torch.Generator().manual_seed(1)))
    trained_modules = []
    for callbacks in ([], [Convert()]):
        trainer = lightning.Trainer(
            max_epochs=2, accelerator="cpu", callbacks=callbacks, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        module = Module()
        trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=4))
        trained_modules.append((module, trainer.optimizers[0]))
    (plain, _), (converted, optimizer) = trained_modules
    assert type(converted.layers[1]) is fnn.BatchNorm1d
    assert type(optimizer) is optim.AdamW
    for p, q in zip(plain.parameters(), converted.parameters(), strict=True):
        assert_close(q, p, rtol=1e-5, atol=1e-6)
