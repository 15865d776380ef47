"""BatchNorm handled right in Lightning's Trainer, by one callback.

What Lightning does, and what follows (lightning 2.5 and 2.6):

- `BackboneFinetuning` and `BaseFinetuning.freeze` leave BN training inside a frozen backbone (`train_bn=True`), or set
  `track_running_stats=False`: then training normalises by the batch and evaluation by the stored statistics. Both
  unfreeze BN with the rest, and its statistics whatever `train_bn` says. A policy stands above either.
- `WeightAveraging` puts the averaged weights into the module in `on_validation_epoch_start`: their statistics must be
  computed after that, so this callback comes after it in the list.
- `StochasticWeightAveraging` resets the statistics of every BN layer in an epoch of its own, frozen ones too.
- A validation before training (`num_sanity_val_steps`) and `trainer.validate` alone judge the network as it came.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any
from weakref import ReferenceType, ref

import torch
from lightning.pytorch import callbacks
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn

from bnfinetune.bn.layers import find_bn_layers
from bnfinetune.bn.policy.apply import apply_policy
from bnfinetune.bn.policy.saving import load_policy_state, policy_state
from bnfinetune.bn.policy.spec import BNPolicy
from bnfinetune.bn.statistics.batches import Forward, model_input
from bnfinetune.bn.statistics.precise import is_frozen
from bnfinetune.bn.statistics.report import PreciseBNReport
from bnfinetune.errors import PolicyError, SelectionError
from bnfinetune.integrations.precise_pass import PrecisePass

_STATE_KEY = "bnfinetune"
_AVERAGING = tuple(
    getattr(callbacks, name) for name in ("WeightAveraging", "StochasticWeightAveraging") if hasattr(callbacks, name)
)


class BNCallback(callbacks.Callback):
    """Keeps BN layers under a policy, and gives validations population statistics.

    The policy is applied before the module is wrapped and its optimizers are made, and is in force again after
    `fit(ckpt_path=...)`; checkpoints carry what it holds beside the `state_dict`. The network must be there when the
    module's `__init__` is over.

    Statistics computed before a validation stay: the checkpoint that is saved after it has them, and training goes on
    from them.

    Args:
        policy: one or several, as for `apply_policy`; None leaves the layers as they are.
        precise_at: `eval`, `precise_bn` before each validation in `fit` but the sanity check; `end`, once after
            training.
        data: batches for `precise_bn`; by default the training images, in an order of its own. They go through the
            module's batch transfer hooks and the trainer's precision. No generator of the training moves.
        num_samples: images to read of the training set, over all ranks, at most. All of `data` is read.
        batch_size: of these images, per process; by default that of training. Of about 100 on, statistics of deep
            layers are good.
        forward: called as `forward(module, batch)` in the pass; by default `module(images)`.
        **precise_options: of `precise_bn`, such as `variance`, `prior`, `layers` or `include_frozen`.

    Attributes:
        report: what the last pass did; None before the first.

    Example:
        >>> frozen = bnf.BNPolicy(train_stats="running", update_stats="none", affine="frozen")
        >>> Trainer(callbacks=[EMAWeightAveraging(), BNCallback(frozen)])

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
        forward: Forward | None = None,
        **precise_options: Any,
    ) -> None:
        self._policy = policy
        self._pass = PrecisePass(precise_at, data, num_samples, batch_size, None, precise_options)
        self._forward = forward
        self._module: ReferenceType[nn.Module] | None = None
        self.report: PreciseBNReport | None = None

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if stage == "fit":
            self._require_order(trainer)
        if self._module is None or self._module() is not pl_module:
            _require_no_rival(trainer, self._policy)
            for network in (pl_module, *_averages(trainer)):
                self._put_under_policy(pl_module, network)
            self._module = ref(pl_module)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        _require_no_reset(trainer, pl_module)
        self._pass.check(pl_module, trainer.train_dataloader)
        if self._pass.at is not None and self._forward is None and not is_overridden("forward", pl_module):
            raise PolicyError(
                f"{type(pl_module).__name__} has no forward of its own for precise_at={self._pass.at!r}; give "
                "forward=lambda module, batch: module.network(batch[0]), or write one"
            )

    def on_validation_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        if self._pass.at == "eval" and trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._compute(trainer, pl_module)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        if self._pass.at == "end":
            self._compute(trainer, pl_module)

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        checkpoint[_STATE_KEY] = policy_state(pl_module)

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        if _STATE_KEY in checkpoint:
            for network in (pl_module, *_averages(trainer)):
                load_policy_state(network, checkpoint[_STATE_KEY])

    def _put_under_policy(self, module: Any, network: nn.Module) -> None:
        if self._policy is None:
            return
        try:
            apply_policy(network, self._policy)
        except SelectionError as error:
            if not any(is_overridden(hook, module) for hook in ("setup", "configure_model")):
                raise
            raise PolicyError(
                f"BNCallback must see the network of {type(module).__name__} before its setup() and configure_model(), "
                f"and {error}; build it in __init__, or call bnf.apply_policy where it is built"
            ) from error

    def _require_order(self, trainer: Any) -> None:
        if self._pass.at is None:
            return
        place = trainer.callbacks.index(self)
        late = next((each for each in trainer.callbacks[place:] if isinstance(each, _AVERAGING)), None)
        if late is not None:
            raise PolicyError(
                f"BNCallback stands before {type(late).__name__}, so that its statistics would be of weights that are "
                "not evaluated; list it after"
            )

    def _compute(self, trainer: Any, module: Any) -> None:
        own = self._forward or (lambda network, batch: network(model_input(batch)))

        def forward(network: nn.Module, batch: Any) -> object:
            batch = trainer.precision_plugin.convert_input(trainer.strategy.batch_to_device(batch))
            with trainer.precision_plugin.forward_context():
                return own(network, batch)

        loader = trainer.train_dataloader
        with torch.inference_mode(False):  # validation runs in it, whose tensors training could not use
            self.report = self._pass.run(module, loader, _batch_size(loader), forward)


def _averages(trainer: Any) -> Iterator[nn.Module]:
    """Copies of the module that callbacks before this one have made, whose tensors must stay in step with it."""
    for callback in trainer.callbacks:
        copied = getattr(callback, "_average_model", None) if isinstance(callback, _AVERAGING) else None
        if copied is not None:
            yield copied


def _batch_size(loader: Any) -> int:
    of_batches = getattr(getattr(loader, "batch_sampler", None), "batch_size", 1)
    return int(getattr(loader, "batch_size", None) or of_batches)


def _require_no_rival(trainer: Any, policy: BNPolicy | Sequence[BNPolicy] | None) -> None:
    policies = [policy] if isinstance(policy, BNPolicy) else list(policy or ())
    unfreezes = any(
        isinstance(callback, callbacks.BackboneFinetuning) and callback.train_bn for callback in trainer.callbacks
    )
    if unfreezes and any(each.affine == "frozen" for each in policies):
        raise PolicyError(
            "BackboneFinetuning(train_bn=True) would train the weight and bias of BN layers that the policy freezes; "
            "give it train_bn=False"
        )


def _require_no_reset(trainer: Any, module: nn.Module) -> None:
    if not any(isinstance(callback, callbacks.StochasticWeightAveraging) for callback in trainer.callbacks):
        return
    frozen = next((name for name, layer in find_bn_layers(module).items() if is_frozen(layer)), None)
    if frozen is not None:
        raise PolicyError(
            "StochasticWeightAveraging sets all running statistics to 0 and 1 in its last epoch, and those of BN layer "
            f"{frozen!r} are frozen and would stay so; use WeightAveraging, or let statistics update"
        )
