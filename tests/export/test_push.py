"""What is sent to the hub, to a stand-in for it; the folder in timm and transformers; the card against the run."""

import json
import shutil

import pytest
import timm
import torch
import yaml
from scipy.stats import binomtest

import bnfinetune as bnf
from bnfinetune.cli import main
from bnfinetune.errors import CheckpointError, ExportError, RecipeError
from bnfinetune.export.push import push_checkpoint
from tests.export.hub import OWNER_TOKEN, standing_in
from tests.inference.folders import write_network

NUMBERS = {"images": 200, "loss": 0.2, "top1": 0.94, "top5": 1.0, "macro_f1": 0.93, "ece": 0.02}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run's folder, as far as a card reads it, of images that lie on this machine."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    (folder.parent / "secret" / "photos").mkdir(parents=True)
    source = str(folder.parent / "secret" / "photos")
    folder.mkdir()
    bn = {"bn.affine": "frozen", "bn.layers": ["layer1.*"], "run.dir": str(folder)}
    write_network(folder / "best", "test_resnet", source=source, **bn)
    summary = {
        "updates": 30, "images": 240, "before": {"test": {**NUMBERS, "top1": 0.5}}, "after": {"test": NUMBERS},
        "per_class": {"blue": 0.99, "green": 0.85, "red": 0.95}, "measured_on": "test",
    }  # fmt: skip
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


@pytest.fixture(scope="module")
def sent(run, tmp_path_factory):
    """What a dry run writes."""
    out = tmp_path_factory.mktemp("dry") / "out"
    assert push_checkpoint(str(run), "me/digits", dry_run=str(out)) == str(out)
    return out


def test_the_folder_is_loaded_by_timm_by_transformers_and_by_load(run, sent):
    batch = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    model, other = (timm.create_model(f"local-dir:{each}", pretrained=True).eval() for each in (run / "best", sent))
    with torch.no_grad():
        expected = model(batch)
        assert torch.equal(other(batch), expected)
    assert bnf.load(sent).labels == ("blue", "green", "red")
    transformers = pytest.importorskip("transformers", reason="transformers is an optional reader of exports")
    wrapped = transformers.AutoModelForImageClassification.from_pretrained(sent).eval()
    with torch.no_grad():
        torch.testing.assert_close(wrapped(batch).logits, expected, rtol=1e-5, atol=1e-6)
    assert wrapped.config.id2label == {0: "blue", 1: "green", 2: "red"}


def test_the_card_tells_what_the_run_measured(sent):
    text = (sent / "README.md").read_text()
    _, front, body = text.split("---\n", 2)
    metadata = yaml.safe_load(front)
    assert (metadata["library_name"], metadata["pipeline_tag"]) == ("timm", "image-classification")
    assert metadata["license"] == "apache-2.0"  # what timm says of its weights
    [result] = metadata["model-index"][0]["results"]
    assert result["dataset"]["split"] == "test"
    assert {each["type"]: each["value"] for each in result["metrics"]}["accuracy"] == 0.94
    interval = binomtest(188, 200).proportion_ci(method="wilson")
    assert f"{interval.low:.1%} to {interval.high:.1%}" in body
    [before, after] = [line for line in body.splitlines() if line.startswith("| test, ")]
    assert "50.0%" in before
    assert "94.0%" in after
    for said in (
        "`affine=frozen`, layers `layer1.*`",
        "Running statistics: running averages of training",
        "Weakest classes on test: green (85.0%)",
        "hf-hub:me/digits",
    ):
        assert said in body, said


def test_no_path_of_the_machine_is_sent(run, sent):
    for name in ("README.md", "recipe.yaml", "statistics.json", "config.json"):
        assert str(run.parent) not in (sent / name).read_text(), name
    assert yaml.safe_load((sent / "recipe.yaml").read_text())["data"]["source"] == "photos"


def test_what_is_sent_is_what_a_dry_run_writes(run, sent, monkeypatch, capsys):
    with standing_in(monkeypatch) as hub:
        assert main(["push", f"checkpoint={run}", "repo=me/digits", "private=on", "message=First"]) == 0
        assert hub.files == {file.name: file.read_bytes() for file in sent.iterdir()}
        assert (hub.created[0]["name"], hub.messages) == ("digits", ["First"])
        assert True in hub.created[0].values() or "private" in hub.created[0].values()
        assert all("timm" in agent for agent in hub.agents)
    assert f"sent: {hub.url}/me/digits/commit/" in capsys.readouterr().out


def test_a_card_that_is_there_stays(run, monkeypatch, caplog):
    with standing_in(monkeypatch) as hub:
        hub.files["README.md"] = b"by hand"
        push_checkpoint(str(run), "me/digits")
        assert hub.files["README.md"] == b"by hand"
        assert "model.safetensors" in hub.files
    assert "me/digits has a card already" in caplog.text


def test_a_refusal_and_an_absent_hub_are_one_line(run, monkeypatch):
    with standing_in(monkeypatch) as hub:
        monkeypatch.setenv("HF_TOKEN", OWNER_TOKEN[::-1])
        with pytest.raises(ExportError, match=r"did not take me/digits .*; log in by `hf auth login`, or set HF_TOKEN"):
            push_checkpoint(str(run), "me/digits")
        assert not hub.files
    with pytest.raises(ExportError, match="cannot be reached; dry_run=FOLDER writes the folder"):
        push_checkpoint(str(run), "me/digits")


def test_mistakes_and_folders_that_are_no_runs(run, tmp_path):
    for repo in ("digits", "a/b/c", "me/--x", "me/a b"):
        with pytest.raises(RecipeError, match="repo: found"):
            push_checkpoint(str(run), repo, dry_run=str(tmp_path / "x"))
    with pytest.raises(CheckpointError, match="is not empty"):
        push_checkpoint(str(run), "me/digits", dry_run=str(run))
    shutil.copytree(run / "best", tmp_path / "net")
    push_checkpoint(str(tmp_path / "net"), "me/digits", licence="mit", dry_run=str(tmp_path / "out"))
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Nothing: no report of a run lies beside these weights." in card
    assert "license: mit" in card
