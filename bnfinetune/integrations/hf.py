"""BatchNorm handled right in transformers' Trainer, by one callback.

What the Trainer does, and what follows (transformers 4.48 to 5.24):

- `training_step` calls `model.train()` before every step, so that `eval()` on BN layers holds for none. A policy does.
- No callback is called before an evaluation. Those at the end of a step or epoch learn whether one follows, by
  `control.should_evaluate`; callbacks that decide so must stand before this one in the list.
- A schedule-free optimizer is switched to the weights that are evaluated within the evaluation, too late for the
  statistics of these weights.
- Weight decay leaves out `nn.LayerNorm` by class and others by name (`norm`, `bias`), but not `bn1.weight`: give the
  Trainer an optimizer over `bnf.param_groups(model, weight_decay)`.
"""

from __future__ import annotations

import base64
import io
import logging
import warnings
import zlib
from collections.abc import Iterable, Sequence
from typing import Any
from weakref import ReferenceType, ref

import torch
from torch import nn
from transformers.trainer_callback import TrainerCallback

from bnfinetune.bn.policy.apply import apply_policy
from bnfinetune.bn.policy.saving import load_policy_state, policy_state
from bnfinetune.bn.policy.spec import BNPolicy
from bnfinetune.bn.policy.table import describe_bn
from bnfinetune.bn.statistics.batches import Forward
from bnfinetune.bn.statistics.report import PreciseBNReport
from bnfinetune.diagnose.checks import check_bn
from bnfinetune.diagnose.finding import Findings
from bnfinetune.diagnose.watch import watch_bn
from bnfinetune.errors import PolicyError
from bnfinetune.integrations.precise_pass import PrecisePass, in_evaluation_weights

_log = logging.getLogger(__name__)

WATCHED_STEPS = 10
_STATE_KEY = "bnfinetune"  # no callback's name: the Trainer would build that callback anew, of what JSON can hold


