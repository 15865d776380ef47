"""The command line: `bnfinetune [VERB] key=value ...`, where no verb means train.

Nothing here imports torch before the arguments are known to be good: help, listings and mistakes answer at once. A verb
is one function under `@verb`; its docstring is its help. Those that look something up are in `cli_lookup`.
"""

from __future__ import annotations

import importlib.metadata
import io
import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, cast

from bnfinetune import cli_lookup as _lookup  # noqa: F401  enters its verbs in the table
from bnfinetune.cli_tasks import START, as_lines
from bnfinetune.cli_verbs import VERBS, Arguments, verb
from bnfinetune.cli_words import not_a_verb, parse
from bnfinetune.errors import BnFinetuneError, RecipeError, error_line, say_on_stderr
from bnfinetune.source_paths import check_checkpoint, check_path, check_source

if TYPE_CHECKING:
    from bnfinetune.diagnose.finding import Format
    from bnfinetune.inference.predictor import OnError
    from bnfinetune.inference.rows import RowFormat

_INTERRUPTED, _BROKEN_PIPE = 130, 141  # 128 + SIGINT, 128 + SIGPIPE: what a shell gives


@verb(
    "recipe=NAME|FILE [key=value ...]",
    overrides=True,
    recipe="a shipped recipe's name, or the path of your own YAML file",
)
def train(arguments: Arguments) -> None:
    """Fine-tune a network as a recipe says; the verb may be left out.

    Examples:
      accelerate launch -m bnfinetune recipe=freeze_bn
      bnfinetune recipe=freeze_bn model.name=resnet18 data.source=path/to/images optim.lr=1e-3
      torchrun --nproc_per_node 2 -m bnfinetune recipe=full train.batch_size=4
      bnfinetune recipe=auto data.source=path/to/images
    """
    from bnfinetune.recipe_files import load_recipe, shipped_recipes

    name = arguments.need("recipe", f"write recipe=NAME ({', '.join(shipped_recipes())}) or recipe=FILE.yaml")
    recipe = load_recipe(name, arguments.overrides)
    _answer_at_once(check_source, recipe.data.source)

    if recipe.auto.recipes:
        from bnfinetune.comparison.auto import train_auto

        train_auto(recipe)
        return

    import psutil

    from bnfinetune.training.launch import leave_ranks
    from bnfinetune.training.run import train as run_recipe

    run_recipe(recipe, began=psutil.Process().create_time())
    leave_ranks()


@verb(
    "checkpoint=FOLDER [adapt=none|adabn|mix|ema|tent] [format=table|json] [key=value ...]",
    overrides=True,
    adapt="how a copy of the network adapts to the images, labels unused: none (default), adabn, mix, ema or tent",
    checkpoint="a run folder (its best checkpoint is taken), RUN/best, or any folder that timm saved",
    format="table (default) or json",
)
def evaluate(arguments: Arguments) -> None:
    """Measure a checkpoint on a data set: the one it was trained on, or another that the overrides name.

    Examples:
      bnfinetune evaluate checkpoint=runs/freeze_bn
      bnfinetune evaluate checkpoint=runs/freeze_bn/best data.source=path/to/images format=json
      bnfinetune evaluate checkpoint=runs/freeze_bn adapt=adabn
    """
    from bnfinetune.recipe_files import load_recipe

    checkpoint = _checkpoint(arguments)
    form = arguments.choose("format", "table", "json")
    adapt = arguments.choose("adapt", "none", "adabn", "mix", "ema", "tent")
    overrides = (
        [*arguments.overrides, f"evaluate.adapt={adapt}"] if "adapt" in arguments.options else arguments.overrides
    )
    _answer_at_once(check_path, load_recipe({}, overrides).data.source)

    from bnfinetune.training.launch import leave_ranks
    from bnfinetune.training.measuring.measure import evaluate_checkpoint

    measured = evaluate_checkpoint(checkpoint, overrides)
    leave_ranks()
    if _rank() != 0:
        return
    if form == "json":
        print(json.dumps({split: metrics.scalars() for split, metrics in measured.items()}, indent=2))
        return
    from rich.console import Console

    from bnfinetune.training.reporting.summary import metrics_table

    Console().print(metrics_table(measured))


