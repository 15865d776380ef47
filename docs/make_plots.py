"""Draw the plots of docs/images from the records of docs/benchmarks: `python docs/make_plots.py [--all]`.

Each SVG carries a digest of what it shows. Without `--all`, only those are drawn whose records say something else now.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from plot_panels import Bars, Curves, HeatMap, Plot, Point

DOCS = Path(__file__).parent
IMAGES = DOCS / "images"

TOP1 = "test top-1 [%]"
SEEDS = "lines up and down: lowest and highest seed"
DEVIATIONS = "lines up and down: standard deviation of {} seeds"


def record(bench: str) -> dict[str, Any]:
    """What a bench has found, by key."""
    found: dict[str, Any] = json.loads((DOCS / "benchmarks" / f"{bench}.json").read_text(encoding="utf-8"))
    return found


def batch_size() -> Plot:
    """Photographs of clothes: live against fixed statistics, at all batch sizes that are recorded."""
    names = {"full": "full: BN live", "freeze_bn": "freeze_bn: BN fixed"}
    scores: dict[str, dict[int, list[float]]] = {way: {} for way in names}
    for place, found in record("transfer").items():
        if batch := re.fullmatch(r"clothing, tf_efficientnet_lite0, batches of (\d+)", place):
            for way in names.keys() & found["ways"].keys():
                scores[way][int(batch[1])] = [run["top1"] for run in found["ways"][way].values()]
    curves = {names[way]: [_seeds(batch, runs) for batch, runs in sorted(row.items())] for way, row in scores.items()}
    counts = sorted({len(runs) for row in scores.values() for runs in row.values()})
    seeds = " to ".join(map(str, dict.fromkeys([counts[0], counts[-1]])))
    title = "250 photographs of clothes, 10 kinds, ImageNet backbone"
    note = f"lines up and down: lowest and highest of {seeds} seed{'s' if counts[-1] > 1 else ''}"
    return Plot([Curves("images in a batch", TOP1, curves, title)], note=note)


def short_runs() -> Plot:
    """Running averages against exact statistics of the same weights, by the number of updates."""
    sweeps = {"running averages": "updates", "running averages, momentum 0.01": "updates, momentum 0.01"}
    return _averages({"updates": sweeps}, ["top1"], 1)


def momentum() -> Plot:
    """How wrong running averages are, and what it costs, by momentum."""
    return _averages({"momentum": {"running averages": "momentum"}}, ["mean_error", "top1"], 2)


def running_averages() -> Plot:
    """All sweeps of the bench, the error of the means beside the accuracy."""
    short = {"running averages": "updates", "running averages, momentum 0.01": "updates, momentum 0.01"}
    sweeps = {"momentum": {"running averages": "momentum"}, "updates": short, "batch": {"running averages": "batch"}}
    return _averages(sweeps, ["mean_error", "top1"], 2)


def _averages(sweeps: Mapping[str, Mapping[str, str]], measures: Sequence[str], columns: int) -> Plot:
    """A row of panels for each thing that is varied."""
    found = record("running_averages")["digits"]
    axes = {"batch": "images in a batch", "updates": "updates in all", "momentum": "momentum"}
    panels = []
    for varied, curves in sweeps.items():
        for measure in measures:
            drawn = {name: _deviations(found["rows"], sweep, measure) for name, sweep in curves.items()}
            if measure == "top1":
                drawn["precise-BN"] = _deviations(found["rows"], varied, "top1_precise")
            y = TOP1 if measure == "top1" else "error of means [std]"
            panels.append(Curves(axes[varied], y, drawn, percent=measure == "top1"))
    return Plot(panels, columns, DEVIATIONS.format(found["seeds"]))


def _deviations(rows: Iterable[Mapping[str, Any]], sweep: str, measure: str) -> list[Point]:
    mine = [(float(row["value"]), *row[measure]) for row in rows if row["sweep"] == sweep]
    deviates = measure != "mean_error"
    return [Point(x, y, y - deviation * deviates, y + deviation * deviates) for x, y, deviation in mine]


def batch_mix() -> Plot:
    """Batches of a few classes: the same weights read in three ways, and a frozen network."""
    found = record("batch_mix")["classes in a batch"]["top1"]
    names = list(next(iter(found.values())))
    curves = {name: [_seeds(float(together), row[name]) for together, row in found.items()] for name in names}
    return Plot([Curves("classes in a training batch of 20", TOP1, curves)], note=SEEDS)


def domain_mix() -> Plot:
    """Batches of one domain or both: what evaluation normalises by decides."""
    found = record("batch_mix")["domains in a batch"]["top1"]
    columns = ["as in training", "running averages", "precise-BN", "precise-BN of each domain"]
    cells = [[mean(row[column]) if column in row else None for column in columns] for row in found.values()]
    shown = ["as in\ntraining", "running\naverages", "precise-BN\nof both", "precise-BN\nof each"]
    rows = [name.replace(", ", ",\n") for name in found]
    return Plot([HeatMap(rows, shown, cells, x="evaluation normalises by")], note="test top-1 in %, mean of the seeds")


def foreign_statistics() -> Plot:
    """Probes on photographs and drawings, with their own statistics to a growing part."""
    columns = ["stored", "0.1", "0.25", "0.5", "0.75", "re-estimated", "auto"]
    probes = {key: row for key, row in record("photo_statistics").items() if key.startswith("probe: ")}
    found = {key.removeprefix("probe: "): row["top1"] for key, row in probes.items()}
    rows = sorted(found)
    cells = [[found[name][column] for column in columns] for name in rows]
    names = [
        name.replace("tf_efficientnet_lite0", "EfficientNet").replace("mobilenetv2_100", "MobileNet") for name in rows
    ]
    shown = ["stored", "0.1", "0.25", "0.5", "0.75", "all", "auto"]
    table = HeatMap(names, shown, cells, "stored", "weight of the images' own statistics")
    return Plot([table], note="test top-1 in %; colour: gained (blue) or lost (red) against the stored statistics")


def parameterisation() -> Plot:
    """Behind a frozen BN, or with it absorbed: the same function, another path."""
    names = {"W, g and b apart": "separate", "absorbed": "absorbed"}
    rows = record("parameterisation")["bnf_resnet on digits"]["rows"]
    panels = []
    for decay in sorted({row["decay"] for row in rows}):
        mine = [row for row in rows if row["decay"] == decay]
        curves = {name: [_seeds(row["lr"], row[key]) for row in mine] for name, key in names.items()}
        panels.append(Curves("learning rate", TOP1, curves, f"weight decay {decay:g}", bottom=70.0))
    return Plot(panels, 2, f"{SEEDS}; the axis begins at 70")


JOBS = (
    *("plain BN", "affine frozen", "running statistics normalise", "statistics fixed"),
    *("statistics and affine fixed", "affine and head alone learn"),
)


def one_layer() -> Plot:
    """One job of BN changed at a time, by batch size."""
    return _switches(JOBS)


def ways_out() -> Plot:
    """Plain BN and what stands in its place, by batch size."""
    every = next(iter(record("switches").values()))["top1"]
    return _switches(["plain BN", *(name for name in every if name not in JOBS), "statistics and affine fixed"])


def _switches(rows: Sequence[str]) -> Plot:
    by_batch = {int(key.rpartition(" ")[2]): found["top1"] for key, found in record("switches").items()}
    batches = sorted(by_batch)
    cells = [[mean(by_batch[batch][row]) for batch in batches] for row in rows]
    table = HeatMap(rows, list(map(str, batches)), cells, x="images in a batch", rules=[1], low=50.0)
    return Plot([table], note="test top-1 in %, mean of the seeds; colour from 50 to 100")


def domain_shift() -> Plot:
    """Corruptions against ways to adapt."""
    found = record("domain_shift")["characters"]["top1"]
    columns = list(found["none"])
    cells = [[row[column][0] for column in columns] for row in found.values()]
    shown = [column.replace(" ", "\n") for column in columns]
    return Plot([HeatMap(list(found), shown, cells)], note="test top-1 in %, mean of 3 seeds")


def frozen_bn() -> Plot:
    """Time of a training step, for each network and way to freeze."""
    panels = []
    for key, found in record("frozen_bn").items():
        if key.endswith(" on cpu"):
            bars = {row["name"]: Point(0, row["ratio"], *row["spread"]) for row in found["rows"]}
            panels.append(Bars("time / without norm", bars, key.removesuffix(" on cpu"), reference=1.0))
    names = list(dict.fromkeys(name for panel in panels for name in panel.bars))
    whole = [Bars(p.x, {n: p.bars.get(n, Point(0, 0, 0, 0)) for n in names}, p.title, p.reference) for p in panels]
    return Plot(whole, 2, "black lines: the middle half of the rounds; dotted: the network without norm")


def _seeds(x: float, runs: Sequence[float]) -> Point:
    return Point(x, mean(runs), min(runs), max(runs))


# Every plot by its file's name: the record it is made from, and what makes it.
PLOTS: dict[str, tuple[str, Callable[[], Plot]]] = {
    "batch_size": ("transfer", batch_size),
    "short_runs": ("running_averages", short_runs),
    "momentum": ("running_averages", momentum),
    "running_averages": ("running_averages", running_averages),
    "batch_mix": ("batch_mix", batch_mix),
    "domain_mix": ("batch_mix", domain_mix),
    "foreign_statistics": ("photo_statistics", foreign_statistics),
    "parameterisation": ("parameterisation", parameterisation),
    "one_layer": ("switches", one_layer),
    "ways_out": ("switches", ways_out),
    "domain_shift": ("domain_shift", domain_shift),
    "frozen_bn": ("frozen_bn", frozen_bn),
}


def digest(plot: Plot) -> str:
    """Of all that a plot shows."""
    return "sha256:" + hashlib.sha256(json.dumps(plot.content()).encode()).hexdigest()


def digest_of(path: Path) -> str | None:
    """What the drawn file says that it shows."""
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    found = re.search(r"<dc:identifier>(sha256:\w+)</dc:identifier>", text)
    return found[1] if found else None


def main(arguments: Sequence[str]) -> None:
    """Draw what is not current, or with `--all` everything."""
    for name, (bench, make) in PLOTS.items():
        plot, path = make(), IMAGES / f"{name}.svg"
        if "--all" in arguments or digest_of(path) != digest(plot):
            plot.save(path, str(make.__doc__), f"docs/benchmarks/{bench}.json", digest(plot))
            print(f"drew {path}")


if __name__ == "__main__":
    main(sys.argv[1:])
