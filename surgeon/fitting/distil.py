"""Training a converted network against its original: its outputs and its stages, without labels.

`compare` has the loss. Adam makes it smaller, with a rate for every tensor that is a share of the size of its numbers,
√mean(w²); the rates rise for a tenth of the steps and fall to zero along a cosine, and gradients are cut to a length.
Both networks are in eval mode, so dropout is off; only the batch norms of the converted network are in train mode, so
that their statistics follow: not those that are frozen, not in small batches, and none if the statistics of a batch
are so unlike the stored ones that the loss at the start is several times as large with them. Some images are held
back, and the weights with the smallest loss on them, in eval mode, are kept: those of the start, if training made none
better.

What a step draws is drawn from its number, so a run that was interrupted goes on as if it had not been. A copy is
trained, and its numbers are put into the network at the end, so that an error leaves the network as it was.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from torch import distributed as dist

from surgeon._torch_compat import BatchNorm
from surgeon.errors import FitError, SurgeonError
from surgeon.fitting import stages
from surgeon.fitting.augment import Augmentation
from surgeon.fitting.compare import Compared
from surgeon.fitting.data import Batch, Data
from surgeon.fitting.identity import network_hash
from surgeon.fitting.resume import State
from surgeon.models import devices
from surgeon.models.copies import in_mode, shadow, where
from surgeon.models.progress import Progress, silent
from surgeon.models.sandbox import ordinary, quietly

Reduce = Callable[[list[Tensor]], None]  # adds tensors up over all processes, in place

RATE = 0.04  # of the size of a tensor's numbers; docs/decisions.md has the measurements that these come from
LONGEST = 1.0  # of the gradient
_RISES = 0.1  # of the steps
_CHECKS = 20  # how often the images held back are looked at
_ENOUGH = 16  # images whose statistics a batch norm may be trained with
_UNLIKE = 3.0  # times the loss, from which on the statistics of a batch are not those that are stored
_PATIENCE = 15  # checks without a smaller loss, after which training stops: at the highest rates the loss is larger


@dataclass(frozen=True, slots=True)
class Distilled:
    """What training did: steps, the loss on the images held back, and from which step the weights are."""

    steps: int  # that were run
    best: int  # the step after which the loss was smallest; 0 is the start
    before: float  # loss on the images held back
    after: float
    images: int  # that it was trained with
    held_back: int
    stages: tuple[str, ...]  # the modules whose outputs were compared
    rate: float
    augmentation: str
    norms_follow: bool  # the statistics of batch norms were trained as well
    is_early: bool  # it stopped before all steps that were asked for

    def __str__(self) -> str:
        kept = f"the weights after step {self.best} are kept" if self.best else "the network is as it was"
        norms = "" if self.norms_follow else ", norms keep their statistics"
        early = ", stopped early" * self.is_early
        how = f"{self.steps} steps{early} ({self.augmentation}{norms})"
        loss = f"loss on {self.held_back} images held back {self.before:.3g} → {self.after:.3g}"
        return f"distilled for {how}: {loss}; {kept}"


def distil_(
    converted: nn.Module,
    original: nn.Module,
    data: Data,
    *,
    steps: int,
    seed: int = 0,
    rate: float | None = None,
    augmentation: Augmentation | None = None,
    all_reduce: Reduce | None = None,
    checkpoint: Path | None = None,
    progress: Progress = silent,
) -> Distilled:
    """Train `converted` for some steps, one batch each, so that it does what `original` does, without labels.

    With `all_reduce` every process gives its share of the data, and a checkpoint of its own. The checkpoint stays,
    finished, until the caller removes it.

    Raises:
        FitError: the networks do not run on the data, or cannot be trained; `converted` is as it was.
        StoreError: the checkpoint cannot be written, or is of another run.
    """
    rate = RATE if rate is None else rate
    changes = augmentation or Augmentation(0, mirror=False)
    _check(steps, rate)
    with ordinary():
        rest, held = _divided(data, seed)
        student, teacher = (in_mode(shadow(model, _trainable), False) for model in (converted, original))
        if (place := devices.of(student)) is not None:
            teacher = devices.moved(teacher, place)
        what = f"{network_hash(student)} {network_hash(teacher)} {data.digest} {steps} {seed} {rate} {changes}"
        state = State(student, _parameters(student), rate, hashlib.sha256(what.encode()).hexdigest())
        run = _Run(student, teacher, rest, held, steps, seed, rate, changes, all_reduce)
        made = run.train(state, checkpoint, progress)
        if made.best:
            _put_back_(converted, student)
    return made


@dataclass(slots=True)
class _Run:
    """One training: the two copies, the data, and what is fixed for all of its steps."""

    student: nn.Module
    teacher: nn.Module
    rest: Data
    held: Data
    steps: int
    seed: int
    rate: float
    augmentation: Augmentation
    all_reduce: Reduce | None
    norms: list[nn.Module] = field(default_factory=list)  # that are in train mode during a step

    def train(self, state: State, checkpoint: Path | None, progress: Progress) -> Distilled:
        """Run all steps that are left; the student ends up with the best weights."""
        first = next(iter(self.rest), None)
        assert first is not None
        with self._errors("run"), quietly(self.seed):
            found = stages.find(self.student, self.teacher, first.inputs)
        every = -(-self.steps // _CHECKS)
        with Compared(self.student, self.teacher, found) as compared:
            self.norms = self._norms_that_follow(compared, first)
            state.resume_(checkpoint, self._sum)
            batches = _endless(self.rest, state.step)
            if not state.losses:
                self._check(state, compared)
            while state.step < self.steps and state.since_best < _PATIENCE:
                loss = self._step(state, compared, next(batches))
                if state.step % every == 0 or state.step == self.steps:
                    self._check(state, compared)
                    state.save(checkpoint)
                progress(f"distilling, step {state.step} of {self.steps}, loss {loss:.3g}", state.step / self.steps)
        state.use_best_()
        return Distilled(
            steps=state.step,
            best=state.best,
            before=state.losses[0],
            after=min(state.losses),
            images=self.rest.images,
            held_back=self.held.images,
            stages=tuple(stage.path for stage in found),
            rate=self.rate,
            augmentation=self.augmentation.in_words(first.inputs),
            norms_follow=bool(self.norms),
            is_early=state.step < self.steps,
        )

    def _step(self, state: State, compared: Compared, batch: Batch) -> float:
        """Train with one batch, whose images are changed at random; all processes take the same step."""
        generator = torch.Generator().manual_seed(_drawn(self.seed, state.step))
        state.set_rate(_schedule(state.step, self.steps))
        with self._errors("be trained"), quietly(_drawn(self.seed, state.step)), torch.enable_grad():
            with self._norms_training(batch.count):
                loss = compared.loss(self.augmentation(batch.inputs, generator)) * batch.count
            value = self._summed(loss.detach(), batch.count)
            if not math.isfinite(value):
                raise _diverged(state.step + 1, self.rate)
            state.optimizer.zero_grad(set_to_none=True)
            if not loss.requires_grad:
                raise _nothing_to_compare()
            loss.backward()  # type: ignore[no-untyped-call]
            self._share_gradients(state.parameters, batch.count)
            nn.utils.clip_grad_norm_(state.parameters, LONGEST)
            state.optimizer.step()
        state.step += 1
        return value

    def _norms_that_follow(self, compared: Compared, first: Batch) -> list[nn.Module]:
        """Say which norms can be in train mode: all or none, by what the statistics of a batch do to the loss."""
        self.norms = [norm for norm in self.student.modules() if _is_trained(norm)]
        buffers = [(buffer, buffer.clone()) for buffer in self.student.buffers()]
        with self._errors("run"), quietly(self.seed):
            stored = self._summed(compared.loss(first.inputs) * first.count, first.count)
            with self._norms_training(first.count):
                by_batch = self._summed(compared.loss(first.inputs) * first.count, first.count)
            for buffer, before in buffers:
                buffer.copy_(before)
        return self.norms if by_batch <= _UNLIKE * stored else []

    @contextlib.contextmanager
    def _norms_training(self, images: int) -> Iterator[None]:
        """Let batch norms normalise by the batch, if it is large enough, and nothing else be in train mode."""
        for norm in self.norms:
            norm.training = images >= _ENOUGH
        try:
            yield
        finally:
            for norm in self.norms:
                norm.training = False

    def _share_gradients(self, parameters: list[nn.Parameter], count: int) -> None:
        """Make of the gradients of a sum those of the mean over all images of all processes."""
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        total = torch.tensor(float(count), dtype=torch.float64, device=gradients[0].device)
        self._sum([*gradients, total])
        for gradient in gradients:
            gradient.div_(total.item())

    def _check(self, state: State, compared: Compared) -> None:
        """Measure the loss on the images held back, and keep the weights if it is the smallest so far."""
        self._share_statistics()
        total, count = torch.zeros((), dtype=torch.float64), 0
        with self._errors("run"), quietly(self.seed):
            for batch in self.held:
                total += compared.loss(batch.inputs).double().cpu() * batch.count
                count += batch.count
        value = self._summed(total, count)
        if not math.isfinite(value):
            raise _diverged(state.step, self.rate)
        state.note(value)

    def _share_statistics(self) -> None:
        """Give the norms of all processes the mean of their statistics, and of how many batches they have seen."""
        buffers = [buffer for norm in self.norms for buffer in norm.buffers(recurse=False)]
        if self.all_reduce is None or not buffers:
            return
        sums = [torch.ones((), dtype=torch.float64, device=buffers[0].device), *(one.double() for one in buffers)]
        self.all_reduce(sums)
        for buffer, total in zip(buffers, sums[1:], strict=True):
            buffer.copy_(total / sums[0])

    def _summed(self, total: Tensor, count: int) -> float:
        """Give the mean of a sum over the images of all processes."""
        both = torch.stack([total.double().cpu(), torch.tensor(float(count), dtype=torch.float64)])
        both = both.to(devices.of(self.student) or devices.CPU)
        self._sum([both])
        return float(both[0] / both[1])

    def _sum(self, tensors: list[Tensor]) -> None:
        if self.all_reduce is not None:
            self.all_reduce(tensors)

    @contextlib.contextmanager
    def _errors(self, what: str) -> Iterator[None]:
        """Say in one line what a network raised; the copy is lost, the network is as it was."""
        try:
            yield
        except SurgeonError:
            raise
        except torch.OutOfMemoryError as error:
            raise FitError("training needs more memory than there is", todo="Give a smaller --batch.") from error
        except Exception as error:
            raise FitError(
                f"the network cannot {what} with the images of {self.rest.source}: {where(error)}",
                todo="Leave --distil out, or give images that it takes, in a batch that fits into memory.",
            ) from error


def _check(steps: int, rate: float) -> None:
    if steps < 1:
        raise FitError(f"{steps} steps of training are asked for", todo="Give 1 or more; 200 is usual.")
    if not (math.isfinite(rate) and rate > 0):
        raise FitError(f"{rate:g} is not a learning rate", todo=f"Give a number above 0; {RATE:g} is the default.")


def _divided(data: Data, seed: int) -> tuple[Data, Data]:
    """Hold back a tenth of the images, at least one."""
    if data.images >= 2:
        rest, held = data.held_back(max(1, data.images // 10), seed)
        if rest.images and held.images:
            return rest, held
    raise FitError(
        f"{data.source} has {data.images} image{'s' * (data.images != 1)}, too few to train with and to hold some back",
        todo="Give some hundred images, in more than one batch, or leave --distil out.",
    )


def _endless(data: Data, start: int) -> Iterator[Batch]:
    """Give the batches over and over, from the one that a step begins with."""
    yield from data.batches(start % len(data))
    while True:
        yield from data


def _trainable(tensor: Tensor) -> Tensor:
    """Copy a tensor; half types do not hold the small steps of training, so their copy is float32."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor.clone()


