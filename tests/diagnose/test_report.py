"""The pages: complete, escaped, self-contained, accessible; in a real browser where there is one."""

import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
import torch
from torch import nn

import bnfinetune as bnf
from bnfinetune.diagnose.drift import inspect_bn
from bnfinetune.diagnose.page import Picture
from bnfinetune.diagnose.recommend import Situation, recommend
from bnfinetune.diagnose.report import drift_page
from bnfinetune.diagnose.run_report import RunStory, run_page

EVIL = '<img src=x onerror="alert(1)">$&amp;'
PNG = bytes.fromhex("89504e470d0a1a0a")


@pytest.fixture(scope="module")
def report():
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Conv2d(c, 6, 3), nn.BatchNorm2d(6), nn.ReLU()) for c in (3, 6)]
    model = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3))
    images = torch.randn(40, 3, 12, 12) + 1
    data = list(zip(images.split(4), torch.randint(0, 3, (40,)).split(4), strict=True))
    return inspect_bn(model, data, training_images=500)


@pytest.fixture(scope="module")
def page(report):
    model = nn.Sequential(nn.BatchNorm2d(3))
    findings = bnf.check_bn(model, batch_size=2, grad_accum=4)
    assert findings
    return drift_page(report, title=EVIL, findings=findings, recommendation=recommend(Situation.of(report))).html()


@pytest.fixture(scope="module")
def story(report):
    told = RunStory(
        title=EVIL,
        before={"validation": {"images": 8, "top1": 0.4, "loss": 2.0}},
        after={"validation": {"images": 8, "top1": 0.875, "loss": 0.3}},
        history=[{"update": n, "loss": 1 / (n + 1), "train_loss": 1.0, "top1": 0.5, "bn_drift": 0.1} for n in range(3)],
        best_update=2,
        confusion=[[3, 1], [0, 4]],
        class_names=[EVIL, "b\x00c"],
        per_class={EVIL: 0.75, "b": 1.0},
        mistakes=[Picture(PNG, EVIL, ("taken for b", f"{EVIL}.png"))],
        drift=report,
        findings=bnf.check_bn(nn.Sequential(nn.BatchNorm2d(3)), batch_size=2, grad_accum=4),
        settings={"data": EVIL},
        recipe=f"name: {EVIL}",
        command=f"python -m bnfinetune {EVIL}",
    )
    return run_page(told).html()


class Outline(HTMLParser):
    """Tags and attributes in order, and the visible text."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.words = [], []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


@pytest.fixture(params=["page", "story"])
def html(request):
    return request.getfixturevalue(request.param)


def test_nothing_is_fetched_and_nothing_runs(html):
    for tag, attributes in Outline(html).tags:
        assert tag not in ("script", "link", "iframe", "object", "embed", "form")
        for key, value in attributes.items():
            assert not key.startswith("on")
            if key in ("src", "href", "xlink:href"):
                assert value.startswith(("#", "data:image/png;base64,")), (tag, key, value)
    assert not re.search(r"url\((?!#)", html)
    assert "default-src 'none'" in html


def test_text_from_data_is_escaped(html):
    assert "<img src=x" not in html
    assert EVIL in Outline(html).text  # and shown as it is


def test_ids_are_unique_and_links_lead_somewhere(html):
    tags = Outline(html).tags
    ids = [attributes["id"] for _, attributes in tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    for _, attributes in tags:
        target = attributes.get("href", attributes.get("xlink:href", ""))
        if target.startswith("#"):
            assert target[1:] in ids
    for target in re.findall(r"url\(#([^)]+)\)", html):
        assert target in ids


def test_readers_without_eyes_or_mouse_are_served(html):
    tags = Outline(html).tags
    assert dict(tags)["html"]["lang"] == "en"
    names = [tag for tag, _ in tags]
    assert names.count("h1") == 1
    assert names.count("table") == names.count("caption")
    assert all(attributes.get("scope") in ("col", "row") for tag, attributes in tags if tag == "th")
    assert all(attributes.get("alt") for tag, attributes in tags if tag == "img")
    figures = [attributes for _, attributes in tags if attributes.get("role") == "img"]
    assert figures
    assert all(attributes["aria-label"] and attributes["tabindex"] == "0" for attributes in figures)
    assert all(attributes.get("aria-hidden") == "true" for tag, attributes in tags if tag == "svg")


def test_the_page_says_what_was_measured(page, report):
    text = Outline(page).text
    assert report.verdict in text
    assert "BN206" in text
    assert recommend(Situation.of(report)).command in text
    for layer in report.layers:
        assert layer in text
    for heading in ("Recommendation", "Checks", "Layers and channels", "Worst layers", "Noise against"):
        assert heading in text
    assert ("Causes" in text) == any(recovered > 0 for recovered in report.stages.values())


def test_a_run_says_what_it_measured_and_how_sure_it_is(story, report):
    text = Outline(story).text
    assert "87.5% of the validation images are classified right; before training, 40.0% were" in text
    assert "52.9% to 97.8%" in text  # Wilson's interval of 7 in 8, by hand: centre (7 + z^2 / 2) / (8 + z^2) = 0.7534
    assert "flatter" in text  # the validation images have chosen the network
    assert report.verdict in text
    for heading in (
        "Over the run",
        "Confusion",
        "Most wrong",
        "BatchNorm statistics",
        "Worst layers",
        "The whole recipe",
    ):
        assert heading in text


def test_a_run_of_which_little_is_known_still_has_a_page():
    told = RunStory(title="bare", before={"test": {"top1": 0.5}}, after={"test": {"top1": 1.0}})
    text = Outline(run_page(told).html()).text
    assert "100.0% of the test images" in text
    assert "flatter" not in text
    for heading in ("Over the run", "Confusion", "Most wrong", "BatchNorm statistics", "How it was made"):
        assert heading not in text


def test_the_same_report_is_the_same_page(report):
    assert drift_page(report).html() == drift_page(report).html()


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed (apt-get install chromium)")
@pytest.mark.parametrize("width", [390, 1200])
def test_in_a_real_browser(html, tmp_path, width):
    (tmp_path / "report.html").write_text(html, encoding="utf-8")
    # Headless Chromium has a smallest window; a frame of the width of a phone has none.
    probe = f"""<!doctype html><title>probe</title><iframe id=f src=report.html width={width} height=2000></iframe>
    <script>f.onload = () => {{ const d = f.contentDocument.documentElement;
      document.title = [d.scrollWidth <= {width}, f.contentDocument.querySelectorAll('table').length > 0,
        getComputedStyle(f.contentDocument.body).fontSize,
        f.contentWindow.performance.getEntriesByType('resource').filter(e => !e.name.startsWith('data:')).length
      ].join(' '); }}</script>"""
    (tmp_path / "probe.html").write_text(probe, encoding="utf-8")
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files",
        "--disable-background-networking", "--disable-component-update", "--no-first-run", "--virtual-time-budget=4000",
        "--enable-logging=stderr", "--host-resolver-rules=MAP * ~NOTFOUND", "--window-size=1300,2200", "--dump-dom",
        f"--user-data-dir={tmp_path / 'profile'}", (tmp_path / "probe.html").as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "<title>true true 16px 0</title>" in done.stdout  # fits, has its tables, legible, fetched nothing
    assert ":CONSOLE" not in done.stderr
