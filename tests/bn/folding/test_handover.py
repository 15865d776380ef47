"""Whatever comes between a folded conv and its BN layer, both compute what they do unfolded, or say that they cannot.

The tables grow by one line per report: what third-party code does to a frozen model, and to a twin that is folded too.
"""

import copy
import threading
import types
import weakref
from collections.abc import Callable

import pytest
import timm
import torch
import torch.nn.functional as F
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module
from timm.layers import BatchNormAct2d, convert_sync_batchnorm, freeze_batch_norm_2d
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.utils import fusion, parametrizations, parametrize, prune, weight_norm
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

from bnfinetune.bn import freeze_bn
from bnfinetune.bn.folding.fold import fold_bn, fold_report, unfold_bn
from bnfinetune.bn.folding.layers import FoldedBN, FoldedConv
from bnfinetune.errors import LayerError
from tests.bn.distributed import run_ranks
from tests.bn.folding.outcomes import outcome, relative_error
from tests.bn.models import randomise

NORMS = pytest.mark.parametrize("norm", [nn.BatchNorm2d, BatchNormAct2d])


def images(n: int = 3, size: int = 9) -> torch.Tensor:
    generator = torch.Generator().manual_seed(n + size)
    return torch.randn(n, 4, size, size, generator=generator, dtype=torch.float64)


class Between(nn.Module):
    """Two pairs with a step between the layers of the first, which may be anything."""

    def __init__(self, norm: type[nn.Module], step: Callable = lambda m, y: y) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 6, 3, stride=2, padding=1), norm(6)
        self.conv2, self.bn2 = nn.Conv2d(6, 4, 3, padding=1), norm(4)
        self.drop, self.aux = nn.Dropout2d(0.5), nn.Conv2d(6, 4, 1)
        self.step = step

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.bn2(self.conv2(self.bn(self.step(self, self.conv(x)))))


class Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return -grad


def twins(norm: type[nn.Module], step: Callable = lambda m, y: y) -> tuple[nn.Module, nn.Module]:
    """A frozen model and its folded copy."""
    torch.manual_seed(0)
    plain = freeze_bn(randomise(Between(norm, step)).double(), affine=False)
    return plain, fold_bn(copy.deepcopy(plain), images(1))


def assert_alike(plain: nn.Module, folded: nn.Module, x: torch.Tensor, modes=(True, False)) -> None:
    for mode in modes:
        found = []
        for model in (plain, folded):
            torch.manual_seed(1)
            found.append(outcome(model.train(mode), x))
        assert relative_error(found[1], found[0]) < 1e-10


