"""The command line: help, listings, dispatch, and one line for every mistake, before torch is imported."""

import json
import os
import socket
import subprocess
import sys
import types
from collections import namedtuple
from pathlib import Path

import pytest

from bnfinetune import cli
from bnfinetune.cli import main
from bnfinetune.cli_verbs import Verb
from bnfinetune.errors import DataError, RecipeError
from bnfinetune.recipe import Recipe
from bnfinetune.recipe_files import load_recipe, shipped_recipes
from bnfinetune.recipe_keys import recipe_schema

RECIPE_TEXT = "# Mine.\nbase: freeze_bn\noptim: {lr: 0.5}\n"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty working folder with one recipe, one misspelt recipe and one image."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text(RECIPE_TEXT)
    (tmp_path / "wrong.yaml").write_text("optim: {lr: fast}\n")
    (tmp_path / "broken.yaml").write_text("optim: [")
    (tmp_path / "bare.yaml").write_text("lr: 0.5\n")
    (tmp_path / "section.yaml").write_text("model: resnet50\n")
    (tmp_path / "run").mkdir()
    (tmp_path / "photo.jpg").write_bytes(b"")
    return tmp_path


def run_cli(*words: str, **settings) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "bnfinetune", *words],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        **settings,
    )


BAD_INPUT = [
    # the words of the command line, and what the line on stderr must say
    ("train", "recipe= is missing; write recipe=NAME"),
    ("optim.lr=1", "recipe= is missing"),
    ("recipe=", "recipe= has no value"),
    ("recipe=freez_bn", "no shipped recipe 'freez_bn'; did you mean freeze_bn?"),
    ("recipe=nothing_like_it", "shipped: "),
    ("recipe=mine", "your own file is recipe=./mine.yaml"),
    ("recipe=other.yaml", "no file other.yaml"),
    ("recipe=full.yaml", "recipe=full is shipped"),
    ("recipe=./run", "no file run"),
    ("recipe=wrong.yaml", "optim.lr: found 'fast' in wrong.yaml; allowed: number > 0"),
    ("recipe=broken.yaml", "broken.yaml: not YAML: line 1"),
    ("recipe=/dev/zero", "no file"),
    (f"recipe={'x' * 5000}.yaml", "no file"),
    ("recipe=a\0b.yaml", "no file a\\x00b.yaml"),
    ("recipe=full recipe=full", "recipe= is given twice"),
    ("--recipe=full", "without dashes"),
    ("-v", "without dashes"),
    ("recipe=full --optim.lr 1", "without dashes"),
    ("trian recipe=full", "no such verb; did you mean train?"),
    ("freeze_bn", "did you mean recipe=freeze_bn?"),
    ("mine.yaml", "did you mean recipe=mine.yaml?"),
    ("recipe=full fast", "fast: an override is written key=value"),
    ("recipe=full optim.lr=", "optim.lr= has no value; write optim.lr=null"),
    ("recipe=full =1", "'' is not a key"),
    ("recipe=full optim..lr=1", "'optim..lr' is not a key"),
    ("recipe=full optim.lrr=1", "optim.lrr: no such key; did you mean optim.lr=1?"),
    ("recipe=full lr=1", "did you mean optim.lr=1?"),
    ("recipe=full optimizer.lr=1", "optimizer: no such key; did you mean optim?"),
    ("recipe=full nonsense=1", "allowed: name, model, data"),
    ("recipe=full base=freeze_bn", "base: no such key"),
    ("recipe=full optim.lr=fast", "optim.lr: found 'fast'; allowed: number > 0"),
    ("recipe=full optim.lr=0", "optim.lr: found 0; allowed: number > 0"),
    ("recipe=full optim.lr=.nan", "optim.lr: found nan"),
    ("recipe=full optim.lr=true", "optim.lr: found true"),
    ("recipe=full optim.lr=[1]", "optim.lr: found [1]"),
    ("recipe=full optim.lr=null", "optim.lr: found null"),
    ("recipe=full optim=adam", "optim: found 'adam', where a section is; did you mean optim.name=adam?"),
    ("recipe=full optim.schedule=cosine", "where a section is; did you mean optim.schedule.name=cosine?"),
    ("recipe=full model=resnet50", "model: found 'resnet50', where a section is; did you mean model.name=resnet50?"),
    ("recipe=full data=photos", "did you mean data.source=photos?"),
    ("recipe=full bn=frozen", "did you mean bn.affine=frozen?"),
    ("recipe=full recalibrate=eval", "did you mean 'recalibrate.at=[eval]'?"),
    ("recipe=full train=3", "train: found 3; allowed: the keys epochs, steps"),
    ("recipe=full epochs=3", "epochs: no such key; did you mean train.epochs=3?"),
    ("recipe=full batch_size=32", "did you mean train.batch_size=32?"),
    ("recipe=full learning_rate=0.1", "did you mean optim.lr=0.1?"),
    ("recipe=full optimizer=sgd", "optimizer: no such key; did you mean optim.name=sgd?"),
    (f"recipe=full arch={'x' * 70}", "did you mean model.name?"),
    ("recipe=full lr=", "lr= has no value, and is no key; did you mean optim.lr=VALUE?"),
    ("recipe=full --lr 1e-3", "--lr: arguments are written key=value, without dashes; did you mean optim.lr=1e-3?"),
    ("recipe=full --batch-size=32", "did you mean train.batch_size=32?"),
    ("recipe=full --epochs", "did you mean train.epochs=VALUE?"),
    ("--recipe full", "did you mean recipe=full?"),
    ("recipe=full --verbose", "without dashes, such as recipe=freeze_bn"),
    ("predict --checkpoint run", "did you mean checkpoint=run?"),
    ("predict --lr 3", "without dashes, such as"),
    ("recipe=bare.yaml", "lr: no such key in bare.yaml; did you mean optim.lr: 0.5?"),
    ("recipe=section.yaml", "model: found 'resnet50' in section.yaml, where a section is; did you mean model.name: "),
    ("help nonsense", "nonsense: no such verb, key or recipe; bnfinetune --help lists all"),
    ("help optim.lrr", "optim.lrr: no such verb, key or recipe; did you mean optim.lr"),
    ("help trian", "did you mean train"),
    ("cp freeze_bn", "cp takes a shipped recipe and a new file"),
    ("cp freez_bn x.yaml", "freez_bn: no shipped recipe; did you mean freeze_bn?"),
    ("cp mine.yaml x.yaml", "your own file is copied by the cp of the shell"),
    ("cp freeze_bn x", "x: a recipe's file ends in .yaml; write x.yaml"),
    ("cp freeze_bn mine.yaml", "mine.yaml: there is such a file already; choose another name"),
    ("cp freeze_bn nowhere/x.yaml", "nowhere/x.yaml: No such file or directory; choose another place"),
    ("completion", "completion: name one shell: bash, zsh, fish"),
    ("completion csh", "completion: found 'csh'; name one shell"),
    ("env format=xml", "format: found 'xml'; allowed: table | json"),
    ("recipe=full optim.schedule.name=cosin", "did you mean cosine?"),
    ("recipe=full train.epochs=0", "train.epochs: found 0; allowed: whole number >= 1"),
    ("recipe=full train.epochs=1.5", "train.epochs: found 1.5; allowed: whole number"),
    ("recipe=full train.epochs='3'", "train.epochs: found '3'; allowed: whole number"),
    ("recipe=full train.mixed_precision=fp8", "found 'fp8'; allowed: no | fp16 | bf16"),
    ("recipe=full run.seed=-1", "run.seed: found -1"),
    ("recipe=full data.classes=yes", "data.classes: found true; allowed: whole number >= 1 | list of text | null"),
    ("recipe=full data.source=./petz", "there is no folder or file ./petz"),
    ("recipe=full data.source=phooto.jpg", "'phooto.jpg' is no local folder; did you mean 'photo.jpg'?, and"),
    ("recipe=full data.source=petz", "'petz' is no local folder, and the Hugging Face hub cannot be reached"),
    ("check recipe=full data.source=run/petz", "there is no folder or file run/petz"),
    ("evaluate checkpoint=photo.jpg", "photo.jpg is a file; name the folder it lies in: checkpoint=."),
    ("evaluate checkpoint=run data.source=./petz", "there is no folder or file ./petz"),
    ("recipe=full run.dir=${oc.env:HOME}", "asks for interpolation"),
    ("recipe=full name=../up", "name: found '../up'"),
    ("recipe=full data.val_fraction=1", "data.val_fraction: found 1; allowed: number > 0, < 1"),
    ("recipe=full data.augment.scale=[0.5]", "data.augment.scale: found [0.5]; allowed: list of 2"),
    ("recipe=full data.augment.scale=[1,0.5]", "the lower bound comes first"),
    ("recipe=full data.streaming=true", "set train.steps"),
    ("recipe=full model.kwargs=3", "model.kwargs: found 3; allowed: mapping"),
    ("recipe=full model.name=null", "model.name: found null; allowed: text, not empty"),
    ("recipe=full bn.train_stats=bach", "did you mean batch?"),
    ("recipe=full bn.layers=[*.bn1]", "text that begins with * is quoted"),
    ("recipe=full bn.layers=[", "bn.layers: not YAML"),
    ("recipe=full bn=[{},{}] bn.2.affine=frozen", "bn is a list of 2, counted from 0"),
    ("recipe=full bn=[{},{}] bn.affine=frozen", "write bn.0.affine"),
    ("recipe=full bn.0.affine=frozen", "bn is one section here; write bn.affine"),
    ("recipe=full optim.lr=0 train.epochs=0 run.seed=-1", "(and 2 more mistakes)"),
    ("show optim.lrr=1", "did you mean optim.lr=1?"),
    ("show recipe=ful", "did you mean full?"),
    ("recipes all", "all: no argument of recipes; allowed: nothing"),
    ("evaluate", "checkpoint= is missing"),
    ("evaluate checkpoint=nowhere", "checkpoint: there is no folder nowhere"),
    ("evaluate checkpoint=run format=xml", "format: found 'xml'; allowed: table | json"),
    ("evaluate checkpoint=run data.sorce=x", "data.sorce: no such key; did you mean data.source=x?"),
    ("predict checkpoint=run", "nothing to look at"),
    ("predict photo.jpg", "checkpoint= is missing"),
    ("predict checkpoint=run photo.jpg top=0", "top: found '0'; allowed: whole number >= 1"),
    ("predict checkpoint=run photo.jpg top=all", "top: found 'all'"),
    (
        "predict checkpoint=run photo.jpg format=json",
        "format: found 'json'; allowed: table | jsonl | csv; did you mean jsonl?",
    ),
    ("predict checkpoint=run photo.jpg on_error=stop", "on_error: found 'stop'; allowed: skip | raise"),
    ("predict chekpoint=run photo.jpg", "chekpoint=run: no argument of predict; did you mean checkpoint?"),
]


