"""The verbs that look something up: what they print is true, and a shell that reads it completes."""

import json
import shlex
import shutil
import subprocess
import sys
from urllib.request import urlopen

import pytest
import yaml

from bnfinetune import cli, machine
from bnfinetune.cli import main
from bnfinetune.cli_completion import script, words_of
from bnfinetune.cli_tasks import START, TASKS
from bnfinetune.cli_words import parse
from bnfinetune.recipe_files import load_recipe, recipe_header, shipped_recipes
from bnfinetune.recipe_hints import ELSEWHERE
from bnfinetune.recipe_keys import RecipeKey, find_key, recipe_schema

KEYS = {key.path: key for section in recipe_schema().walk() for key in section.keys}


class TestTasks:
    def test_alone_the_program_names_the_five_common_lines(self, capsys):
        assert main([]) == 0
        out = capsys.readouterr().out
        assert len(START) == 5
        assert all(f"  {task}\n      {line}" in out for task, line in START.items())
        assert max(map(len, out.splitlines())) < 80

    def test_other_ranks_of_a_launch_are_silent(self, monkeypatch, capsys):
        monkeypatch.setenv("RANK", "1")
        assert main([]) == 0
        assert capsys.readouterr().out == ""

    @pytest.mark.parametrize("line", [*TASKS.values(), *START.values()])
    def test_every_line_is_one_that_the_command_line_takes(self, line):
        program, *words = shlex.split(line)
        if program == "accelerate":
            words = words[words.index("bnfinetune") + 1 :]
        if words == ["--help"]:
            return
        verb = words[0] if words[0] in cli.VERBS else "train"
        arguments = parse(verb, words[verb == words[0] :])
        recipe = arguments.options.get("recipe", "full")
        load_recipe(recipe if recipe in shipped_recipes() else "full", arguments.overrides)
        assert len(line) < 80

    def test_help_opens_with_them(self, capsys):
        assert main(["--help"]) == 0
        out = capsys.readouterr().out
        assert all(line in out for line in TASKS.values())
        assert out.index("common tasks") < out.index("\nverbs") < out.index("optim: ")

    def test_help_fits_80_columns(self, monkeypatch, capsys):
        monkeypatch.setattr("bnfinetune.cli_help._Console.is_terminal", True)
        monkeypatch.setenv("COLUMNS", "80")
        monkeypatch.setenv("TERM", "dumb")
        assert main(["--help"]) == 0
        out = capsys.readouterr().out
        assert max(map(len, out.splitlines())) <= 80
        assert "default 0.001" in out
        assert len([line for line in out.splitlines() if line.startswith("lr ")]) == 1


class TestHelp:
    def test_of_a_key_says_its_meaning_values_default_and_who_sets_it(self, capsys):
        assert main(["help", "optim.lr"]) == 0
        out = " ".join(capsys.readouterr().out.split())
        assert out.startswith("optim.lr meaning peak learning rate")
        assert "values number > 0 | auto default auto recipes bn_only 0.01" in out

    @pytest.mark.parametrize("name", shipped_recipes())
    def test_of_a_key_names_every_recipe_that_sets_it(self, name, capsys):
        """By way of the files themselves, read by another reader."""

        def leaves(tree, prefix=""):
            for key, value in tree.items():
                if isinstance(value, dict):
                    yield from leaves(value, f"{prefix}{key}.")
                elif isinstance(value, list) and value and isinstance(value[0], dict):
                    for item in value:
                        yield from leaves(item, f"{prefix}{key}.")
                else:
                    yield f"{prefix}{key}"

        written = yaml.safe_load(shipped_recipes()[name].read_text()) or {}
        for key in {*leaves(written)} - {"base"}:
            assert main(["help", key]) == 0
            recipes = " ".join(capsys.readouterr().out.partition("recipes ")[2].split())
            assert f" {name} " in f" {recipes}"

    def test_of_a_last_part_says_all_keys_that_end_so(self, capsys):
        assert main(["help", "batch_size"]) == 0
        out = capsys.readouterr().out
        assert "train.batch_size" in out
        assert "evaluate.batch_size" in out

    def test_of_a_section_and_of_a_verb_of_the_same_name_says_both(self, capsys):
        assert main(["help", "train"]) == 0
        out = capsys.readouterr().out
        assert "Usage: bnfinetune train" in out
        assert "The training loop." in out

    def test_of_a_recipe_is_its_file(self, capsys):
        assert main(["help", "bn_only"]) == 0
        assert capsys.readouterr().out.rstrip() == shipped_recipes()["bn_only"].read_text().rstrip()

    def test_words_of_other_trainers_stand_for_keys_and_for_nothing_of_ours(self):
        for word, key in ELSEWHERE.items():
            assert isinstance(find_key(key), RecipeKey), key
            assert find_key(word) is None, word
            assert main(["show", f"{word}=x"]) == 2