@verb(
    "checkpoint=FOLDER IMAGE_OR_FOLDER ... [top=5] [format=table|jsonl|csv] [on_error=skip|raise]",
    paths=True,
    checkpoint="a run folder (its best checkpoint is taken), RUN/best, or any folder that timm or export wrote",
    top="classes per image, the likeliest first (default 5); of several labels per image, the table has all from their "
    "thresholds on",
    format="table (default), jsonl: one JSON object per image, or csv: a header, and a row per image",
    on_error="what to do about images that cannot be read: skip (default) names them on stderr and counts them at the "
    "end; raise ends there",
)
def predict(arguments: Arguments) -> None:
    """Predict the classes of images, or of all images below a folder.

    A network of data.task=multilabel gives all classes whose probability reaches the threshold chosen on validation.

    Examples:
      bnfinetune predict checkpoint=runs/freeze_bn photo.jpg
      bnfinetune predict checkpoint=runs/freeze_bn/best path/to/images top=1 format=csv > found.csv
    """
    checkpoint = _checkpoint(arguments)
    form = arguments.choose("format", "table", "jsonl", "csv")
    on_error = arguments.choose("on_error", "skip", "raise")
    top = _whole(arguments, "top", default=5, least=1)
    if not arguments.paths:
        raise RecipeError("predict has nothing to look at; name images or folders of images")

    from bnfinetune.inference.predict import predict as predictions
    from bnfinetune.inference.rows import as_rows

    if _rank() != 0:
        return  # each rank would do the same work
    found = predictions(checkpoint, arguments.paths, top, cast("OnError", on_error))
    for line in as_rows(found, cast("RowFormat", form)):
        print(line, flush=True)


@verb(
    "recipe=NAME|FILE [steps=3] [format=table|lines|json|sarif] [ignore=CODES] [key=value ...]",
    overrides=True,
    recipe="a shipped recipe's name, or the path of your own YAML file",
    steps="updates of the dry run (default 3); 0 judges the set-up alone",
    format="table (default), lines (code, layers, message), json, or sarif, which code hosts show",
    ignore="codes of rules to leave out, comma-separated",
)
def check(arguments: Arguments) -> None:
    """Look for BatchNorm pitfalls in a recipe's set-up and in a few updates; nothing is written.

    The exit code is 1 if a finding is an error.

    Examples:
      bnfinetune check recipe=full train.batch_size=2
      bnfinetune check recipe=mine.yaml format=lines ignore=BN203
      bnfinetune check recipe=mine.yaml format=sarif > bn.sarif
    """
    from bnfinetune.recipe_files import load_recipe, shipped_recipes

    name = arguments.need("recipe", f"write recipe=NAME ({', '.join(shipped_recipes())}) or recipe=FILE.yaml")
    form = arguments.choose("format", "table", "lines", "json", "sarif")
    steps = _whole(arguments, "steps", default=3, least=0)
    recipe = load_recipe(name, arguments.overrides)
    _answer_at_once(check_source, recipe.data.source)

    from bnfinetune.diagnose.finding import render
    from bnfinetune.diagnose.sarif import as_sarif
    from bnfinetune.training.checkup import check_recipe
    from bnfinetune.training.launch import leave_ranks

    found = check_recipe(recipe, steps=steps, ignore=[c for c in arguments.options.get("ignore", "").split(",") if c])
    leave_ranks()
    if _rank() == 0 and form == "sarif":
        print(as_sarif(found, f"recipes/{name}.yaml" if name in shipped_recipes() else name))
    elif _rank() == 0:
        print(render(found, cast("Format", form), color=sys.stdout.isatty()))
    if any(finding.severity == "error" for finding in found):
        sys.stdout.flush()
        raise SystemExit(1)


@verb(
    "checkpoint=FOLDER [images=256] [minutes=5] [page=report.html] [format=table|json] [key=value ...]",
    overrides=True,
    checkpoint="a run folder (its best checkpoint is taken), RUN/best, or any folder that timm saved",
    images="how many images to measure (default 256)",
    minutes="after which no further cause of statistics that do not fit is looked for (default 5)",
    page="where to write the report as a page, with the same numbers as JSON beside it",
    format="table (default) or json",
)
def inspect(arguments: Arguments) -> None:
    """Measure a checkpoint's BatchNorm statistics against data: drift, noise, causes, and which recipe fits.

    Examples:
      bnfinetune inspect checkpoint=runs/full
      bnfinetune inspect checkpoint=runs/full data.source=path/to/images page=report.html
    """
    from bnfinetune.recipe_files import load_recipe

    checkpoint = _checkpoint(arguments)
    form = arguments.choose("format", "table", "json")
    images = _whole(arguments, "images", default=256, least=2)
    minutes = _whole(arguments, "minutes", default=5, least=1)
    _answer_at_once(check_path, load_recipe({}, arguments.overrides).data.source)

    from bnfinetune.training.checkup import inspect_checkpoint

    page = arguments.options.get("page")
    report = inspect_checkpoint(checkpoint, arguments.overrides, images=images, page=page, minutes=minutes)
    print(json.dumps(report.to_dict(), indent=2) if form == "json" else report)