STEPS = {
    "dropout": lambda m, y: m.drop(y),
    "functional dropout": lambda m, y: F.dropout(y, 0.3, m.training),
    "noise": lambda m, y: y + torch.randn_like(y) if m.training else y,
    "in place": lambda m, y: y.mul_(2) if m.training else y,
    "a sum": lambda m, y: y.__iadd__(1),
    "padding of odd maps": lambda m, y: F.pad(y, (0, 1, 0, 1)) if y.shape[-1] % 2 else y,
    "a cut to even maps": lambda m, y: y[..., : y.size(-1) // 2 * 2],
    "channels last": lambda m, y: y.to(memory_format=torch.channels_last),
    "contiguous": lambda m, y: y.contiguous(),
    "a list": lambda m, y: torch.stack([y, y])[0],
    "a nest of tensors": lambda m, y: pad_sequence([y, y])[:, 0],
    "its numbers": lambda m, y: y * (1 + float(y.detach().mean())),
    "an attribute": lambda m, y: y * len(y),
    "half the gradient": lambda m, y: y.detach() + y / 2,
    "an autograd function in training": lambda m, y: Reversed.apply(y.relu()) if m.training else y,
    "checkpointed step": lambda m, y: checkpoint(torch.tanh, y, use_reentrant=False),
    "reentrant checkpointed step": lambda m, y: checkpoint(torch.tanh, y, use_reentrant=True),
    "a hook on the tensor": lambda m, y: (y.register_hook(lambda g: g * 2), y)[1] if torch.is_grad_enabled() else y,
    "mixed precision off": lambda m, y: y.float().double(),
    "written into another": lambda m, y: torch.zeros_like(y).copy_(y),
    "returned twice": lambda m, y: (y, y)[1],
}


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("size", [9, 10])
@NORMS
def test_what_comes_between_conv_and_bn_is_seen(norm, step, size):
    plain, folded = twins(norm, STEPS[step])
    assert_alike(plain, folded, images(size=size))


@pytest.mark.parametrize("step", STEPS)
@NORMS
def test_what_comes_between_only_after_folding_is_seen(norm, step):
    plain, folded = twins(norm)
    assert fold_report(folded).folded == ["bn", "bn2"]
    plain.step = folded.step = STEPS[step]
    if step == "reentrant checkpointed step":
        with pytest.raises(LayerError, match=r"call unfold_bn\(model\)"):
            outcome(folded, images())
    else:
        assert_alike(plain, folded, images())


def auxiliary(m, x):
    y = m.conv(x)
    return m.aux(y) if m.training else m.bn(y)


def bypass(m, x):
    return m.conv2(m.conv(x)) if m.training else m.bn2(m.conv2(m.bn(m.conv(x))))


def crossed(m, x):
    return m.bn2(m.aux(m.bn(m.conv(x)))) + m.bn2(m.conv2(m.conv(x).tanh()))


@pytest.mark.parametrize("forward", [auxiliary, bypass, crossed])
@NORMS
def test_another_way_through_the_network_is_seen(norm, forward):
    plain, folded = twins(norm)
    for model in (plain, folded):
        model.forward = types.MethodType(forward, model)
    assert_alike(plain, folded, images())


class LowRank(nn.Module):
    """A wrapper as adapters put round layers."""

    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.base, self.down, self.up = conv, nn.Conv2d(4, 2, 3, 2, 1).double(), nn.Conv2d(2, 6, 1).double()

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


def wrapped(model):
    torch.manual_seed(5)
    model.conv = LowRank(model.conv)


def replaced_stem(model):
    torch.manual_seed(5)
    model.conv = nn.Conv2d(4, 6, 3, 2, 1).double()


def pair_fused_by_torch(model):
    model.eval()
    model.conv, model.bn = fusion.fuse_conv_bn_eval(model.conv, model.bn), getattr(model.bn, "act", nn.Identity())


def pruned(model):
    prune.l1_unstructured(model.conv, "weight", 0.5)


def normed(model):
    weight_norm(model.conv)


def offloaded(model):
    add_hook_to_module(model.conv, AlignDevicesHook(execution_device="cpu", offload=True, weights_map=None))


def hooked(model):
    add_hook_to_module(model.conv, AlignDevicesHook(execution_device="cpu"))
    add_hook_to_module(model.bn, AlignDevicesHook(execution_device="cpu"))


def unhooked(model):
    hooked(model)
    remove_hook_from_module(model, recurse=True)


class Halved(nn.Module):
    def forward(self, weight):
        return weight / 2


THIRD_PARTIES = {
    "adapter round the conv": wrapped,
    "another stem": replaced_stem,
    "torch fuses the pair": pair_fused_by_torch,
    "pruning": pruned,
    "weight_norm": normed,
    "weight_norm as a parametrisation": lambda m: parametrizations.weight_norm(m.conv),
    "parametrised weight": lambda m: parametrize.register_parametrization(m.conv, "weight", Halved()),
    "parametrised affine": lambda m: parametrize.register_parametrization(m.bn, "weight", Halved()),
    "accelerate's hooks": hooked,
    "accelerate's hooks, taken off": unhooked,
    "timm freezes": lambda m: setattr(m, "bn", freeze_batch_norm_2d(m.bn)),
    "data multiplied": lambda m: m.conv.weight.data.mul_(2),
    "statistics multiplied": lambda m: m.bn.running_var.data.mul_(2),
    "half of it in float32": lambda m: m.conv.register_forward_hook(lambda m, x, y: y.float().double()),
    "to another dtype and back": lambda m: m.float().double(),
}


@pytest.mark.parametrize("name", THIRD_PARTIES)
@pytest.mark.parametrize("before", [True, False], ids=["before folding", "after folding"])
@NORMS
def test_third_parties_change_what_they_would_change_unfolded(norm, name, before):
    torch.manual_seed(0)
    plain = freeze_bn(randomise(Between(norm)).double(), affine=False)
    folded = copy.deepcopy(plain)
    for model in (plain, folded):
        if not before and model is folded:
            fold_bn(model, images(1))
        THIRD_PARTIES[name](model)
    if before:
        fold_bn(folded, images(1))
    assert_alike(plain, folded, images())
    unfold_bn(folded)
    assert_alike(plain, folded, images())
    assert not any(isinstance(module, FoldedBN | FoldedConv) for module in folded.modules())


@pytest.mark.parametrize("convert", [nn.SyncBatchNorm.convert_sync_batchnorm, convert_sync_batchnorm])
@NORMS
def test_converters_of_bn_layers_leave_convs_that_compute_their_own_output(norm, convert):
    plain, folded = twins(norm)
    plain, folded = convert(plain).eval(), convert(folded).eval()
    assert_alike(plain, folded, images(), modes=(False,))
    unfold_bn(folded)
    assert [type(m) for m in folded.modules()] == [type(m) for m in plain.modules()]


@NORMS
def test_unfolding_begins_with_the_convs(norm):
    plain, folded = twins(norm)
    for model in (plain, folded):
        for name in ("bn", "bn2"):
            setattr(model, name, nn.Identity())
    unfold_bn(folded)
    assert type(folded.conv) is nn.Conv2d
    assert_alike(plain, folded, images())


@NORMS
def test_slices_and_convs_of_other_models_compute_their_own_output(norm):
    torch.manual_seed(0)
    plain = freeze_bn(randomise(nn.Sequential(nn.Conv2d(4, 6, 3), norm(6), nn.Conv2d(6, 4, 3), norm(4))).double())
    folded = fold_bn(copy.deepcopy(plain), images(1))
    other = [nn.Sequential(model[0], nn.BatchNorm2d(6).double()) for model in (plain, folded)]
    for a, b in [(plain[:1], folded[:1]), (plain[:3], folded[:3]), (plain[2:], None), tuple(other)]:
        b = folded[2:] if b is None else b
        x = images() if a is not plain[2:] and a[0] is plain[0] else torch.randn(2, 6, 7, 7, dtype=torch.float64)
        torch.testing.assert_close(b(x), a(x), rtol=1e-10, atol=1e-10)


def watched(model: nn.Module, add: Callable[[nn.Module, dict], None]) -> dict:
    seen: dict = {}
    add(model, seen)
    x = images().requires_grad_()
    F.relu_(model(x) * 1).square().sum().backward()
    return {key: [t.detach().clone() for t in value if t is not None] for key, value in seen.items()}


def keep(seen: dict, key: str) -> Callable:
    return lambda module, *values: seen.update({key: [v[0] if isinstance(v, tuple) else v for v in values]})


def grad_of_output(model, seen):
    """As Grad-CAM keeps activations and their gradients."""

    def forward(module, args, output):
        seen["activation"] = [output]
        output.register_hook(lambda grad: seen.update(gradient=[grad]))

    model.conv.register_forward_hook(forward)


def grad_of_a_kept_input(model, seen):
    def enter(module, args):
        args[0].retain_grad()
        seen["kept"] = [args[0]]

    model.bn.register_forward_pre_hook(enter)


HOOKS = {
    "forward of conv": lambda m, s: m.conv.register_forward_hook(keep(s, "out")) and None,
    "forward of bn": lambda m, s: m.bn.register_forward_hook(keep(s, "out")) and None,
    "into bn": lambda m, s: m.bn.register_forward_pre_hook(lambda mod, args: s.update(x=list(args))) and None,
    "into conv": lambda m, s: m.conv.register_forward_pre_hook(lambda mod, args: s.update(x=list(args))) and None,
    "full backward of conv": lambda m, s: m.conv.register_full_backward_hook(keep(s, "grads")) and None,
    "full backward of bn": lambda m, s: m.bn.register_full_backward_hook(keep(s, "grads")) and None,
    "full backward pre of conv": lambda m, s: m.conv.register_full_backward_pre_hook(keep(s, "grads")) and None,
    "full backward pre of bn": lambda m, s: m.bn.register_full_backward_pre_hook(keep(s, "grads")) and None,
    "Grad-CAM": grad_of_output,
    "gradient of what bn gets": grad_of_a_kept_input,
}


@pytest.mark.parametrize("name", HOOKS)
@pytest.mark.parametrize("before", [True, False], ids=["before folding", "after folding"])
@NORMS
def test_hooks_see_what_they_see_unfolded(norm, name, before):
    torch.manual_seed(0)
    plain = freeze_bn(randomise(Between(norm)).double(), affine=False)
    folded = copy.deepcopy(plain)
    wanted = watched(plain, HOOKS[name])
    if before:
        HOOKS[name](folded, {})
    fold_bn(folded, images(1))
    found = watched(folded, HOOKS[name])
    assert wanted
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


@NORMS
def test_a_full_backward_hook_round_the_conv_sees_its_output(norm):
    found = []
    for model in twins(norm):
        model.conv = nn.Sequential(model.conv)
        seen = watched(model, lambda m, s: m.conv.register_full_backward_hook(keep(s, "grads")) and None)
        found.append(seen)
    torch.testing.assert_close(found[1], found[0], rtol=1e-10, atol=1e-10)


@NORMS
def test_an_output_kept_by_somebody_is_the_convs_own_or_an_error(norm):
    for change, error in ((False, False), (True, True)):
        plain, folded = twins(norm)
        kept: list = []
        folded.step = lambda m, y, kept=kept: kept.append(y) or y
        folded(images()).sum().backward()
        if change:
            torch.optim.SGD(folded.parameters(), 0.1).step()
        if error:
            with pytest.raises(LayerError, match=r"read after its input or weight has changed in place.*unfold_bn"):
                kept[0].sum()
        else:
            torch.testing.assert_close(kept[0], plain.conv(images()), rtol=1e-10, atol=1e-10)


@NORMS
def test_an_input_changed_between_conv_and_bn_is_an_error(norm):
    _, folded = twins(norm)

    def forward(self, x):
        y = self.conv(x)
        x.add_(1)
        return self.bn(y)

    folded.forward = types.MethodType(forward, folded)
    with pytest.raises(LayerError, match="unfold_bn"):
        folded(images())


@NORMS
def test_a_function_that_reads_the_promise_behind_pytorch_is_an_error(norm):
    _, folded = twins(norm)
    folded.step = lambda m, y: Reversed.apply(y)
    with pytest.raises(LayerError, match=r"unfold_bn\(model\)"):
        folded(images()).sum().backward()


@NORMS
def test_settings_of_the_conv_are_kept(norm):
    plain, folded = twins(norm)
    for model in (plain, folded):

        def forward(self, x):
            with torch.no_grad():
                y = self.conv(x)
            return self.bn(y) * x.mean()

        model.forward = types.MethodType(forward, model)
    assert_alike(plain, folded, images())
    for model in (plain, folded):

        def forward(self, x):
            with torch.autocast("cpu", torch.bfloat16):
                y = self.conv(x)
            return self.bn(y.float())

        model.float().forward = types.MethodType(forward, model)
    torch.testing.assert_close(folded(images().float()), plain(images().float()), rtol=1e-5, atol=1e-5)


@NORMS
def test_weak_references_to_an_output_do_not_part_from_it(norm):
    plain, folded = twins(norm)
    held: list = []
    folded.step = lambda m, y: held.append(weakref.ref(y)) or y * 1
    assert_alike(plain, folded, images())


@NORMS
def test_threads_do_not_disturb_each_other(norm):
    plain, folded = twins(norm)
    wanted = plain(images()).detach()
    faults: list = []
    stop = threading.Event()

    def forward():
        torch.set_num_threads(1)
        while not stop.is_set():
            try:
                torch.testing.assert_close(folded(images()).detach(), wanted, rtol=1e-10, atol=1e-10)
            except Exception as error:
                faults.append(error)
                return

    threads = [threading.Thread(target=forward) for _ in range(2)]
    for thread in threads:
        thread.start()
    for _ in range(200):
        folded.eval()
        folded.train()
    stop.set()
    for thread in threads:
        thread.join()
    assert not faults


def replica(model: nn.Module, device: str) -> nn.Module:
    """What DataParallel makes of a model for one more device."""
    modules = list(model.modules())
    copies = {module: module._replicate_for_data_parallel() for module in modules}
    for module, twin in copies.items():
        for name, child in module._modules.items():
            setattr(twin, name, copies[child])
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            setattr(twin, name, None if tensor is None else tensor.detach().clone().to(device))
    return copies[model]


@NORMS
def test_replicas_compute_with_their_own_tensors(norm):
    plain, folded = twins(norm)
    assert replica(folded, "meta")(images().to("meta")).is_meta
    twin = replica(folded, "cpu")
    folded.conv.weight.data.zero_()
    torch.testing.assert_close(twin(images()), plain(images()), rtol=1e-10, atol=1e-10)


def sharded(rank: int, each: bool, first: str) -> float:
    """FSDP2 on one rank, as a single unit or a unit for each layer: how far the folded model is from the plain one."""
    torch.set_num_threads(1)
    plain, _ = twins(BatchNormAct2d)
    model = copy.deepcopy(plain)
    mesh = init_device_mesh("cpu", (1,))

    def shard() -> None:
        for child in (model.conv, model.bn, model.conv2) if each else ():
            fully_shard(child, mesh=mesh)
        fully_shard(model, mesh=mesh)

    steps = [shard, lambda: fold_bn(model, images(1))]
    for step in steps if first == "shard" else reversed(steps):
        step()
    wanted, found = outcome(plain, images()), outcome(model, images())
    whole = {key: value.full_tensor() if isinstance(value, DTensor) else value for key, value in found.items()}
    unfold_bn(model)
    assert {type(m).__name__ for m in (model.conv, model.conv2)} == {"FSDPConv2d" if each else "Conv2d"}
    return relative_error(whole, wanted)


@pytest.mark.parametrize("each", [True, False], ids=["each its own unit", "one unit"])
@pytest.mark.parametrize("first", ["shard", "fold"])
def test_sharded_models_compute_the_same(each, first, tmp_path):
    assert run_ranks(1, sharded, tmp_path, each, first)[0] < 1e-10


def test_a_traced_module_holds_the_unfolded_layers():
    model = freeze_bn(randomise(timm.create_model("test_resnet", num_classes=3)).eval())
    x = torch.randn(2, 3, 64, 64)
    wanted = model(x)
    traced = torch.jit.trace(fold_bn(model, x[:1]), x)
    torch.testing.assert_close(traced(x), wanted, rtol=1e-4, atol=1e-5)