class TestCopies:
    @pytest.mark.parametrize("name", shipped_recipes())
    def test_are_the_same_recipe_with_its_comments_and_a_launch_line_of_their_own(
        self, name, tmp_path, monkeypatch, capsys
    ):
        monkeypatch.chdir(tmp_path)
        assert main(["cp", name, "mine.yaml"]) == 0
        assert capsys.readouterr().out.splitlines()[-1] == "  bnfinetune recipe=mine.yaml"
        copy, original = load_recipe("mine.yaml"), load_recipe(name)
        assert copy == original.model_copy(update={"name": copy.name})
        header, model = recipe_header(tmp_path / "mine.yaml"), recipe_header(shipped_recipes()[name])
        assert header[0] == model[0]
        assert [line for line in header if line.startswith("Run: ")] == [
            line.replace(f"recipe={name}", "recipe=mine.yaml") for line in model if line.startswith("Run: ")
        ]

    def test_name_a_schema_that_is_there_wherever_they_lie(self, tmp_path):
        folder = tmp_path / "a folder"
        folder.mkdir()
        assert main(["cp", "full", str(folder)]) == 0
        [line] = [line for line in (folder / "full.yaml").read_text().splitlines() if "yaml-language-server" in line]
        uri = line.partition("$schema=")[2]
        assert uri.startswith("file:///")
        assert " " not in uri
        found = json.loads(shipped_recipes()["full"].with_name("recipe.schema.json").read_text())
        assert json.load(urlopen(uri)) == found


class TestEnv:
    def test_is_what_the_machine_has(self, capsys, monkeypatch):
        import platform

        import torch

        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        monkeypatch.setenv("MASTER_ADDR", "10.0.0.1")
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        assert main(["env", "format=json"]) == 0
        out = capsys.readouterr().out
        found = json.loads(out)
        assert found["python"] == platform.python_version()
        assert torch.__version__.startswith(found["packages"]["torch"].partition("+")[0])
        assert found["threads"] == torch.get_num_threads()
        assert len(found["GPUs"]) == torch.cuda.device_count()
        assert found["variables"]["MASTER_ADDR"] == "10.0.0.1"
        assert "secret" not in out
        assert main(["env"]) == 0
        table = capsys.readouterr().out
        assert "  MASTER_ADDR      10.0.0.1\n" in table
        assert f"  torch         {found['packages']['torch']}\n" in table

    def test_is_told_of_a_torch_that_does_not_import(self, monkeypatch, capsys):
        monkeypatch.setitem(sys.modules, "torch", None)
        assert main(["env"]) == 0
        assert "fails with ModuleNotFoundError: import of torch halted" in capsys.readouterr().out

    def test_holds_all_that_a_run_writes_of_versions(self):
        described = machine.describe_machine()
        for name, value in machine.software().items():
            assert described[name] == value or value.items() <= described[name].items()

    @pytest.mark.parametrize(
        ("number", "version"), [(8902, "8.9.2"), (91002, "9.10.2"), (90100, "9.1.0"), (None, "none")]
    )
    def test_reads_the_number_of_cudnn(self, number, version):
        assert machine._dotted(number) == version


class TestCompletion:
    def test_knows_every_verb_key_option_and_recipe(self):
        words = words_of(cli.VERBS)
        assert list(words.verbs) == list(cli.VERBS)
        assert [*words.keys] == [f"{path}=" for path in KEYS]
        assert words.values["recipe"] == [*shipped_recipes()]
        assert words.values["bn.affine"] == ["trained", "frozen", "null"]
        assert words.values["model.pretrained"] == ["true", "false"]
        assert "checkpoint=" in words.behind["evaluate"]

    @pytest.mark.parametrize(
        ("line", "completed"),
        [
            ("bnfinetune trai", ["train", *(f"{key}=" for key in KEYS if key.startswith("trai"))]),
            ("bnfinetune recipe=freeze_", ["freeze_bn", "freeze_stats", "freeze_tail"]),
            ("bnfinetune recipe=full optim.l", ["optim.lr=", "optim.layer_decay="]),
            ("bnfinetune recipe=full bn.affine=", ["trained", "frozen", "null"]),
            ("bnfinetune evaluate checkpoint=ru", ["runs"]),
            ("bnfinetune predict checkpoint=runs pho", ["photo.jpg"]),
            ("bnfinetune cp lp", ["lp_ft"]),
            ("bnfinetune help optim.lr", ["optim.lr"]),
            ("bnfinetune completion ", ["bash", "zsh", "fish"]),
            ("bnfinetune show recipe=full mod.x", []),
        ],
    )
    def test_in_bash(self, line, completed, tmp_path):
        (tmp_path / "runs").mkdir()
        (tmp_path / "photo.jpg").touch()
        words = line.replace("=", " = ").split(" ")  # as readline takes them apart
        array = " ".join(map(shlex.quote, [word for word in words[:-1] if word] + [words[-1]]))
        code = (
            f"{script('bash', cli.VERBS)}\nCOMP_LINE={shlex.quote(line)} COMP_POINT={len(line)} COMP_WORDS=({array})\n"
            'COMP_CWORD=$((${#COMP_WORDS[@]} - 1)); _bnfinetune; printf "%s\\n" "${COMPREPLY[@]}"'
        )
        done = subprocess.run(["bash", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
        assert done.stdout.split() == completed

    @pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
    def test_each_script_is_read_by_its_shell(self, shell):
        if shutil.which(shell) is None:
            pytest.skip(f"no {shell} here")
        subprocess.run([shell, "-n"], input=script(shell, cli.VERBS), text=True, check=True)