def _parameters(model: nn.Module) -> list[nn.Parameter]:
    """Give what is trained: not what the user has frozen, unless that is everything, as in a network that only runs."""
    floating = [parameter for parameter in model.parameters() if parameter.is_floating_point()]
    free = [parameter for parameter in floating if parameter.requires_grad] or floating
    if not free:
        raise FitError("the network has no parameters to train", todo="Leave --distil out.")
    for parameter in free:
        parameter.requires_grad_(True)
    return free


def _is_trained(module: nn.Module) -> bool:
    """Whether a module is a batch norm that follows the batch: not one that is frozen, or whose processes must meet."""
    if not isinstance(module, BatchNorm) or module.running_mean is None:
        return False
    is_alone = isinstance(module, nn.SyncBatchNorm) and not (module.running_mean.is_cuda and dist.is_initialized())
    own = [*module.parameters(recurse=False)]
    return not is_alone and (not own or any(parameter.requires_grad for parameter in own))


def _put_back_(model: nn.Module, trained: nn.Module) -> None:
    """Give a network the numbers of its trained copy, rounded to its own dtypes."""
    pairs = zip((*model.parameters(), *model.buffers()), (*trained.parameters(), *trained.buffers()), strict=True)
    for own, new in pairs:
        with torch.inference_mode(own.is_inference()), torch.no_grad():  # the first may switch gradients on
            own.copy_(new)


def _schedule(step: int, steps: int) -> float:
    """Give the share of the highest rate at a step.

    >>> [round(_schedule(step, 100), 2) for step in (0, 9, 50, 99)]
    [0.1, 0.98, 0.5, 0.0]
    """
    return min(1.0, (step + 1) / (_RISES * steps)) * 0.5 * (1 + math.cos(math.pi * step / steps))


def _drawn(seed: int, step: int) -> int:
    """Give every step a seed of its own."""
    return int.from_bytes(hashlib.sha256(f"{seed} {step}".encode()).digest()[:7])


def _nothing_to_compare() -> FitError:
    return FitError(
        "the networks have no output and no feature map in common that training could bring nearer",
        todo="Leave --distil out.",
    )


def _diverged(step: int, rate: float) -> FitError:
    return FitError(
        f"the loss is not a number at step {step} of training; the network is as it was before",
        todo=f"Look for NaN in the images and weights, or give a smaller rate than {rate:g}.",
    )