class TestBadInput:
    @pytest.mark.parametrize(("words", "said"), BAD_INPUT, ids=[ascii(words[:60]) for words, _ in BAD_INPUT])
    def test_gets_one_line_and_exit_code_2_and_writes_nothing(self, folder, capfd, words, said):
        before = sorted(folder.rglob("*"))
        assert main(words.split()) == 2
        out, err = capfd.readouterr()
        assert out == ""
        assert err.startswith("bnfinetune: error: ")
        assert err.count("\n") == 1
        assert said in err
        assert sorted(folder.rglob("*")) == before

    def test_is_told_before_torch_is_imported(self, folder):
        code = (
            "import sys, io, contextlib; from bnfinetune.cli import main\n"
            f"for words in {[words for words, _ in BAD_INPUT]!r}:\n"
            "    with contextlib.redirect_stderr(io.StringIO()): assert main(words.split()) == 2, words\n"
            "    assert 'torch' not in sys.modules, words\n"
        )
        subprocess.run([sys.executable, "-c", code], check=True, timeout=60)

    def test_comes_out_of_the_module_the_same_way(self, folder):
        done = run_cli("recipe=full", "optim.lr=0")
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr == "bnfinetune: error: optim.lr: found 0; allowed: number > 0 | auto\n"

    def test_cannot_paint_the_terminal(self, capfd):
        assert main(["recipe=full", "\x1b[31mred=1"]) == 2
        assert main(["recipe=full", "optim.lr=\x1b[31m"]) == 2
        assert main(["recipe=\x1b]0;title\x07/x"]) == 2
        assert main(["recipe=full", "model.name=\udcff"]) == 2
        err = capfd.readouterr().err
        assert err.count("\n") == 4
        assert err.replace("\n", "").isprintable()

    def test_on_several_ranks_is_told_once(self, monkeypatch, capfd):
        monkeypatch.setenv("RANK", "1")
        assert main(["recipe=ful"]) == 2
        assert capfd.readouterr().err == ""
        monkeypatch.setenv("RANK", "0")
        assert main(["recipe=ful"]) == 2
        assert capfd.readouterr().err.count("\n") == 1

    def test_of_one_rank_alone_is_not_lost(self, monkeypatch, capfd):
        """Rank 1 may meet an unreadable image that rank 0 never opens."""

        def fail(arguments):
            raise DataError("data: images/7.png is unreadable")

        monkeypatch.setitem(cli.VERBS, "show", Verb(fail, "", {}))
        monkeypatch.setenv("RANK", "1")
        assert "torch.distributed" in sys.modules
        assert main(["show"]) == 2
        assert capfd.readouterr().err == "bnfinetune: error: [rank 1] data: images/7.png is unreadable\n"


