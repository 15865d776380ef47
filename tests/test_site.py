"""The documentation site: nothing is missing, its pages are current, its tutorials run, and it needs no network."""

import contextlib
import io
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import bnfinetune
from bnfinetune.cli import main

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
TUTORIALS = DOCS / "tutorials"


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)


def pages_in(nav) -> list[str]:
    if isinstance(nav, str):
        return [nav]
    return [page for part in (nav.values() if isinstance(nav, dict) else nav) for page in pages_in(part)]


@pytest.fixture
def api_pages(monkeypatch):
    monkeypatch.syspath_prepend(str(DOCS))
    from make_api import pages

    return pages()


def test_every_public_name_has_a_place_in_the_reference(api_pages):
    text = "\n".join(api_pages.values())
    places = re.findall(r"^::: (\S+)$", text, flags=re.MULTILINE)
    assert sorted(places) == sorted(f"{bnfinetune._HOMES[name]}.{name}" for name in bnfinetune.__all__)


def test_the_reference_of_python_is_current(api_pages):
    written = {path: path.read_text(encoding="utf-8") for path in (DOCS / "reference/api").glob("*.md")}
    assert written == api_pages, "run python docs/make_api.py"


@pytest.fixture
def plots(monkeypatch):
    monkeypatch.syspath_prepend(str(DOCS))
    import make_plots

    return make_plots


def test_the_plots_show_what_is_recorded(plots):
    said = {name: plots.digest_of(DOCS / f"images/{name}.svg") for name in plots.PLOTS}
    assert said == {name: plots.digest(make()) for name, (_, make) in plots.PLOTS.items()}, (
        "run python docs/make_plots.py"
    )
    assert {path.stem for path in (DOCS / "images").glob("*.svg")} == set(plots.PLOTS)


def test_a_plot_is_drawn_again_when_its_record_changes_and_only_then(plots, monkeypatch, tmp_path):
    runs = {seed: {"top1": top1} for seed, top1 in (("0", 50.0), ("1", 60.0))}
    found = {
        "clothing, tf_efficientnet_lite0, batches of 16": {"ways": {"full": runs, "freeze_bn": runs}},
        "clothing, tf_efficientnet_lite0, batches of 2": {"ways": {"full": {"0": {"top1": 20.0}}, "auto": runs}},
        "sketch, tf_efficientnet_lite0, batches of 4": {"ways": {"full": runs}},
    }
    monkeypatch.setattr(plots, "record", {"transfer": found}.__getitem__)
    monkeypatch.setattr(plots, "IMAGES", tmp_path)
    monkeypatch.setattr(plots, "PLOTS", {"batch_size": plots.PLOTS["batch_size"]})
    [panel] = plots.batch_size().panels
    live = [(point.x, point.low, point.y, point.high) for point in panel.curves["full: BN live"]]
    assert live == [(2, 20.0, 20.0, 20.0), (16, 50.0, 55.0, 60.0)]
    assert [point.x for point in panel.curves["freeze_bn: BN fixed"]] == [16]

    drawn = tmp_path / "batch_size.svg"
    plots.main([])
    first = drawn.read_bytes()
    drawn.write_bytes(first + b"<!-- as it was -->")
    plots.main([])
    assert drawn.read_bytes().endswith(b"<!-- as it was -->")
    runs["0"]["top1"] = 40.0
    plots.main([])
    assert plots.digest_of(drawn) == plots.digest(plots.batch_size())
    assert drawn.read_bytes() != first


def test_every_picture_is_there_and_says_what_it_shows(plots):
    shown = set()
    for page in [*DOCS.rglob("*.md"), ROOT / "README.md"]:
        for alternative, target in re.findall(r"!\[(.*?)\]\((\S+?)\)", page.read_text(encoding="utf-8")):
            assert len(alternative) >= 25, f"{page.name}: {target}"
            assert (page.parent / target).is_file(), f"{page.name}: {target}"
            shown.add((page.parent / target).stem)
    assert shown >= set(plots.PLOTS)