@verb(
    "checkpoint=FOLDER out=FOLDER [key=value ...]",
    overrides=True,
    checkpoint="a run folder (its best checkpoint is taken), RUN/best, or any folder that timm saved",
    out="the new folder",
)
def recalibrate(arguments: Arguments) -> None:
    """Compute a checkpoint's BatchNorm statistics anew from data, and write the network with them to a new folder.

    Examples:
      bnfinetune recalibrate checkpoint=runs/full out=runs/full-precise
      bnfinetune recalibrate checkpoint=runs/full out=adapted data.source=path/to/images recalibrate.data=target
    """
    from bnfinetune.recipe_files import load_recipe

    checkpoint = _checkpoint(arguments)
    out = arguments.need("out", "write out=FOLDER, a folder that does not exist yet")
    _answer_at_once(check_path, load_recipe({}, arguments.overrides).data.source)

    from bnfinetune.training.launch import leave_ranks
    from bnfinetune.training.measuring.recalibrate import recalibrate_checkpoint

    report = recalibrate_checkpoint(checkpoint, out, arguments.overrides)
    leave_ranks()
    if _rank() == 0:
        print(f"{report}\nwritten to {out}")


@verb(
    "checkpoint=FOLDER format=onnx|torch_export|torchvision|timm out=FOLDER [key=value ...]",
    overrides=True,
    checkpoint="a run folder (its best checkpoint is taken), RUN/best, or any folder that timm saved",
    format="onnx, torch_export (a program for torch.export.load), torchvision (a state_dict, where torchvision has the "
    "same network), or timm",
    out="the new folder",
    normalisation="beside (default): preprocessing.json tells mean and std; inside: the graph takes values from 0 to 1 "
    "and normalises by itself (onnx, torch_export)",
    images="how many images to compare the written network with the original on (default 256)",
    tolerance="largest difference of a score that is allowed, as a share of the largest score (default 1e-4)",
    on_difference="what to do about a larger one, or another top-1: raise (default) keeps nothing; note keeps it",
)
def export(arguments: Arguments) -> None:
    """Write a network for another program: BN fused, any batch size, preprocessing beside it, and compared.

    Both networks are compared on the images of the run's evaluation, or on those that data.source= names. What is
    written is again a checkpoint for predict and bnf.load.

    Examples:
      bnfinetune export checkpoint=runs/freeze_bn format=onnx out=exported/onnx
      bnfinetune export checkpoint=runs/freeze_bn format=torch_export normalisation=inside out=exported/program
      bnfinetune export checkpoint=runs/freeze_bn format=torchvision out=exported/tv data.source=path/to/images
    """
    from bnfinetune.recipe_files import load_recipe

    checkpoint = _checkpoint(arguments)
    arguments.need("format", "write format=onnx, torch_export, torchvision or timm")
    form = arguments.choose("format", "onnx", "torch_export", "torchvision", "timm")
    inside = arguments.choose("normalisation", "beside", "inside") == "inside"
    if inside and form not in ("onnx", "torch_export"):
        raise RecipeError(f"normalisation=inside: a format={form} network has no graph to put it into; leave it out")
    out = arguments.need("out", "write out=FOLDER, a folder that does not exist yet")
    keep = arguments.choose("on_difference", "raise", "note") == "note"
    images, tolerance = _whole(arguments, "images", default=256, least=1), _share(arguments, "tolerance", default=1e-4)
    _answer_at_once(check_path, load_recipe({}, arguments.overrides).data.source)

    from bnfinetune.export.checkpoint import export_checkpoint

    if _rank() != 0:
        return  # each rank would do the same work
    written = export_checkpoint(
        checkpoint,
        out,
        form,
        arguments.overrides,
        normalisation_inside=inside,
        images=images,
        tolerance=tolerance,
        keep_differing=keep,
    )
    print(written)


