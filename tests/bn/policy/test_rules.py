"""Every rule against its paper's formula: outputs, gradients and running statistics."""

import math

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from bnfinetune.bn import BNPolicy, apply_policy
from bnfinetune.errors import StatisticsError
from tests.bn import oracles

CHANNELS = 5
SHAPES = {
    "1d": (nn.BatchNorm1d, (7, CHANNELS)),
    "1d_sequence": (nn.BatchNorm1d, (3, CHANNELS, 4)),
    "2d": (nn.BatchNorm2d, (7, CHANNELS, 3, 5)),
    "3d": (nn.BatchNorm3d, (3, CHANNELS, 2, 3, 2)),
}
TRAIN = {
    "batch": {},
    "running": {},
    "ghost": {"ghost_size": 3},
    "renorm": {"renorm_rmax": 1.4, "renorm_dmax": 0.3},
    "stochastic": {"stochastic_p": 0.5},
}
DOUBLE = {"rtol": 1e-10, "atol": 1e-12}


def make_layer(cls: type[nn.Module], seed: int = 0, **policy) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    layer = cls(CHANNELS, momentum=0.3, eps=1e-3).double()
    with torch.no_grad():
        for tensor in (layer.weight, layer.bias, layer.running_mean):
            tensor.copy_(torch.randn(CHANNELS, generator=generator, dtype=torch.double))
        layer.running_var.copy_(torch.rand(CHANNELS, generator=generator, dtype=torch.double) * 3 + 0.2)
    return apply_policy(layer, BNPolicy(**policy))


def make_input(shape, seed: int = 1) -> torch.Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.double) * 2 + 1
    return x.requires_grad_()


def expected(rule: str, layer: nn.Module, x: torch.Tensor, draw_seed: int = 7) -> oracles.Result:
    extra = {}
    if rule == "ghost":
        extra["sizes"] = {3: [3], 7: [3, 4] if x.ndim == 2 else [3, 3, 1]}[x.shape[0]]
    if rule == "renorm":
        extra = {"rmax": 1.4, "dmax": 0.3}
    if rule == "stochastic":
        torch.manual_seed(draw_seed)
        extra["by_batch"] = torch.rand(CHANNELS) < 0.5
    tensors = (layer.weight, layer.bias, layer.running_mean.clone(), layer.running_var.clone())
    return getattr(oracles, rule)(x, *tensors, eps=layer.eps, momentum=layer.momentum, **extra)


def gradients(output: torch.Tensor, layer: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(3), dtype=output.dtype)
    return list(torch.autograd.grad((output * weights).sum(), (x, layer.weight, layer.bias)))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rule", TRAIN)
def test_training_follows_the_papers_formula(rule, shape):
    cls, size = SHAPES[shape]
    layer, x = make_layer(cls, train_stats=rule, **TRAIN[rule]), make_input(size)
    wanted = expected(rule, layer, x)
    torch.manual_seed(7)
    got = layer(x)
    torch.testing.assert_close(got, wanted.output, **DOUBLE)
    torch.testing.assert_close(gradients(got, layer, x), gradients(wanted.output, layer, x), **DOUBLE)
    torch.testing.assert_close(layer.running_mean, wanted.mean, **DOUBLE)
    torch.testing.assert_close(layer.running_var, wanted.var, **DOUBLE)
    assert layer.num_batches_tracked == 1


@pytest.mark.parametrize("rule", sorted({*TRAIN} - {"renorm"}))  # whose r and d carry no gradient by definition
def test_gradients_agree_with_finite_differences(rule):
    layer = make_layer(nn.BatchNorm2d, train_stats=rule, update_stats="none", **TRAIN[rule])

    def forward(x, weight, bias):
        torch.manual_seed(7)
        return torch.func.functional_call(layer, {"weight": weight, "bias": bias}, (x,))

    x = make_input((4, CHANNELS, 2, 3))
    assert torch.autograd.gradcheck(forward, (x, layer.weight, layer.bias), fast_mode=False)


