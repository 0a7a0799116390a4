"""Where a training is: weights, Adam's averages, steps and losses, in a file from which it goes on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from surgeon.fitting import states

_SMALL = 0.01  # what a tensor of zeros counts as


class State:
    """A training at one step; `identity` says which training it is, so that no other one goes on from its file."""

    def __init__(self, model: nn.Module, parameters: list[nn.Parameter], rate: float, identity: str) -> None:
        self.parameters, self.identity = parameters, identity
        self.names = {id(parameter): name for name, parameter in model.named_parameters()}
        self.kept: dict[str, Tensor] = {self.names[id(parameter)]: parameter for parameter in parameters}
        self.kept |= dict(model.named_buffers())
        self.rates = [rate * max(float(p.detach().double().square().mean().sqrt()), _SMALL) for p in parameters]
        self.optimizer = torch.optim.Adam([{"params": [parameter]} for parameter in parameters])
        self.step = 0
        self.best = 0  # the step with the smallest loss
        self.losses: list[float] = []  # on the images held back, at every check
        self.best_weights = self._weights()

    def set_rate(self, share: float) -> None:
        """Let every tensor have this share of its highest rate."""
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * share

    @property
    def since_best(self) -> int:
        """How many checks there were since the smallest loss."""
        return len(self.losses) - 1 - self.losses.index(min(self.losses))

    def note(self, loss: float) -> None:
        """Take the loss of a check, and keep the weights if there was none as small."""
        if not self.losses or loss < min(self.losses):
            self.best, self.best_weights = self.step, self._weights()
        self.losses.append(loss)

    def use_best_(self) -> None:
        """Put the best weights into the model."""
        self._take_(self.best_weights)

    def save(self, path: Path | None) -> None:
        """Write the state, in place of what was written before."""
        if path is None:
            return
        held = {f"now.{name}": tensor for name, tensor in self._weights().items()}
        held |= {f"best.{name}": tensor for name, tensor in self.best_weights.items()}
        for parameter, of_adam in self.optimizer.state.items():
            held |= {f"adam.{key}.{self.names[id(parameter)]}": tensor for key, tensor in of_adam.items()}
        told = {"step": self.step, "best": self.best, "losses": self.losses}
        states.write(path, self.identity, told, held)

    def resume_(self, path: Path | None, add_up: Callable[[list[Tensor]], None]) -> None:
        """Go on from a file, if there is one, and if the files of all processes are of the same step.

        Raises:
            StoreError: it is damaged, or of another training.
        """
        told: dict[str, Any] = {}
        held: dict[str, Tensor] = {}
        if path is not None and path.exists():
            told, held = states.read(path, self.identity, ("step", "best", "losses"), "training")
        step = float(told.get("step", 0))
        seen = torch.tensor([1.0, step, step * step], dtype=torch.float64, device=self.parameters[0].device)
        add_up([seen])
        if not told or seen[0] * seen[2] != seen[1] ** 2:  # the squares sum up so only if all are the same
            return
        self.step, self.best, self.losses = told["step"], told["best"], told["losses"]
        self._take_(_under("now.", held))
        self.best_weights = _under("best.", held)
        for parameter in self.parameters:
            name = self.names[id(parameter)]
            found = {key: held.get(f"adam.{key}.{name}") for key in ("step", "exp_avg", "exp_avg_sq")}
            if (count := found["step"]) is not None:
                rest = {key: t.to(parameter) for key, t in found.items() if t is not None and key != "step"}
                self.optimizer.state[parameter] = {"step": count, **rest}

    def _weights(self) -> dict[str, Tensor]:
        return {name: tensor.detach().clone() for name, tensor in self.kept.items()}

    def _take_(self, weights: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for name, tensor in self.kept.items():
                tensor.copy_(weights[name])


def _under(prefix: str, held: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in held.items() if name.startswith(prefix)}