@verb(
    "checkpoint=FOLDER repo=USER/NAME [dry_run=FOLDER] [private=off|on] [license=NAME] [message=TEXT]",
    checkpoint="a run folder (its best checkpoint is taken), RUN/best, or any folder that timm saved",
    repo="the repository on the hub; it is made if it does not exist",
    dry_run="a new folder to write what would be sent to; nothing is sent",
    private="off (default), or on: a new repository that only its owner sees",
    license="as the hub names licences; by default that of the weights before, if it is known",
    message="of the commit (default: Add model)",
)
def push(arguments: Arguments) -> None:
    """Send a network to the Hugging Face hub, with a card of the numbers that its run has measured.

    timm and transformers load it from there. HF_TOKEN, or hf auth login, says who you are.

    Examples:
      bnfinetune push checkpoint=runs/freeze_bn repo=me/digits dry_run=to-be-sent
      bnfinetune push checkpoint=runs/freeze_bn repo=me/digits private=on
    """
    checkpoint = _checkpoint(arguments)
    repo = arguments.need("repo", "write repo=USER/NAME")
    private = arguments.choose("private", "off", "on") == "on"

    from bnfinetune.export.push import push_checkpoint

    if _rank() != 0:
        return
    options = arguments.options
    dry_run, licence = options.get("dry_run"), options.get("license")
    message = options.get("message", "Add model")
    where = push_checkpoint(checkpoint, repo, private=private, licence=licence, message=message, dry_run=dry_run)
    print(f"written to {where}; nothing was sent" if dry_run else f"sent: {where}")


@verb(
    "RUN RUN ... out=FOLDER [choose=all|greedy] [key=value ...]",
    overrides=True,
    paths=True,
    out="the new folder",
    choose="all (default), or greedy: the best on validation, and of the others each that does not make it worse",
)
def average(arguments: Arguments) -> None:
    """Average the weights of finished networks, compute BatchNorm statistics anew where they differ, and write it.

    The networks are run folders, whose best checkpoints are taken, or folders such as RUN/best, of one
    architecture and the same classes. Runs that began at the same weights often have an average that is
    better than each of them.

    Examples:
      bnfinetune average runs/freeze_bn runs/freeze_bn-2 out=runs/averaged
      bnfinetune average runs/full runs/full-2 runs/full-3 out=runs/soup choose=greedy
    """
    from bnfinetune.recipe_files import load_recipe

    out = arguments.need("out", "write out=FOLDER, a folder that does not exist yet")
    choose = arguments.choose("choose", "all", "greedy")
    for path in arguments.paths:
        _answer_at_once(check_checkpoint, path)
    _answer_at_once(check_path, load_recipe({}, arguments.overrides).data.source)

    from bnfinetune.training.launch import leave_ranks
    from bnfinetune.training.measuring.average import average_checkpoints

    averaged = average_checkpoints(arguments.paths, out, arguments.overrides, choose=choose == "greedy")
    leave_ranks()
    if _rank() != 0:
        return
    from rich.console import Console

    from bnfinetune.training.reporting.summary import metrics_table

    Console().print(metrics_table(averaged.metrics))
    print(f"average of {', '.join(averaged.taken)}, {averaged.statistics}, written to {out}")


