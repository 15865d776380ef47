"""BN patch files: what one network is for another domain, in kilobytes, and refused by any other network."""

import json
import re
from pathlib import Path

import pytest
import safetensors.torch
import torch
from safetensors import safe_open
from torch import nn
from torch.nn.utils import prune

import bnfinetune as bnf
from bnfinetune.bn.patch import BNPatch
from bnfinetune.errors import CheckpointError, LayerError, SelectionError, StatisticsError
from tests.bn.look_alikes import Detectron
from tests.bn.models import backbone, differing, images, randomise, tensors_of, toy

SMALL = ("test_resnet", "test_efficientnet")  # plain BN, and BatchNormAct2d beside plain


def two_domains(name: str) -> nn.Module:
    """A network that has trained a while on two domains, with statistics and affine of their own."""
    model = bnf.apply_policy(backbone(name), bnf.BNPolicy(domains="b", domain_affine="own"))
    for seed in range(2):
        model(images(seed=seed) + 1)
        with bnf.domain(model, "b"):
            model(3 * images(seed=seed + 9) - 1)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "bn_b" in key:
                parameter.mul_(1.1).add_(0.05)
    return model


@torch.no_grad()
def outputs(model: nn.Module) -> torch.Tensor:
    return model.eval()(images(seed=99))


@pytest.mark.parametrize("name", SMALL)
def test_the_domains_of_one_deployed_network_are_swapped_bit_for_bit(name, tmp_path):
    model = two_domains(name)
    plain_a, plain_b = bnf.restore_bn(bnf.export_domain(model, "b")), bnf.export_domain(model, "b")
    plain_a.load_state_dict(model.state_dict())
    a, b = outputs(plain_a), outputs(plain_b)
    assert not torch.equal(a, b)
    bnf.save_bn(plain_a, tmp_path / "a.safetensors")
    bnf.save_bn(plain_b, tmp_path / "b.safetensors")
    for file, expected, whole in (("b", b, plain_b), ("a", a, plain_a)):
        deployed = backbone(name)
        deployed.load_state_dict(plain_a.state_dict())
        for other in ("a", "b", file):
            bnf.load_bn(deployed, tmp_path / f"{other}.safetensors")
        assert torch.equal(outputs(deployed), expected)
        assert not differing(deployed.state_dict(), whole.state_dict())


def test_a_file_is_kilobytes_and_holds_nothing_but_bn(tmp_path):
    file = tmp_path / "patch.safetensors"
    model = backbone("resnet18")
    bnf.save_bn(model, file)
    held = safetensors.torch.load_file(file)
    layers = bnf.find_bn_layers(model)
    tensors = ("running_mean", "running_var", "num_batches_tracked", "weight", "bias")
    assert held.keys() == {f"{name}.{key}" for name in layers for key in tensors}
    assert all(torch.equal(model.state_dict()[key], value) for key, value in held.items())
    assert file.stat().st_size < 100_000 < 44_000_000 < sum(4 * p.numel() for p in model.parameters())


def test_within_a_domain_its_own_values_are_saved_and_loaded(tmp_path):
    model = two_domains("test_resnet")
    before = {key: b.clone() for key, b in (*model.named_buffers(), *model.named_parameters())}
    with bnf.domain(model, "b"):
        assert bnf.save_bn(model, tmp_path / "b").domain == "b"
        of_b = outputs(model)
    bnf.load_bn(model, tmp_path / "b")
    assert torch.equal(outputs(model), of_b)
    again = two_domains("test_resnet")
    bnf.save_bn(again, tmp_path / "a")
    with bnf.domain(again, "b"):
        bnf.load_bn(again, tmp_path / "a")
    after = dict((*again.named_buffers(), *again.named_parameters()))
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    assert moved
    assert all("bn_b_" in key for key in moved)
    assert torch.equal(after["bn1.bn_b_weight"], before["bn1.weight"])