class TestAnswersWithoutTorch:
    @pytest.mark.parametrize(
        "words",
        [
            ["--help"],
            ["-h"],
            ["recipe=full", "--help"],
            ["--version"],
            [],
            ["recipes"],
            ["schema"],
            ["help"],
            ["help", "optim.lr", "train", "freeze_bn", "batch_size"],
            ["completion", "bash"],
            ["completion", "zsh"],
            ["completion", "fish"],
            ["show", "recipe=freeze_bn", "optim.lr=0.5"],
            *([verb, "--help"] for verb in cli.VERBS),
        ],
        ids=" ".join,
    )
    def test_every_question(self, words):
        code = (
            "import sys; from bnfinetune.cli import main; code = main(sys.argv[1:]); "
            "heavy = {'torch', 'timm', 'datasets', 'accelerate', 'numpy', 'matplotlib'} & set(sys.modules); "
            "sys.exit(f'{code} {heavy}' if code or heavy else 0)"
        )
        done = subprocess.run(
            [sys.executable, "-c", code, *words], capture_output=True, text=True, check=False, timeout=60
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout
        assert done.stderr == ""

    def test_help_names_every_verb_and_every_key_with_its_values_in_100_columns(self, capsys):
        assert main(["--help"]) == 0
        out = capsys.readouterr().out
        assert max(map(len, out.splitlines())) <= 100
        assert "\x1b" not in out
        words = " ".join(out.split())
        for verb in cli.VERBS.values():
            assert verb.summary in words
        for section in recipe_schema().walk():
            assert " ".join(section.help.split()) in words
            for key in section.keys:
                rows = [line for line in out.splitlines() if line.startswith(key.leaf)]
                assert any(key.allowed.split()[0] in row for row in rows), key.path

    @pytest.mark.parametrize("verb", cli.VERBS)
    def test_help_of_a_verb_names_its_options(self, verb, capsys):
        assert main([verb, "--help"]) == 0
        out = capsys.readouterr().out
        assert out.startswith(f"Usage: bnfinetune {verb}")
        assert all(f"{option}=" in out for option in cli.VERBS[verb].options)

    def test_every_recipe_is_listed_with_its_purpose(self, capsys):
        assert main(["recipes"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert [line.split()[0] for line in lines] == list(shipped_recipes())
        assert all(len(line.split()) > 3 and line.endswith(".") for line in lines)

    def test_what_show_prints_is_the_same_recipe(self, folder, capsys):
        assert main(["show", "recipe=mine.yaml", "bn.layers=*.bn1", "train.mixed_precision=bf16"]) == 0
        (folder / "shown.yaml").write_text(capsys.readouterr().out)
        recipe = load_recipe("shown.yaml")
        assert recipe == load_recipe("mine.yaml", ["bn.layers=*.bn1", "train.mixed_precision=bf16"])
        assert (recipe.name, recipe.optim.lr, recipe.bn.layers) == ("mine", 0.5, "*.bn1")

    def test_show_without_a_recipe_prints_the_defaults(self, folder, capsys):
        assert main(["show"]) == 0
        (folder / "defaults.yaml").write_text(capsys.readouterr().out)
        assert load_recipe("defaults.yaml") == Recipe()

    def test_a_reader_that_leaves_early_is_no_error(self):
        read, write = os.pipe()
        os.close(read)
        done = subprocess.run(
            [sys.executable, "-m", "bnfinetune", "--help"],
            stdout=write,
            stderr=subprocess.PIPE,
            timeout=60,
            check=False,
        )
        os.close(write)
        assert (done.returncode, done.stderr) == (141, b"")


class TestDispatch:
    @pytest.fixture
    def calls(self, monkeypatch):
        """Put recorders in the place of the modules behind the verbs."""
        calls = []
        Scores = namedtuple("Scores", "top1")
        Scores.scalars = lambda self: {"top1": self.top1}

        def predictions(checkpoint, paths, top, on_error):
            calls.append((checkpoint, paths, top, on_error))
            for path in paths:
                ranked = [{"label": "cat", "probability": 0.75}, {"label": "dog", "probability": 0.25}][:top]
                yield {"path": path, **ranked[0], "top": ranked}

        rooms = {
            "training.run": {"train": lambda recipe, began: calls.append(recipe)},
            "training.launch": {"leave_ranks": lambda: None},
            "training.measuring.measure": {
                "evaluate_checkpoint": lambda *words: calls.append(words) or {"test": Scores(0.5)}
            },
            "inference.predict": {"predict": predictions},
            "training.reporting.summary": {"metrics_table": lambda rows: f"table of {', '.join(rows)}"},
        }
        for room, names in rooms.items():
            module = types.ModuleType(f"bnfinetune.{room}")
            vars(module).update(names)
            monkeypatch.setitem(sys.modules, module.__name__, module)
        return calls

    @pytest.mark.parametrize("verb", [[], ["train"]])
    def test_train_is_the_verb_that_may_be_left_out(self, calls, verb):
        assert main([*verb, "recipe=bn_only", "optim.lr=0.5"]) == 0
        assert calls == [load_recipe("bn_only", ["optim.lr=0.5"])]

    def test_the_recipe_may_stand_anywhere(self, calls):
        assert main(["optim.lr=0.5", "recipe=bn_only"]) == 0
        assert calls == [load_recipe("bn_only", ["optim.lr=0.5"])]

    def test_evaluate_hands_over_the_checkpoint_and_overrides(self, calls, folder, capsys):
        assert main(["evaluate", "data.source=x", "checkpoint=run", "format=json"]) == 0
        assert calls == [("run", ["data.source=x"])]
        assert json.loads(capsys.readouterr().out) == {"test": {"top1": 0.5}}
        assert main(["evaluate", "checkpoint=run"]) == 0
        assert capsys.readouterr().out == "table of test\n"

    def test_predict_hands_over_paths_and_prints_a_line_each(self, calls, folder, capsys):
        (folder / "a=b.png").touch()
        assert main(["predict", "checkpoint=run", "photo.jpg", "a=b.png", "top=1", "format=jsonl"]) == 0
        assert calls == [("run", ["photo.jpg", "a=b.png"], 1, "skip")]
        records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert [record["path"] for record in records] == ["photo.jpg", "a=b.png"]
        assert records[0]["top"] == [{"label": "cat", "probability": 0.75}]
        assert main(["predict", "checkpoint=run", "photo.jpg"]) == 0
        assert capsys.readouterr().out.split() == ["photo.jpg", "cat", "75.0%", "dog", "25.0%"]

    def test_only_rank_0_prints_measurements(self, calls, folder, monkeypatch, capsys):
        monkeypatch.setenv("RANK", "1")
        assert main(["evaluate", "checkpoint=run", "format=json"]) == 0
        assert capsys.readouterr().out == ""

    def test_an_interrupt_is_one_line_and_exit_code_130(self, monkeypatch, capfd):
        def interrupted(arguments):
            raise KeyboardInterrupt

        monkeypatch.setitem(cli.VERBS, "show", Verb(interrupted, "", {}))
        assert main(["show"]) == 130
        assert capfd.readouterr().err == "bnfinetune: interrupted\n"

    def test_a_message_of_several_lines_becomes_one(self, monkeypatch, capfd):
        def failing(arguments):
            raise RecipeError("first\nsecond\r\nthird")

        monkeypatch.setitem(cli.VERBS, "show", Verb(failing, "", {}))
        assert main(["show"]) == 2
        assert capfd.readouterr().err == "bnfinetune: error: first second third\n"

    def test_our_own_faults_keep_their_traceback(self, monkeypatch):
        def broken(arguments):
            raise ZeroDivisionError

        monkeypatch.setitem(cli.VERBS, "show", Verb(broken, "", {}))
        with pytest.raises(ZeroDivisionError):
            main(["show"])


def test_the_console_script_is_the_same_program():
    script = Path(sys.executable).with_name("bnfinetune")
    done = subprocess.run([script, "recipes"], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == run_cli("recipes").stdout


def test_a_line_on_stderr_is_one_write():
    """So that lines of several ranks on one terminal never run together."""
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)  # keeps writes apart
    with here, there:
        script = "from bnfinetune.errors import say_on_stderr; say_on_stderr('x' * 300)"
        subprocess.run([sys.executable, "-c", script], stderr=there, check=True)
        assert here.recv(4096) == b"x" * 300 + b"\n"