def test_every_page_stands_in_the_navigation_once():
    settings = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    named = pages_in(settings["nav"])
    there = {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")}
    assert len(named) == len(set(named))
    assert set(named) == {page for page in there if not re.fullmatch(r"checks/BN\d+\.md", page)}


@pytest.mark.slow
def test_the_site_builds_without_a_warning_and_reaches_for_nothing(tmp_path):
    pytest.importorskip("mkdocs")
    pytest.importorskip("material")
    pytest.importorskip("mkdocstrings")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    found = list((tmp_path / "site").rglob("*.html"))
    assert len(found) > 70
    loads = re.compile(r"<(?:script|link|img|iframe)\b[^>]*\b(?:src|href)=\"?((?:https?:)?//[^\" >]+)")
    for page in found:
        assert not loads.findall(page.read_text(encoding="utf-8")), page


@pytest.mark.slow
def test_the_loop_of_the_tutorial_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    page = TUTORIALS / "your_loop.md"
    names: dict[str, object] = {}
    for block in blocks(page, "python"):
        exec(compile(block, str(page), "exec"), names)
    out = capsys.readouterr().out
    moved = float(re.search(r"statistics moved by (\S+)", out)[1])
    assert moved > 0
    assert "BN101" in out
    assert "precise BN (pooled): 15 layers from 200 samples" in out


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_lines_of_the_photo_tutorial_run(tmp_path):
    page = TUTORIALS / "your_photos.md"
    python = blocks(page, "python")
    script = "\n".join(["set -e", *(f"python - <<'END'\n{block}\nEND" for block in python[:1]), *blocks(page, "bash")])
    bin_folder = Path(sys.executable).parent
    environment = {**os.environ, "PATH": f"{bin_folder}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        ["bash", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=1700
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "runs/auto/best/model.safetensors").is_file()
    assert (tmp_path / "inspect.html").is_file()
    assert "digit-" in done.stdout.splitlines()[-1]


NUMBER = re.compile(r"\d+(?:\.\d+)?")
ANY_BLOCK = re.compile(r"```(\w+)\n(.*?)```", flags=re.DOTALL)


def walk(page: Path) -> str:
    """Runs a tutorial from top to bottom in this process; right after a block, what is shown must have been printed."""
    names: dict[str, object] = {}
    whole, out = "", ""
    for language, block in ANY_BLOCK.findall(page.read_text(encoding="utf-8")):
        if language == "text":
            assert is_shown(block, out), f"{page.name} shows\n{block}\nand prints\n{out}"
            continue
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            if language == "python":
                exec(compile(block, str(page), "exec"), names)
            for line in block.splitlines() if language == "bash" else ():
                verb, *arguments = shlex.split(line)
                assert verb == "bnfinetune"
                assert main(arguments) == 0, line
        out = printed.getvalue()
        whole += out
    return whole


def is_shown(block: str, out: str) -> bool:
    """Whether all lines of a block were printed, in this order; numbers may differ a little between machines."""
    printed = iter(out.splitlines())
    lines = [line for line in block.splitlines() if line.strip() != "..."]
    return all(any(is_like(line, other) for other in printed) for line in lines)


def is_like(line: str, other: str) -> bool:
    words, others = (" ".join(NUMBER.sub("#", each).split()) for each in (line, other))
    numbers, found = ([float(number) for number in NUMBER.findall(each)] for each in (line, other))
    return words == others and all(abs(a - b) <= max(0.1, 0.15 * a) for a, b in zip(numbers, found, strict=True))


def test_what_is_shown_is_compared():
    shown = "step 1 of 2\n...\nloss 0.52\n"
    assert is_shown(shown, "step 1 of 2\nother\nloss   0.5\n")
    for out in ("", "step 1 of 2\nother\nloss 0.9\n", "loss 0.52\nstep 1 of 2\n", "step 1 of 2\ngain 0.52\n"):
        assert not is_shown(shown, out)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["detection", "segmentation", "new_domain"])
def test_a_tutorial_prints_what_it_shows(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert walk(TUTORIALS / f"{name}.md")


@pytest.fixture
def make_notebooks(monkeypatch):
    pytest.importorskip("nbformat")
    monkeypatch.syspath_prepend(str(DOCS))
    import make_notebooks

    return make_notebooks


def test_notebooks_are_current(make_notebooks):
    written = {path: path.read_text(encoding="utf-8") for path in (DOCS / "notebooks").glob("*.ipynb")}
    assert written == make_notebooks.notebooks(), "run python docs/make_notebooks.py"


def test_a_notebook_runs_every_block_of_its_tutorial_and_loses_no_prose(make_notebooks):
    import nbformat

    page = "# Title\n\nProse.\n\n```python\nx = 1\n\ny = 2\n```\n\n```text\nshown\n```\n\n```bash\nls\n```\n\nEnd.\n"
    cells = nbformat.reads(make_notebooks.notebook("a", page), as_version=4).cells
    assert [(cell.cell_type, cell.source) for cell in cells[2:]] == [
        ("markdown", "# Title\n\nProse."),
        ("code", "x = 1\n\ny = 2"),
        ("markdown", "```text\nshown\n```"),
        ("code", "%%bash\nls"),
        ("markdown", "End."),
    ]
    assert [cell.id for cell in cells] == [f"a-{number}" for number in range(7)]


@pytest.mark.slow
def test_a_notebook_runs(tmp_path, monkeypatch):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(DOCS / "notebooks/your_loop.ipynb", as_version=4)
    notebook.cells = [cell for cell in notebook.cells if "install" not in cell.metadata.get("tags", ())]
    nbclient.NotebookClient(notebook, timeout=200, resources={"metadata": {"path": str(tmp_path)}}).execute()
    streams = [output.text for cell in notebook.cells for output in cell.get("outputs", ()) if "text" in output]
    assert any("BN101" in text for text in streams)