@pytest.mark.parametrize("name", SMALL)
def test_under_policies_folded_compiled_and_averaged_it_is_one_file(name, tmp_path):
    model, target = backbone(name), randomise(backbone(name), seed=5)
    bnf.save_bn(model, tmp_path / "plain")
    expected = outputs(model)
    bnf.fold_bn(bnf.freeze_bn(target), images())
    outputs(target)
    wrapped = torch.optim.swa_utils.AveragedModel(torch.compile(target, backend="eager"))
    bnf.load_bn(wrapped, tmp_path / "plain")
    folded = wrapped.module._orig_mod
    torch.testing.assert_close(outputs(folded), expected, rtol=1e-4, atol=1e-4)  # folding rounds otherwise
    assert torch.equal(outputs(bnf.restore_bn(folded)), expected)
    bnf.freeze_bn(folded)
    bnf.save_bn(wrapped, tmp_path / "wrapped")
    one, other = (safetensors.torch.load_file(tmp_path / file) for file in ("plain", "wrapped"))
    assert not differing(dict(sorted(one.items())), dict(sorted(other.items())))


def test_names_never_hold_those_of_wrappers_however_deep(tmp_path):
    torch.manual_seed(0)
    bare = nn.Sequential(toy(), nn.Conv2d(6, 2, 1))
    nested = nn.Sequential(torch.compile(bare[0], backend="eager"), bare[1])
    written = bnf.save_bn(nested, tmp_path / "nested")
    assert list(written.layers) == ["0.1", "0.4"]
    assert written.weights_sha256 == bnf.save_bn(bare, tmp_path / "bare").weights_sha256
    bnf.load_bn(bare, tmp_path / "nested")


def test_ddp_reads_and_writes_the_same_file(tmp_path, free_port):
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{free_port}", rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(bnf.freeze_bn(toy()))
        bnf.save_bn(model, tmp_path / "ddp")
        other = randomise(toy(), seed=3)
        bnf.load_bn(other, tmp_path / "ddp")
        assert not differing(tensors_of(other), tensors_of(toy()))
        bnf.save_bn(randomise(toy(), seed=3), tmp_path / "other")
        bnf.load_bn(model, tmp_path / "other")
        assert not differing(tensors_of(model.module), tensors_of(randomise(toy(), seed=3)))
    finally:
        torch.distributed.destroy_process_group()


def test_a_selection_is_bound_to_the_layers_that_it_leaves_out(tmp_path):
    written = bnf.save_bn(toy(), tmp_path / "last", layers=":last")
    assert list(written.layers) == ["4"]
    assert not written.complete
    model = toy()
    model[4].weight.data.fill_(7)
    bnf.load_bn(model, tmp_path / "last")
    assert not differing(tensors_of(model), tensors_of(toy()))
    model[1].running_mean.add_(1)
    with pytest.raises(CheckpointError, match="belongs to weights"):
        bnf.load_bn(model, tmp_path / "last")


def test_of_a_whole_file_some_layers_are_loaded(tmp_path):
    bnf.save_bn(toy(), tmp_path / "whole")
    model = randomise(toy(), seed=2)
    bnf.load_bn(model, tmp_path / "whole", layers="4")
    assert {key.split(".")[0] for key in differing(tensors_of(model), tensors_of(toy()))} == {"1"}
    with pytest.raises(SelectionError, match="'5' matches no BN layer"):
        bnf.load_bn(model, tmp_path / "whole", layers="5")
    bnf.save_bn(toy(), tmp_path / "first", layers="1")
    bnf.save_bn(model, tmp_path / "part", layers="1")
    with pytest.raises(CheckpointError, match="does not hold BN layer '4', which layers='4' asks for"):
        bnf.load_bn(model, tmp_path / "part", layers="4")