@verb(
    "recipe='[NAME, NAME, ...]' [seeds=3] [out=FOLDER] [key=value|key='[value, value]' ...] | RUN RUN ...",
    overrides=True,
    paths=True,
    recipe="recipes to compare, as a list; a key= behind it may have a list of values too, and cells are the product",
    cells="or a YAML file that names cells: NAME: {recipe: freeze_bn, optim.lr: 1e-4}",
    seeds="seeds of each cell (default 3)",
    out="the folder of the comparison (default runs/comparison); the same command goes on with it",
    jobs="runs at a time, each in a process with a device of its own (default 1)",
    scheduler="address of a Dask scheduler, whose workers make the runs; they must see out= and the data",
    race="on (default): cells that are surely behind leave after two seeds or more; off: all runs are made",
    least_seeds="seeds after which cells may leave (default 2)",
    budget="after which no new round of seeds begins: '30 minutes' of training, '2000 updates' or '50000 images'",
    format="table (default) or json",
)
def compare(arguments: Arguments) -> None:
    """Compare recipes on your own images, over seeds, paired by image, with intervals; or compare finished runs.

    Every cell and seed is an ordinary run. Validation chooses; the command of the best is printed at the end.

    Examples:
      bnfinetune compare recipe='[freeze_bn, full, lp_ft]' data.source=path/to/images
      bnfinetune compare recipe=freeze_bn optim.lr='[1e-4, 3e-4, 1e-3]' seeds=2 out=runs/rates
      bnfinetune compare runs/freeze_bn runs/full
    """
    from bnfinetune.comparison.budget import Budget
    from bnfinetune.comparison.cells import cells_in, cells_of

    form, race = arguments.choose("format", "table", "json"), arguments.choose("race", "on", "off") == "on"
    seeds, jobs = (_whole(arguments, name, default=number, least=1) for name, number in (("seeds", 3), ("jobs", 1)))
    least, budget = _whole(arguments, "least_seeds", default=2, least=1), arguments.options.get("budget")
    if budget is not None:
        Budget.of(budget)  # a mistake in it answers before torch is imported
    out, files = arguments.options.get("out", "runs/comparison"), arguments.options.get("cells")
    say = print if form == "table" else say_on_stderr
    if arguments.paths:
        from bnfinetune.comparison.race import compare_runs

        found = compare_runs(arguments.paths)
    else:
        wanted = "write recipe='[freeze_bn, full]', cells=FILE.yaml, or the folders of finished runs"
        cells = (
            cells_in(files, arguments.overrides)
            if files
            else cells_of(arguments.need("recipe", wanted), arguments.overrides)
        )
        for source in dict.fromkeys(cell.recipe.data.source for cell in cells):
            _answer_at_once(check_source, source)

        from bnfinetune.comparison.race import compare as run_cells
        from bnfinetune.comparison.runs import cluster

        executor = cluster(arguments.options["scheduler"]) if "scheduler" in arguments.options else None
        found = run_cells(
            cells,
            seeds=seeds,
            out=out,
            jobs=jobs,
            race=race,
            least_seeds=least,
            budget=budget,
            executor=executor,
            say=say,
        )
    print(json.dumps(found.to_dict(), indent=2) if form == "json" else found)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and give its exit code: 0, 2 after a user's mistake, 130 after an interrupt.

    A mistake is one line on stderr, without a traceback, and nothing is written.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a class may have a name that a console cannot show
            stream.reconfigure(errors="backslashreplace")
    try:
        _dispatch(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
    except BnFinetuneError as error:
        _complain(error)
        return 2
    except KeyboardInterrupt:
        if _rank() == 0:
            say_on_stderr("bnfinetune: interrupted")
        return _INTERRUPTED
    except BrokenPipeError:
        # the reader has gone, as `| head` does; what is still buffered must not raise again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _BROKEN_PIPE
    return 0


def _answer_at_once(check: Callable[[str], None], path: str) -> None:
    """Checks a path before torch is imported; several processes tell each other of it once they have met."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        check(path)


def _whole(arguments: Arguments, option: str, *, default: int, least: int) -> int:
    """The value of an option that is a whole number."""
    value = arguments.options.get(option, str(default))
    if not value.isdecimal() or int(value) < least:
        raise RecipeError(f"{option}: found {value!r}; allowed: whole number >= {least}")
    return int(value)


def _share(arguments: Arguments, option: str, *, default: float) -> float:
    """The value of an option that is a number from 0 on."""
    value = arguments.options.get(option, str(default))
    try:
        number = float(value)
    except ValueError:
        number = -1.0
    if not number >= 0:
        raise RecipeError(f"{option}: found {value!r}; allowed: number >= 0")
    return number


def _dispatch(words: list[str]) -> None:
    named = bool(words) and words[0] in VERBS
    if {"-h", "--help"} & set(words):
        from bnfinetune import cli_help

        cli_help.print_verb(words[0], VERBS[words[0]]) if named else cli_help.print_all(VERBS)
    elif words == ["--version"]:
        print(f"bnfinetune {importlib.metadata.version('bnfinetune')}")
    elif named:
        VERBS[words[0]].run(parse(words[0], words[1:]))
    elif words and "=" not in words[0] and not words[0].startswith("-"):
        raise RecipeError(not_a_verb(words[0]))
    elif words:
        train(parse("train", words))
    elif _rank() == 0:
        print(f"bnfinetune [VERB] key=value ...\n\n{as_lines(START)}")


def _checkpoint(arguments: Arguments) -> str:
    checkpoint = arguments.need("checkpoint", "write checkpoint=RUN or checkpoint=RUN/best")
    _answer_at_once(check_checkpoint, checkpoint)
    return checkpoint


def _rank() -> int:
    rank = os.environ.get("RANK", "0")
    return int(rank) if rank.isdecimal() else 0


def _complain(error: BnFinetuneError) -> None:
    """Print one line: on the rank of the error, and if that is on another machine, on the first rank of this one."""
    rank = _rank()
    if error.told:
        return
    if rank and (isinstance(error, RecipeError) or "torch.distributed" not in sys.modules):
        return
    if error.rank is not None and error.rank != rank:
        if os.environ.get("LOCAL_RANK") != "0":
            return
        rank = error.rank
    say_on_stderr(error_line(str(error), rank if rank or _rank() else None))