@pytest.mark.parametrize("affine", ["trained", "frozen"])
@pytest.mark.parametrize("eval_stats", ["running", "batch", "mix"])
def test_evaluation_follows_the_papers_formula(eval_stats, affine):
    needed = {"mix_prior": 6.0} if eval_stats == "mix" else {}
    layer = make_layer(nn.BatchNorm2d, eval_stats=eval_stats, affine=affine, **needed).eval()
    x = make_input((7, CHANNELS, 3, 5))
    stats = (layer.running_mean.clone(), layer.running_var.clone())
    if eval_stats == "mix":
        wanted = oracles.mix(x, layer.weight, layer.bias, *stats, eps=layer.eps, prior=6.0)
    else:
        rule = getattr(oracles, eval_stats)
        wanted = rule(x, layer.weight, layer.bias, *stats, eps=layer.eps, momentum=0.1).output
    got = layer(x)
    torch.testing.assert_close(got, wanted, **DOUBLE)
    inputs = (x, layer.weight, layer.bias) if affine == "trained" else (x,)
    weights = torch.linspace(-1, 2, got.numel(), dtype=got.dtype).view_as(got)
    torch.testing.assert_close(
        torch.autograd.grad((got * weights).sum(), inputs),
        torch.autograd.grad((wanted * weights).sum(), inputs),
        **DOUBLE,
    )
    assert (layer.running_mean.equal(stats[0]), layer.running_var.equal(stats[1])) == (True, True)
    assert layer.num_batches_tracked == 0


@pytest.mark.parametrize(("prior", "same_as"), [(0.0, "batch"), (math.inf, "running")])
def test_mixing_reaches_its_two_ends(prior, same_as):
    x = make_input((6, CHANNELS, 3, 3))
    mixed = make_layer(nn.BatchNorm2d, eval_stats="mix", mix_prior=prior).eval()
    end = make_layer(nn.BatchNorm2d, eval_stats=same_as).eval()
    torch.testing.assert_close(mixed(x), end(x), **DOUBLE)


def test_unclipped_renorm_normalises_by_running_statistics():
    x = make_input((6, CHANNELS, 3, 3))
    free = make_layer(nn.BatchNorm2d, train_stats="renorm", renorm_rmax=math.inf, renorm_dmax=math.inf)
    torch.testing.assert_close(free(x), make_layer(nn.BatchNorm2d, train_stats="running")(x), **DOUBLE)


@pytest.mark.parametrize(
    ("policy", "same_as"),
    [
        ({"train_stats": "renorm", "renorm_rmax": 1.0, "renorm_dmax": 0.0}, {"train_stats": "batch"}),
        ({"train_stats": "stochastic", "stochastic_p": 1.0}, {"train_stats": "batch"}),
        ({"train_stats": "stochastic", "stochastic_p": 0.0}, {"train_stats": "running"}),
        ({"train_stats": "ghost", "ghost_size": 6}, {"train_stats": "batch"}),
        ({"train_stats": "sync"}, {"train_stats": "batch"}),
    ],
)
def test_limits_of_the_rules_meet(policy, same_as):
    x = make_input((6, CHANNELS, 3, 3))
    one, other = make_layer(nn.BatchNorm2d, **policy), make_layer(nn.BatchNorm2d, **same_as)
    a, b = one(x), other(x)
    torch.testing.assert_close(a, b, **DOUBLE)
    torch.testing.assert_close(gradients(a, one, x), gradients(b, other, x), **DOUBLE)
    torch.testing.assert_close(one.running_var, other.running_var, **DOUBLE)


def test_the_renorm_schedule_holds_plain_bn_and_then_opens():
    schedule = {"renorm_rmax": 3.0, "renorm_dmax": 5.0, "renorm_warmup": 2, "renorm_ramp": 4}
    layer = make_layer(nn.BatchNorm2d, train_stats="renorm", **schedule)
    for step in range(8):
        x = make_input((6, CHANNELS, 3, 3), seed=step)
        grown = min(max((step - 2) / 4, 0.0), 1.0)
        stats = (layer.running_mean.clone(), layer.running_var.clone())
        bounds = {"rmax": 1 + 2 * grown, "dmax": 5 * grown}
        wanted = oracles.renorm(x, layer.weight, layer.bias, *stats, eps=layer.eps, momentum=layer.momentum, **bounds)
        torch.testing.assert_close(layer(x), wanted.output, **DOUBLE)


