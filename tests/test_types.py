"""A type checker reads the installed package (``py.typed``): it knows right arguments from wrong ones."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mypy")

ROOT = Path(__file__).parent.parent

USER = """
import torch
import fastreg
import fastreg.functional as F
from fastreg import nn, optim, penalties

x = torch.ones(2, 3)
layer = nn.Dropout(0.5, activation="relu")
nn.Dropout("0.5")  # wrong: arg-type
nn.Dropout(0.5, activation=torch.relu)  # wrong: arg-type
nn.BatchNorm1d(3, device="cpu", dtype=torch.float64, activation="relu")
nn.BatchNorm1d(3, dtype="float64")  # wrong: arg-type
nn.LayerNorm((2, 3), p=0.5)  # wrong: call-arg
layer.activation = 1  # wrong: assignment

y: torch.Tensor = F.batch_norm(x, None, None, training=True, activation="relu")
z: int = F.dropout(y, 0.5, inverted=False, seed=x)  # wrong: assignment
F.batch_norm(x, None, None, momentum="0.1")  # wrong: arg-type
F.dropout(x, probability=0.5)  # wrong: call-arg
F.no_such_function(x)  # wrong: attr-defined

optimizer = optim.AdamW(layer.parameters(), lr=1e-3, l1=1e-4, max_norm=2.0)
optim.AdamW([{"params": [x], "max_norm": 1.0}], betas=(0.9, torch.tensor(0.99)))
optim.AdamW(layer.parameters(), l1="small")  # wrong: arg-type
optim.SGD(layer.parameters(), max_norms=2.0)  # wrong: call-arg
optim.Adam(0.5)  # wrong: arg-type
loss: float = optimizer.step(lambda: 0.5)
optimizer.step(0.5)  # wrong: call-overload

penalty: torch.Tensor = penalties.l2(layer.parameters(), 1e-4) + 1
penalties.l1(layer, 1e-4)  # wrong: arg-type
with fastreg.mc_dropout(layer) as model:
    model(x)
fastreg.update_bn(model, [x], estimator=2)  # wrong: arg-type
fastreg.ExponentialMovingAverage(model, decay=0.9).update()
converted: nn.Dropout = fastreg.convert(layer, fuse="trace", filter=lambda module, name: True)
fastreg.convert(x)  # wrong: type-var
fastreg.explain(layer).as_dict()
ours: optim.AdamW = fastreg.convert_optimizer(optimizer)
fastreg.no_such_name  # wrong: attr-defined
"""


def test_users_are_told_of_wrong_arguments(tmp_path, request):
    file = tmp_path / "user.py"
    file.write_text(USER)
    wanted = [
        (number, line.split("# wrong: ")[1])
        for number, line in enumerate(USER.splitlines(), 1)
        if "# wrong: " in line
    ]
    cache = request.config.cache.mkdir("mypy")
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file=", f"--cache-dir={cache}", str(file)]
    told = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=500).stdout
    found = re.findall(r"^user\.py:(\d+): error: .*\[([a-z-]+)\]$", told, re.MULTILINE)
    assert [(int(number), code) for number, code in found] == wanted, told
