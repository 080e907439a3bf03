"""The training loop: one trial is one setting with one seed, from fresh weights to its errors."""

import copy
import math
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastreg.training.data import Dataset, Examples, split
from fastreg.training.errors import DivergedError
from fastreg.training.models import make_network
from fastreg.training.regularizers import recipe_for
from fastreg.training.seeds import seed_for
from fastreg.training.settings import Settings
from fastreg.training.workers import Workers

#: Examples in one forward pass of the evaluation: large enough to be fast, small enough for any memory.
EVALUATION_BATCH = 2048


class Trial:
    """Trains one network, and can be stopped and taken up again after any epoch with nothing changed.

    Args:
        settings, setting, seed: what to train, as ``Settings.trials`` has it.
        dataset: split by ``seed`` alone, so that all settings have the same three sets.
        workers: the processes that share each batch.

    Attributes:
        history: one dict for each finished epoch, see ``run_epoch``.
        best: the weights of the epoch with the lowest validation error so far (the first of equals), its
            number from 1, and that error in percent.
    """

    def __init__(self, settings: Settings, setting: str, seed: int, dataset: Dataset, workers: Workers):
        self.settings, self.setting, self.seed, self.workers = settings, setting, seed, workers
        self.split = split(dataset, seed).to(workers.device)
        self.recipe = recipe_for(setting, settings)

        torch.manual_seed(seed_for(seed, "weights"))
        self.model = make_network(settings.model, dataset.image_shape, dataset.classes, self.recipe)
        self.model.to(workers.device)
        self.network = workers.wrap(self.model)
        self.optimizer = self.recipe.make_optimizer(self.model)
        self.history: list[dict] = []
        self.best: dict[str, Any] = {"validation_error": math.inf, "epoch": 0, "weights": {}}

        # The order of the examples is the same on every worker, the masks and the noise are not.
        self.order = torch.Generator("cpu").manual_seed(seed_for(seed, "order"))
        torch.manual_seed(seed_for(seed, "layers", workers.rank))

    @property
    def epoch(self) -> int:
        """The number of finished epochs."""
        return len(self.history)

    @property
    def finished(self) -> bool:
        return self.epoch >= self.settings.epochs

    def run_epoch(self, tell: Callable[[float], None] = lambda share: None) -> dict:
        """Train for one epoch and evaluate.

        Args:
            tell: is called after every step with the share of the epoch that is behind it.

        Returns:
            ``epoch``, from 1; ``step_loss``, the mean over the steps as they were taken, with the layers and the images
            of training, without penalties of the weights;
            ``train_loss``, ``train_error``, ``validation_loss``, ``validation_error`` of the weights after
            the epoch, in evaluation mode; ``seconds`` of training, without the evaluation. Losses are mean
            cross-entropies in nats, errors are in percent.

        Raises:
            DivergedError: a loss is not finite.
        """
        start = time.perf_counter()
        step_loss = self._train_once_through(tell).item()  # the only wait for the device
        seconds = time.perf_counter() - start
        train_loss, train_error = self.evaluate(self.split.train)
        validation_loss, validation_error = self.evaluate(self.split.validation)
        for loss in (step_loss, train_loss, validation_loss):
            if not math.isfinite(loss):
                what = f"the loss of '{self.setting}' became {loss} in epoch {self.epoch + 1}"
                where = f"at batch size {self.settings.batch_size} and lr {self.settings.lr:g}"
                raise DivergedError(f"{what} {where}: try a lower --lr")
        record = {
            "epoch": self.epoch + 1,
            "step_loss": step_loss,
            "train_loss": train_loss,
            "train_error": train_error,
            "validation_loss": validation_loss,
            "validation_error": validation_error,
            "seconds": seconds,
        }
        self.history.append(record)
        if validation_error < self.best["validation_error"]:
            weights = copy.deepcopy(self.model.state_dict())
            self.best = {"validation_error": validation_error, "epoch": self.epoch, "weights": weights}
        return record

    def _train_once_through(self, tell: Callable[[float], None]) -> Tensor:
        """One step for each batch of a new random order. Returns the epoch's mean loss, on the device."""
        examples = self.split.train
        total_loss = torch.zeros((), dtype=torch.float32, device=self.workers.device)
        order = torch.randperm(len(examples), generator=self.order, dtype=torch.int64, device="cpu")
        order = order.to(self.workers.device)
        self.network.train()
        batches = self._batches(order)
        for step, batch in enumerate(batches, 1):
            mine = examples[self.workers.shard(batch)]
            images = mine.images
            for transform in self.recipe.transforms:
                images = transform(images)
            loss = F.cross_entropy(self.network(images), mine.labels, reduction="sum")
            # Gradients are averaged over the workers. With this factor the average is the gradient of the
            # mean loss of the whole batch, also where one worker has fewer of its examples, or none.
            (loss * (self.workers.count / len(batch))).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            total_loss += loss.detach()
            tell(step / len(batches))
        self.workers.average_buffers(self.model)
        return self.workers.sum(total_loss) / len(examples)

    def _batches(self, order: Tensor) -> list[Tensor]:
        """``order`` in pieces of the batch size. A rest too small to be trained on joins the one before it."""
        batches = list(order.split(self.settings.batch_size))
        if len(batches) > 1 and len(batches[-1]) < self.recipe.smallest_share * self.workers.count:
            batches[-2:] = [torch.cat(batches[-2:])]
        return batches

    @torch.no_grad()
    def evaluate(self, examples: Examples) -> tuple[float, float]:
        """Mean cross-entropy in nats and error in percent in evaluation mode, each worker doing its share."""
        self.model.eval()
        totals = torch.zeros(2, device=self.workers.device, dtype=torch.float64)
        mine = Examples(self.workers.shard(examples.images), self.workers.shard(examples.labels))
        for images, labels in mine.batches(EVALUATION_BATCH):
            logits = self.model(images)
            totals[0] += F.cross_entropy(logits, labels, reduction="sum")
            totals[1] += (logits.argmax(1) != labels).sum()
        loss, errors = self.workers.sum(totals).tolist()
        return loss / len(examples), 100 * errors / len(examples)

    def result(self) -> dict:
        """What a finished trial leaves: its errors in percent at the best and the last epoch, its history.

        The test set is looked at here for the first time.
        """
        at_last = self._errors()
        self.model.load_state_dict(self.best["weights"])
        return {
            "setting": self.setting,
            "seed": self.seed,
            "batch_size": self.settings.batch_size,
            "lr": self.settings.lr,
            "parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            "examples": {part: len(getattr(self.split, part)) for part in ("train", "validation", "test")},
            "pixel_mean": self.split.mean,
            "pixel_std": self.split.std,
            "best": {"epoch": self.best["epoch"], **self._errors()},
            "last": {"epoch": self.epoch, **at_last},
            "history": self.history,
        }

    def _errors(self) -> dict:
        parts = ("train", "validation", "test")
        return {f"{part}_error": self.evaluate(getattr(self.split, part))[1] for part in parts}

    def state_dict(self) -> dict:
        """Everything that the next epoch depends on. To be called by all workers."""
        return {
            "setting": self.setting,
            "seed": self.seed,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "order": self.order.get_state(),
            "random": self.workers.gather(_random_state(self.workers.device)),
            "history": self.history,
            "best": self.best,
        }

    def load_state_dict(self, state: dict) -> None:
        """Go on where ``state`` was taken. It sets the random state: draw nothing before the next epoch."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.order.set_state(state["order"])
        self.history = state["history"]
        self.best = state["best"]
        _set_random_state(state["random"][self.workers.rank], self.workers.device)


def _random_state(device: torch.device) -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def _set_random_state(state: dict[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)