@pytest.mark.parametrize("rule", TRAIN)
def test_cumulative_updates_average_all_batches(rule):
    layer = make_layer(nn.BatchNorm2d, train_stats=rule, update_stats="cumulative", **TRAIN[rule])
    means, variances = [], []
    for step in range(4):
        x = make_input((6, CHANNELS, 3, 3), seed=step).detach()
        layer(x)
        parts = [oracles.moments(part) for part in x.split(3 if rule == "ghost" else 6)]
        means.append(torch.stack([m for m, _, _ in parts]).mean(0))
        variances.append(torch.stack([v * n / (n - 1) for _, v, n in parts]).mean(0))
    torch.testing.assert_close(layer.running_mean, torch.stack(means).mean(0), **DOUBLE)
    torch.testing.assert_close(layer.running_var, torch.stack(variances).mean(0), **DOUBLE)
    assert layer.num_batches_tracked == 4


@pytest.mark.parametrize("rule", TRAIN)
def test_no_update_changes_nothing(rule):
    layer = make_layer(nn.BatchNorm2d, train_stats=rule, update_stats="none", **TRAIN[rule])
    before = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    layer(make_input((6, CHANNELS, 3, 3))).sum().backward()
    assert all(buffer.equal(before[name]) for name, buffer in layer.named_buffers())


@pytest.mark.parametrize(
    ("batch", "spatial", "groups"), [(7, 1, [3, 4]), (7, 2, [3, 3, 1]), (8, 1, [3, 3, 2]), (2, 1, [2])]
)
def test_a_ghost_remainder_joins_only_where_it_is_one_value(batch, spatial, groups):
    layer = make_layer(nn.BatchNorm2d, train_stats="ghost", ghost_size=3)
    x = make_input((batch, CHANNELS, 1, spatial))
    tensors = (layer.weight, layer.bias, layer.running_mean.clone(), layer.running_var.clone())
    wanted = oracles.ghost(x, *tensors, eps=layer.eps, momentum=layer.momentum, sizes=groups)
    torch.testing.assert_close(layer(x), wanted.output, **DOUBLE)
    torch.testing.assert_close(layer.running_var, wanted.var, **DOUBLE)


@pytest.mark.parametrize("rule", ["batch", "sync", "ghost", "renorm", "stochastic"])
def test_one_value_per_channel_is_refused_before_anything_moves(rule):
    layer = make_layer(nn.BatchNorm2d, train_stats=rule)
    before = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    with pytest.raises(StatisticsError, match="one value per channel"):
        layer(make_input((1, CHANNELS, 1, 1)))
    assert all(buffer.equal(before[name]) for name, buffer in layer.named_buffers())


@pytest.mark.parametrize("rule", TRAIN)
@pytest.mark.parametrize("poison", [math.nan, math.inf, 1e38])
def test_statistics_that_are_not_finite_stay_out(rule, poison):
    layer = make_layer(nn.BatchNorm2d, train_stats=rule, **TRAIN[rule]).float()
    x = make_input((6, CHANNELS, 3, 3)).detach().float()
    x[0, 1, 0, 0], x[5, 1, 1, 1] = poison, -poison
    before = layer.running_mean.clone(), layer.running_var.clone()
    layer(x)
    sound = torch.arange(CHANNELS) != 1
    for old, new in zip(before, (layer.running_mean, layer.running_var), strict=True):
        assert new.isfinite().all()
        assert new[1] == old[1]
        assert (new[sound] != old[sound]).all()


@pytest.mark.parametrize("rule", TRAIN)
def test_a_cumulative_average_counts_only_whole_sound_batches(rule):
    layer = make_layer(nn.BatchNorm2d, train_stats=rule, update_stats="cumulative", **TRAIN[rule])
    sound = make_layer(nn.BatchNorm2d, train_stats=rule, update_stats="cumulative", **TRAIN[rule])
    for step in range(4):
        x = make_input((6, CHANNELS, 3, 3), seed=step).detach()
        if step == 1:
            x[0, 1, 0, 0] = math.nan  # of one channel; an average of the others would weigh this batch twice
            layer(x)
            continue
        layer(x)
        sound(x)
    assert (layer.num_batches_tracked, sound.num_batches_tracked) == (3, 3)
    torch.testing.assert_close(layer.running_mean, sound.running_mean, **DOUBLE)
    torch.testing.assert_close(layer.running_var, sound.running_var, **DOUBLE)


