"""Damaged and malicious files of every kind that is read: one error of ours, in bounded time and memory."""

import io
import json
import os
import random
import resource
import struct
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from bnfinetune.bn import BNPolicy, apply_policy, find_bn_layers
from bnfinetune.bn.policy.switched_layer import switches_of
from bnfinetune.errors import BnFinetuneError, CheckpointError, SelectionError
from bnfinetune.recipe import Recipe
from bnfinetune.recipe_files import dump_recipe, load_recipe, shipped_recipes
from bnfinetune.training.data.images import open_image
from bnfinetune.training.network.weights import load_weights_file
from bnfinetune.training.saving.atomic import complete_folder
from bnfinetune.training.saving.states import StateStore, describe_state, load_networks, read_state
from bnfinetune.training.saving.timm_folder import save_tensors

FILES = 50  # of each kind
SECONDS, BYTES = 60, 2**30  # that reading all of them may take, and at most have at a time


def damaged(content: bytes, rng: random.Random) -> bytes:
    """A file with bits turned over, numbers made large, parts cut out, doubled or exchanged."""
    data = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 5])):
        place = int(len(data) * rng.random() ** rng.choice([1, 4])) if data else 0  # headers come first
        what = rng.randrange(6)
        if what == 0 and data:
            data[min(place, len(data) - 1)] ^= 1 << rng.randrange(8)
        elif what == 1:
            data[place : place + 8] = struct.pack("<Q", rng.choice([0, 1, 2**31, 2**62, 2**64 - 1]))
        elif what == 2:
            del data[place:]
        elif what == 3:
            del data[place : place + rng.randrange(1, 20)]
        elif what == 4:
            data[place:place] = data[place : place + rng.randrange(1, 200)]
        else:
            data[place : place + 4] = rng.randbytes(4)
    return bytes(data)


def read_all(make: Callable[[random.Random], bytes], read: Callable[[Path], object], path: Path) -> None:
    """Write and read damaged files in a child with limits; any error but ours, and any crash, is told."""
    if (pid := os.fork()) == 0:
        code, example = 1, b""
        try:
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + BYTES,) * 2)
            resource.setrlimit(resource.RLIMIT_CPU, (int(sum(os.times()[:2])) + SECONDS,) * 2)
            rng = random.Random(str(path.name))
            for _ in range(FILES):
                example = make(rng)
                path.write_bytes(example)
                with suppress(BnFinetuneError):
                    read(path)
            code = 0
        except BaseException:
            traceback.print_exc()
            print(f"after reading {example[:300]!r}", file=sys.stderr)
        finally:
            sys.stderr.flush()
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return timm.create_model("test_resnet", num_classes=2)


def test_damaged_safetensors(network, tmp_path):
    path = tmp_path / "weights.safetensors"
    save_tensors(path, network.state_dict())
    content = path.read_bytes()
    read_all(lambda rng: damaged(content, rng), lambda path: load_weights_file(network, path), path)


def test_safetensors_with_lying_headers(network, tmp_path):
    """The header is JSON: every number and name in it is tried."""
    path = tmp_path / "lying.safetensors"
    save_tensors(path, {"x": torch.ones(3, 4), "y": torch.ones(2)})
    content = path.read_bytes()
    end = 8 + struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8:end])

    def make(rng):
        lies = json.loads(json.dumps(header))
        entry = rng.choice([key for key in lies if key != "__metadata__"])
        lie = rng.choice([-1, 0, 1, 2**40, 2**63, 2**65, "x", None, [], 1.5])
        key = rng.choice(["dtype", "shape", "data_offsets"])
        lies[entry][key] = rng.choice([lie, [lie], [0, lie], [lie, 0]])
        text = json.dumps(lies).encode()
        return struct.pack("<Q", len(text)) + text + content[end:]

    read_all(make, lambda path: load_weights_file(network, path), path)


def test_damaged_pickles(network, tmp_path):
    buffer = io.BytesIO()
    torch.save(network.state_dict(), buffer)
    content = buffer.getvalue()
    read_all(lambda rng: damaged(content, rng), lambda path: load_weights_file(network, path), tmp_path / "weights")


@pytest.mark.parametrize("name", ["trainer.pt", "state.json", "manifest.json", "model.safetensors"])
def test_damaged_states(name, network, tmp_path):
    store = StateStore(tmp_path, keep=1)
    about = {"update": 1, "epoch": 0, "ranks": 1, "batch_size": 4, "grad_accum": 1, "fingerprint": "x"}
    store.save(1, {"model": network}, {"progress": {"update": 1}, "losses": [1.0]}, "name: full\n", about)
    folder = store.folder / "update-00000001"
    content = (folder / name).read_bytes()

    def read(path):
        describe_state(folder)
        load_networks(folder, read_state(folder, ["model"]), {"model": network})  # as if the checksums were right
        if path.read_bytes() != content:
            with pytest.raises(CheckpointError, match="damaged"):
                complete_folder(folder)

    def read_manifest(path):
        with suppress(CheckpointError):
            complete_folder(folder)

    reader = read_manifest if name == "manifest.json" else read
    read_all(lambda rng: damaged(content, rng), reader, folder / name)


@pytest.mark.parametrize("name", ["freeze_bn", "the defaults"])
def test_damaged_recipes(name, tmp_path):
    content = shipped_recipes()[name].read_bytes() if name in shipped_recipes() else dump_recipe(Recipe()).encode()
    read_all(lambda rng: damaged(content, rng), lambda path: load_recipe(str(path)), tmp_path / "recipe.yaml")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "JPEG2000", "TGA", "ICO", "PCX"])
def test_damaged_images(kind, tmp_path):
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(buffer, kind)
    content = buffer.getvalue()

    def read(path):
        image = open_image({"path": str(path)}, str(path), max_pixels=10_000)
        assert image.mode == "RGB"
        assert image.width * image.height <= 10_000

    read_all(lambda rng: damaged(content, rng), read, tmp_path / f"image.{kind.lower()}")


LAYERS = list(find_bn_layers(timm.create_model("test_resnet")))
parts = st.sampled_from(
    ["*", "?", "layer", "layer1", "bn", "bn1", ".", "0", "1", "[12]", "[!1]", "downsample", "x", "["]
)
globs = st.lists(parts, min_size=1, max_size=5).map("".join) | st.sampled_from(LAYERS)


@settings(deadline=None, max_examples=150)
@given(st.lists(globs, min_size=1, max_size=3), st.lists(globs, max_size=2))
def test_a_policy_takes_the_layers_that_its_globs_fit_and_no_others(layers, exclude):
    model = timm.create_model("test_resnet")
    unfit = [glob for glob in (*layers, *exclude) if not any(fnmatchcase(name, glob) for name in LAYERS)]
    wanted = [
        name
        for name in LAYERS
        if any(fnmatchcase(name, glob) for glob in layers) and not any(fnmatchcase(name, glob) for glob in exclude)
    ]
    policy = BNPolicy(update_stats="none", layers=tuple(layers), exclude=tuple(exclude))
    if unfit or not wanted:
        with pytest.raises(SelectionError) as caught:
            apply_policy(model, policy)
        assert not unfit or any(repr(glob) in str(caught.value) for glob in unfit)
        return
    apply_policy(model, policy)
    taken = [name for name, layer in find_bn_layers(model).items() if switches_of(layer).update_stats == "none"]
    assert taken == wanted