def test_statistics_alone_leave_the_affine(tmp_path):
    bnf.save_bn(toy(), tmp_path / "stats", affine=False)
    assert all("weight" not in key for key in safetensors.torch.load_file(tmp_path / "stats"))
    model = toy()
    model[1].running_var.fill_(9)
    bnf.load_bn(model, tmp_path / "stats")
    assert not differing(tensors_of(model), tensors_of(toy()))
    model[1].bias.data.fill_(9)  # part of the weights now
    with pytest.raises(CheckpointError, match="belongs to weights"):
        bnf.load_bn(model, tmp_path / "stats")


def test_other_weights_refuse_it_by_name_unless_told(tmp_path):
    written = bnf.save_bn(toy(), tmp_path / "patch")
    model = toy()
    model[0].weight.data[0, 0, 0, 0] += 1e-6
    before = tensors_of(randomise(model, seed=4))
    with pytest.raises(CheckpointError, match=f"patch belongs to weights {written.weights_sha256[:12]}.*any_weights=T"):
        bnf.load_bn(model, tmp_path / "patch")
    assert not differing(tensors_of(model), before)
    bnf.load_bn(model, tmp_path / "patch", any_weights=True)
    assert differing(tensors_of(model), tensors_of(toy())) == ["0.weight"]


REFUSALS = {
    "a layer of the file": (lambda: toy()[:4], "holds BN layer '4', which this model has not"),
    "a layer of the model": (
        lambda: nn.Sequential(*toy(), nn.BatchNorm2d(6)),
        "holds no BN layer '5', which this model has",
    ),
    "another shape": (lambda: toy(channels=8), r"1.running_mean has the shape \(6,\), and the layer's is \(8,\)"),
    "no affine": (lambda: toy(lambda c: nn.BatchNorm2d(c, affine=False)), "the model has not 4.bias"),
    "no statistics": (
        lambda: toy(lambda c: nn.BatchNorm2d(c, track_running_stats=False)),
        "the model has not 4.running_mean",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_does_not_fit_is_named_and_changes_nothing(case, tmp_path):
    build, message = REFUSALS[case]
    bnf.save_bn(toy(), tmp_path / "patch")
    model = randomise(build(), seed=8)
    before = tensors_of(model)
    with pytest.raises(CheckpointError, match=message):
        bnf.load_bn(model, tmp_path / "patch", any_weights=True)
    assert not differing(tensors_of(model), before)


def test_an_affine_that_is_computed_is_refused_by_layer(tmp_path):
    bnf.save_bn(toy(), tmp_path / "patch")
    model = toy()
    prune.l1_unstructured(model[4], "weight", 2)
    before = tensors_of(model)
    with pytest.raises(LayerError, match="BN layer '4' computes weight from others"):
        bnf.load_bn(model, tmp_path / "patch", any_weights=True)
    assert not differing(tensors_of(model), before)


def test_an_interrupt_half_way_leaves_the_model_as_it_was(tmp_path, monkeypatch):
    bnf.save_bn(toy(), tmp_path / "patch")
    model = randomise(toy(), seed=6)
    before, calls, copy = tensors_of(model), [], torch.Tensor.copy_

    def interrupted(self, *args, **kwargs):
        calls.append(self)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return copy(self, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "copy_", interrupted)
    with pytest.raises(KeyboardInterrupt):
        bnf.load_bn(model, tmp_path / "patch")
    assert len(calls) > 4
    assert not differing(tensors_of(model), before)


def rewritten(file, **changes):
    with safe_open(str(file), "pt") as opened:
        metadata, tensors = opened.metadata(), {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    safetensors.torch.save_file(tensors, file, {**metadata, **changes})


def test_what_is_no_patch_is_refused(tmp_path):
    model, file = toy(), tmp_path / "file"
    with pytest.raises(CheckpointError, match="file does not exist"):
        bnf.load_bn(model, file)
    file.write_bytes(b"something else")
    with pytest.raises(CheckpointError, match="damaged or no safetensors file"):
        bnf.load_bn(model, file)
    safetensors.torch.save_file(model.state_dict(), file)
    with pytest.raises(CheckpointError, match="no BN patch of version 1"):
        bnf.load_bn(model, file)
    for told in ("{", "[]", "{}", json.dumps({**bnf.save_bn(model, file).to_dict(), "layers": ["1"]})):
        bnf.save_bn(model, file)
        rewritten(file, patch=told)
        with pytest.raises(CheckpointError, match="its metadata cannot be read"):
            bnf.load_bn(model, file)


def test_what_cannot_be_written_leaves_the_earlier_file(tmp_path):
    file = tmp_path / "patch"
    bnf.save_bn(toy(), file)
    whole = file.read_bytes()
    with pytest.raises(CheckpointError, match="source and notes must be plain values"):
        bnf.save_bn(toy(), file, notes={"model": object()})
    with pytest.raises(LayerError, match="meta device"):
        bnf.save_bn(toy().to("meta"), file)
    with pytest.raises(StatisticsError, match="none of 1 BN layers keeps running statistics"):
        bnf.save_bn(nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False)), file, affine=False)
    with pytest.raises(CheckpointError, match="could not be written"):
        bnf.save_bn(toy(), file / "below")
    assert file.read_bytes() == whole
    assert [path.name for path in tmp_path.iterdir()] == ["patch"]


def test_it_says_where_its_statistics_come_from(tmp_path):
    model = bnf.apply_policy(toy(), bnf.BNPolicy(momentum=0.3, update_stats="ema"))
    for seed in range(3):
        model(images(seed=seed))
    report = bnf.precise_bn(model, [images(8, seed=s) for s in (5, 6)])
    written = bnf.save_bn(model, tmp_path / "patch", source=report, notes={"data": "sketches"})
    read = bnf.load_bn(model, tmp_path / "patch")
    assert isinstance(read, BNPatch)
    assert read == written
    assert read.source["by"] == "precise_bn"
    assert (read.source["samples"], read.source["batches"], read.batches) == (16, 2, 3)
    assert read.versions["torch"] == torch.__version__.partition("+")[0] or read.versions["torch"] == torch.__version__
    text = str(read)
    assert "statistics and affine of 2 BN layers (all of the network's), 50 values" in text
    assert "sketches" in text
    assert bnf.save_bn(model, tmp_path / "own", source={"by": "hand"}).source == {"by": "hand"}


def test_foreign_frozen_classes_are_written_too(tmp_path):
    model, other = toy(Detectron), randomise(toy(Detectron), seed=3)
    bnf.save_bn(model, tmp_path / "patch")
    bnf.load_bn(other, tmp_path / "patch")
    assert not differing(tensors_of(other), tensors_of(model))


def test_shared_layers_are_in_it_once(tmp_path):
    def shared() -> nn.Module:
        model = toy()
        return nn.Sequential(*model, model[4])

    bnf.save_bn(shared(), tmp_path / "patch")
    model = randomise(shared(), seed=3)
    bnf.load_bn(model, tmp_path / "patch")
    assert not differing(tensors_of(model), tensors_of(shared()))


def test_a_model_that_is_a_bn_layer_has_names_without_dots(tmp_path):
    layer = randomise(nn.BatchNorm2d(4), seed=1)
    bnf.save_bn(layer, tmp_path / "patch")
    other = nn.BatchNorm2d(4)
    bnf.load_bn(other, tmp_path / "patch")
    assert not differing(tensors_of(other), tensors_of(layer))


def test_the_pages_examples_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    page = Path(__file__).parents[2] / "docs" / "patches.md"
    names: dict = {}
    for example in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
        exec(compile(example, page.name, "exec"), names)
    printed = capsys.readouterr().out
    assert "statistics and affine of 20 BN layers (all of the network's), 19,220 values" in printed
    assert '"notes": {"data": "sketches"}' in printed
