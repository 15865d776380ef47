"""Accuracy of recipes by batch size on the embedded data: the README's table.

    python -m tests.bench.recipe_table --recipes full freeze_bn --batches 2 8 32 --seeds 3

Every run has the same budget: 15 epochs over 200 labelled digits. The best epoch is chosen on the validation split and
measured on the 1,200 test images, which nothing else touches. Writes docs/recipe_table.md and docs/recipe_table.json.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
import tempfile
from pathlib import Path

import torch
from tqdm import tqdm

import bnfinetune as bnf

DOCS = Path(__file__).parents[2] / "docs"
RECIPES = ("from_scratch", "full", "freeze_stats", "freeze_bn", "precise_bn", "freeze_tail", "stoch_norm")


def accuracy(recipe: str, batch: int, seed: int) -> float:
    """Test top-1 of one run, in percent."""
    with tempfile.TemporaryDirectory() as folder:
        result = bnf.finetune(recipe, run={"dir": f"{folder}/run", "seed": seed}, train={"batch_size": batch})
    return 100 * result.after["test"].top1


def table(results: dict[str, dict[int, list[float]]]) -> str:
    """Markdown: one row per recipe, mean and standard deviation over seeds per batch size."""
    batches = list(next(iter(results.values())))
    lines = ["| recipe | " + " | ".join(f"batches of {batch}" for batch in batches) + " |"]
    lines.append("| --- |" + " ---: |" * len(batches))
    for recipe, row in results.items():
        cells = [f"{statistics.mean(v):.1f} ± {statistics.stdev(v) if len(v) > 1 else 0:.1f}" for v in row.values()]
        lines.append(f"| `{recipe}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--recipes", nargs="+", default=RECIPES)
    parser.add_argument("--batches", nargs="+", type=int, default=[2, 8, 32])
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    results: dict[str, dict[int, list[float]]] = {r: {b: [] for b in options.batches} for r in options.recipes}
    runs = [(r, b, seed) for seed in range(options.seeds) for r in options.recipes for b in options.batches]
    for recipe, batch, seed in tqdm(runs, unit="run"):
        results[recipe][batch].append(accuracy(recipe, batch, seed))
    machine = f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    date = datetime.datetime.now(tz=datetime.UTC).date().isoformat()
    setting = f"{options.seeds} seeds, mean ± standard deviation of test top-1 in %; {machine}, {date}"
    (DOCS / "recipe_table.json").write_text(json.dumps({"setting": setting, "results": results}, indent=2) + "\n")
    text = f"# Recipes by batch size\n\n{__doc__.partition(chr(10))[2].strip()}\n\n{setting}\n\n{table(results)}\n"
    (DOCS / "recipe_table.md").write_text(text)
    print(table(results))


if __name__ == "__main__":
    main()
