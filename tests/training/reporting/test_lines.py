"""Lines of a run: text is text, a bar and lines share a terminal, and elsewhere lines come from time to time."""

import os
import pty
import re
import select
import subprocess
import sys
from pathlib import Path

import pytest

import bnfinetune as bnf
from bnfinetune.recipe_files import load_recipe
from bnfinetune.training.loop.progress import Progress, Status
from bnfinetune.training.reporting.lines import Lines, shown_progress
from tests.training.loop.test_guard import settings
from tests.training.support import write_images


@pytest.mark.parametrize("name", ["out[v2]", "[bold]x[/bold]", "a[/i]b", "50%", "{x}", "100%|ü"])
def test_text_is_never_markup(name, tmp_path, capsys):
    source = write_images(tmp_path / f"in-{name.replace('/', '_')}")
    run = tmp_path / name.replace("/", "_")
    (source / "train/red").rename(source / "train" / "[red]")
    (source / "val/red").rename(source / "val" / "[red]")
    options = {"data.source": str(source), "train.steps": 1, "run.check": "warn", "recalibrate.at": ["start"]}
    bnf.finetune("full", **settings(source, run, **options))
    said = capsys.readouterr().out
    assert f"{source}: 18 train" in said
    assert f"best network of update 1: {run / 'best'}" in said
    log = (run / "run.log").read_text()
    assert all(any(line in logged for logged in log.splitlines()) for line in said.splitlines())


def test_a_fix_of_the_doctor_is_whole(tmp_path, capsys):
    source = write_images(tmp_path / "images")
    bnf.finetune("freeze_stats", **settings(source, tmp_path / "run", **{"train.steps": 1, "run.check": "warn"}))
    fixes = re.findall(r"fix: (.*)", capsys.readouterr().out)
    assert fixes
    assert not [fix for fix in fixes if fix.rstrip().endswith("=")]


def test_lines_come_from_time_to_time_where_output_is_no_terminal(tmp_path, capsys):
    source = write_images(tmp_path / "images")
    bnf.finetune("full", **settings(source, tmp_path / "run", **{"run.log_every": 1e-6}))
    said = capsys.readouterr().out
    found = re.findall(r"^update +(\d+)/6  loss [\d.]+  lr \S+  \d+ images/s  ETA \d:\d\d:\d\d$", said, re.MULTILINE)
    assert found == ["1", "2", "3", "4", "5", "6"]
    assert len(re.findall(r"update +\d+/6  loss", (tmp_path / "run/run.log").read_text())) == 6


def test_the_clock_decides_about_lines(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr("bnfinetune.training.reporting.lines.time.monotonic", lambda: now[0])
    recipe = load_recipe("full", {"run.log_every": 10})
    points = []
    with shown_progress(recipe, 100, 40, Lines(speaks=True), lambda *point: points.append(point)) as show:
        for update in range(41, 61):
            now[0] += 1
            show(Progress(update=update), Status(None if update == 50 else 1.0, 0.1, 5.0))
    assert capsys.readouterr().out.splitlines() == [
        "update    50/100  loss not finite  lr 0.1  5 images/s  ETA 0:00:50",
        "update    60/100  loss 1.000  lr 0.1  5 images/s  ETA 0:00:40",
    ]
    speed = {"update/lr": 0.1, "update/images_per_second": 5.0}
    assert points == [(speed, 50), ({"update/loss": 1.0} | speed, 60)]


def test_other_ranks_are_silent(tmp_path, capsys):
    say = Lines(speaks=False)
    say("x")
    say.write_to(tmp_path / "run.log")
    with shown_progress(load_recipe("full", {"run.log_every": 1e-9}), 10, 0, say, lambda *_: None) as show:
        show(Progress(update=1), Status(1.0, 0.1, 5.0))
    say.close()
    assert capsys.readouterr() == ("", "")
    assert not (tmp_path / "run.log").exists()


def screen(raw: str, columns: int) -> list[str]:
    """What a terminal shows: carriage returns write over a line, the cursor can move up."""
    rows, row, column = [""], 0, 0
    for part in re.split(r"(\r|\n|\x1b\[A)", re.sub(r"\x1b\[[0-9;]*[mK]", "", raw)):
        if part == "\r":
            column = 0
        elif part == "\n":
            row, column = row + 1, 0
            rows += [""] * (row + 1 - len(rows))
        elif part == "\x1b[A":
            row = max(row - 1, 0)
        else:
            for character in part:
                if column == columns:
                    row, column = row + 1, 0
                    rows += [""] * (row + 1 - len(rows))
                rows[row] = rows[row].ljust(column)[:column] + character + rows[row][column + 1 :]
                column += 1
    return [text.rstrip() for text in rows]


@pytest.mark.parametrize("columns", [80, 120])
def test_bar_and_lines_do_not_write_over_each_other(columns, tmp_path):
    """On a pseudo-terminal of its own."""
    import fcntl
    import struct
    import termios

    script = (
        "from bnfinetune.training.reporting.lines import *; from bnfinetune.recipe_files import load_recipe\n"
        "say = Lines(speaks=True)\n"
        "with shown_progress(load_recipe('full', {}), 40, 0, say, lambda *_: None) as show:\n"
        "    for update in range(1, 41):\n"
        "        show(Progress(update=update), Status(update / 7, 0.001, 1234))\n"
        "        if update % 10 == 0: say(f'epoch {update // 10}  validation loss 0.500  top-1 50.0%')\n"
    )
    mine, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3]), "TERM": "xterm"}
    env.pop("TQDM_DISABLE", None)
    process = subprocess.Popen([sys.executable, "-c", script], stdout=theirs, stderr=theirs, stdin=theirs, env=env)
    raw = b""
    while process.poll() is None or select.select([mine], [], [], 0.2)[0]:
        if select.select([mine], [], [], 0.2)[0]:
            raw += os.read(mine, 65536)
    assert process.returncode == 0, raw
    os.close(theirs)
    os.close(mine)
    shown = screen(raw.decode().replace("\r\n", "\n"), columns)
    lines = [line for line in shown if "validation" in line]
    assert lines == [f"epoch {number}  validation loss 0.500  top-1 50.0%" for number in (1, 2, 3, 4)]
    assert len([line for line in shown if line.startswith("full:")]) == 1