class BNCallback(TrainerCallback):
    """Keeps BN layers under a policy, gives evaluations population statistics, and lets the doctor look at the start.

    The policy is applied when the Trainer is built, so before the optimizer and DDP, and is in force again after
    `train(resume_from_checkpoint=...)`; what it holds beside the `state_dict` travels in `trainer_state.json`.

    Statistics computed before an evaluation stay: the checkpoint that is saved after it has them, and training goes on
    from them.

    Args:
        policy: one or several, as for `apply_policy`; None leaves the layers as they are.
        precise_at: `eval`, `precise_bn` before each evaluation in training (also the one of `eval_on_start`); `end`,
            once after training, on the best network where `load_best_model_at_end` has loaded it.
        data: batches for `precise_bn`; by default the training images, in an order of its own, through the training
            collator. No generator of the training moves.
        num_samples: images to read of the training set, over all ranks, at most. All of `data` is read.
        batch_size: of these images, per process; by default that of training. Of about 100 on, statistics of deep
            layers are good.
        doctor: run `check_bn` when training begins and `watch_bn` for the first ten steps, and warn of what they find.
        forward: called as `forward(model, batch)` in the pass; by default `model(**batch)`, as the Trainer does.
        **precise_options: of `precise_bn`, such as `variance`, `prior`, `layers` or `include_frozen`.

    Attributes:
        report: what the last pass did; None before the first.
        findings: the doctor's.

    Example:
        >>> frozen = bnf.BNPolicy(train_stats="running", update_stats="none", affine="frozen")
        >>> Trainer(model, arguments, callbacks=[BNCallback(frozen)], ...)

    Raises:
        PolicyError: an unknown moment, or options of a pass that never runs.
    """

    def __init__(
        self,
        policy: BNPolicy | Sequence[BNPolicy] | None = None,
        *,
        precise_at: str | None = None,
        data: Iterable[Any] | None = None,
        num_samples: int = 8192,
        batch_size: int | None = None,
        doctor: bool = True,
        forward: Forward | None = None,
        **precise_options: Any,
    ) -> None:
        self._policy = policy
        self._pass = PrecisePass(precise_at, data, num_samples, batch_size, forward, precise_options)
        self._doctor = doctor
        self._model: ReferenceType[nn.Module] | None = None
        self._watch: watch_bn | None = None
        self._steps = 0
        self.report: PreciseBNReport | None = None
        self.findings = Findings()

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._take(kwargs["model"])

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model = kwargs["model"]
        if self._model is None or self._model() is not model:
            self._require_bare()
            self._take(model)
        if state.global_step:
            self._resume(model, state)
        self._note_policy(state, model)
        self._pass.check(model, kwargs["train_dataloader"])
        if self._doctor:
            self._examine(model, args, state, kwargs)
        if args.eval_on_start and self._pass.at == "eval":
            self._compute(args, kwargs)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._steps += 1
        if self._steps == WATCHED_STEPS:
            self._end_watch()
        self._before_evaluation(args, state, control, kwargs)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._before_evaluation(args, state, control, kwargs)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._end_watch()
        if self._pass.at == "end":
            self._compute(args, kwargs)

    def _take(self, model: nn.Module) -> None:
        if self._policy is not None:
            apply_policy(model, self._policy)
        self._model = ref(model)

    def _require_bare(self) -> None:
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        if self._policy is not None and distributed and torch.distributed.get_world_size() > 1:
            raise PolicyError(
                "BNCallback has met the network after DDP has wrapped it, when ranks would diverge; give it to "
                "Trainer(callbacks=[...]) instead of add_callback, and a model instead of model_init"
            )

    def _resume(self, model: nn.Module, state: Any) -> None:
        """Puts the policies of a checkpoint in force; one that was saved without this callback holds none."""
        saved = state.stateful_callbacks.get(_STATE_KEY)
        if saved is None:
            return
        given = describe_bn(model)
        load_policy_state(model, _from_text(saved))
        if describe_bn(model) != given:
            warnings.warn(
                "the checkpoint was saved under another BN policy than BNCallback was given; the checkpoint's is in "
                "force (change it after training has begun, or begin anew from the weights)",
                stacklevel=2,
            )

    def _examine(self, model: nn.Module, args: Any, state: Any, kwargs: dict[str, Any]) -> None:
        self._end_watch()
        self._steps = 0
        self.findings = check_bn(
            model,
            kwargs["optimizer"],
            kwargs["train_dataloader"],
            grad_accum=args.gradient_accumulation_steps,
            steps=state.max_steps,
            batch_size=args.per_device_train_batch_size,
        )
        _tell(self.findings)
        if not args.torch_compile:  # hooks would be compiled, and compiled again without them
            self._watch = watch_bn(model, kwargs["optimizer"]).__enter__()

    def _end_watch(self) -> None:
        watch, self._watch = self._watch, None
        if watch is not None:
            watch.__exit__(None, None, None)
            new = Findings([found for found in watch.findings if found not in self.findings], watch.findings.unjudged)
            self.findings = self.findings.joined(new)
            _tell(new)

    def _before_evaluation(self, args: Any, state: Any, control: Any, kwargs: dict[str, Any]) -> None:
        if self._pass.at == "eval" and control.should_evaluate:
            self._compute(args, kwargs)
        if control.should_save or control.should_evaluate:  # the best is saved after its evaluation
            self._note_policy(state, kwargs["model"])

    @staticmethod
    def _note_policy(state: Any, model: nn.Module) -> None:
        """Hands the policies to the next checkpoint, whose `trainer_state.json` holds the Trainer's state."""
        state.stateful_callbacks[_STATE_KEY] = _as_text(policy_state(model))

    def _compute(self, args: Any, kwargs: dict[str, Any]) -> None:
        in_evaluation_weights(kwargs["optimizer"])
        self.report = self._pass.run(
            kwargs["model"], kwargs["train_dataloader"], args.per_device_train_batch_size, _as_the_trainer
        )
        _log.info("BN statistics of %s images in %.1f s", self.report.samples, self.report.seconds)


def _as_the_trainer(model: nn.Module, batch: Any) -> object:
    return model(**batch)


def _tell(findings: Findings) -> None:
    for found in findings:
        if found.severity != "info":
            warnings.warn(f"{found}; {found.fix}", stacklevel=2)


def _as_text(state: dict[str, Any]) -> str:
    file = io.BytesIO()
    torch.save(state, file)
    return base64.b64encode(zlib.compress(file.getvalue())).decode()


def _from_text(text: str) -> dict[str, Any]:
    loaded: dict[str, Any] = torch.load(
        io.BytesIO(zlib.decompress(base64.b64decode(text))), map_location="cpu", weights_only=True
    )
    return loaded