@pytest.mark.parametrize("rule", TRAIN)
def test_memory_format_and_layout_do_not_matter(rule):
    x = make_input((7, CHANNELS, 4, 5)).detach()
    results = []
    for variant in (x, x.to(memory_format=torch.channels_last), x.transpose(2, 3).contiguous().transpose(2, 3)):
        layer = make_layer(nn.BatchNorm2d, train_stats=rule, **TRAIN[rule])
        variant = variant.clone(memory_format=torch.preserve_format).requires_grad_()
        torch.manual_seed(7)
        y = layer(variant)
        results.append([y.detach(), *gradients(y, layer, variant), layer.running_mean, layer.running_var])
        if variant.is_contiguous(memory_format=torch.channels_last):
            assert y.is_contiguous(memory_format=torch.channels_last) or rule == "ghost"
    torch.testing.assert_close(results[1], results[0], **DOUBLE)
    torch.testing.assert_close(results[2], results[0], **DOUBLE)


@pytest.mark.parametrize("rule", TRAIN)
def test_half_precision_activations_keep_their_type_and_wide_statistics(rule):
    wide = make_layer(nn.BatchNorm2d, train_stats=rule, **TRAIN[rule])
    half = make_layer(nn.BatchNorm2d, train_stats=rule, **TRAIN[rule]).float()
    x = (make_input((8, CHANNELS, 6, 6)).detach() + 20).bfloat16()
    torch.manual_seed(7)
    wanted = wide(x.double())
    torch.manual_seed(7)
    x = x.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        got = half(x)
    got.sum().backward()
    assert (got.dtype, x.grad.dtype, half.running_var.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    torch.testing.assert_close(got.double(), wanted, rtol=1e-2, atol=3e-2)
    torch.testing.assert_close(half.running_mean.double(), wide.running_mean, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(half.running_var.double(), wide.running_var, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rule", ["running", "renorm", "stochastic"])
def test_wide_kernels_take_no_copy_of_a_half_precision_batch(rule, monkeypatch):
    """As on CUDA: what the CPU computes less exactly by this kernel it computes all the same."""
    monkeypatch.setattr("bnfinetune.bn.functional._has_wide_kernel", lambda x: True)
    largest = []

    class Conversions(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten._to_copy.default:
                largest.append(args[0].numel())
            return func(*args, **(kwargs or {}))

    wide = make_layer(nn.BatchNorm2d, train_stats=rule, **TRAIN[rule])
    half = make_layer(nn.BatchNorm2d, train_stats=rule, **TRAIN[rule]).float()
    x = make_input((8, CHANNELS, 6, 6)).detach().bfloat16()
    with Conversions():
        half(x)
    wide(x.double())
    assert max(largest, default=0) <= CHANNELS
    torch.testing.assert_close(half.running_mean.double(), wide.running_mean, rtol=2e-2, atol=1e-2)
    torch.testing.assert_close(half.running_var.double(), wide.running_var, rtol=2e-2, atol=1e-2)


def test_stochastic_draws_follow_the_seed_and_the_probability():
    layer = make_layer(nn.BatchNorm2d, train_stats="stochastic", update_stats="none", stochastic_p=0.25)
    x = make_input((6, CHANNELS, 3, 3)).detach()
    by_batch = make_layer(nn.BatchNorm2d, train_stats="batch", update_stats="none")(x)

    def draws(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return torch.stack([(layer(x) - by_batch).abs().amax((0, 2, 3)) < 1e-9 for _ in range(400)])

    assert draws(0).equal(draws(0))
    assert not draws(0).equal(draws(1))
    assert abs(draws(2).double().mean().item() - 0.25) < 0.03  # 2000 draws: 3 standard errors


def test_frozen_affine_keeps_no_activation_for_backward():
    def kept(affine: str) -> int:
        layer = make_layer(nn.BatchNorm2d, train_stats="running", update_stats="none", affine=affine)
        x, sizes = make_input((4, CHANNELS, 8, 8)), []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            layer(x)
        return max(sizes)

    assert kept("frozen") == CHANNELS
    assert kept("trained") == 4 * CHANNELS * 8 * 8
