"""Recipes: the schema, where files are found, how words are merged, and what hostile text does."""

import itertools
import json
import math
import re
import shutil
import subprocess
import sys
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

import bnfinetune
from bnfinetune.errors import RecipeError
from bnfinetune.recipe import BN, Augment, Recipe, Section
from bnfinetune.recipe_files import diff_recipes, dump_recipe, load_recipe, recipe_header, shipped_recipes
from bnfinetune.recipe_keys import find_key, nearest_key, recipe_schema
from bnfinetune.recipe_text import MAX_BYTES, read_override, read_yaml

ROOT = Path(bnfinetune.__file__).parent.parent


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Write a recipe file into an empty working folder and give its path."""
    monkeypatch.chdir(tmp_path)

    def write(name: str, text: str) -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


def changes(recipe: Recipe) -> dict:
    """What a recipe changes in the defaults, its name aside."""
    return {key: new for key, (_, new) in diff_recipes(Recipe(), recipe).items() if key != "name"}


FROZEN = {"bn.train_stats": "running", "bn.update_stats": "none", "bn.affine": "frozen"}
FIXED = FROZEN | {"bn.affine": "trained"}


class TestShippedRecipes:
    @pytest.mark.parametrize(
        ("name", "expected"),
        [
            ("full", {}),
            ("freeze_bn", FROZEN),
            ("freeze_stats", FIXED),
            ("bn_only", FIXED | {"model.trainable": "bn_and_head", "optim.lr": 0.01}),
            ("linear_probe", FROZEN | {"model.trainable": "head", "optim.lr": 0.01}),
            ("lp_ft", FROZEN | {"model.head": "fitted", "optim.lr": 3e-4}),
            (
                "fix_size",
                {"bn.train_stats": "running", "bn.update_stats": "none"}
                | {"model.trainable": "last_bn_and_head", "train.epochs": 5}
                | {"recalibrate.at": ["start"], "recalibrate.layers": ":last"}
                | {"data.augment.scale": [1.0, 1.0], "data.augment.ratio": [1.0, 1.0]},
            ),
            ("from_scratch", {"model.pretrained": False}),
        ],
    )
    def test_each_changes_only_what_it_stands_for(self, name, expected):
        recipe = load_recipe(name)
        assert changes(recipe) == expected
        assert recipe.name == name

    @pytest.mark.parametrize("name", shipped_recipes())
    def test_each_loads_and_opens_with_purpose_claim_and_launch_line(self, name):
        path = shipped_recipes()[name]
        header = recipe_header(path)
        assert load_recipe(name) == load_recipe(path)
        assert header[0].endswith(".")
        assert any(line.startswith(("Claim: ", "Paper: ")) for line in header)
        assert any(line.startswith("Run: ") and f"recipe={name}" in line for line in header)

    def test_are_found_inside_an_installed_package_and_from_any_folder(self, tmp_path):
        package = shutil.copytree(ROOT / "bnfinetune", tmp_path / "site" / "bnfinetune")
        shutil.copytree(ROOT / "recipes", package / "recipes")
        (package / "recipes" / "only_here.yaml").write_text("# Only here.\n")
        code = "from bnfinetune.recipe_files import *; print(shipped_recipes()['only_here']); load_recipe('freeze_bn')"
        script = f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r}); {code}"
        done = subprocess.run([sys.executable, "-c", script], cwd="/", capture_output=True, text=True, check=True)
        assert done.stdout.strip() == str(package / "recipes" / "only_here.yaml")

    def test_the_documentation_is_current(self):
        sys.path.insert(0, str(ROOT / "docs"))
        try:
            from make_recipes import pages
        finally:
            sys.path.pop(0)
        for path, text in pages().items():
            assert path.read_text(encoding="utf-8") == text, "run python docs/make_recipes.py"


class TestSchema:
    def test_every_key_has_a_help_text_and_a_default_that_is_a_legal_override(self):
        keys = [key for section in recipe_schema().walk() for key in section.keys]
        assert len(keys) > 70
        for key in keys:
            assert key.help
            assert not key.help.endswith("."), key.path
            is_text = key.allowed.startswith("text") and key.default not in ("null", "[]")
            value = json.dumps(key.default) if is_text else key.default
            assert changes(load_recipe({}, [f"{key.path}={value}"])) == {}, key.path

    def test_sections_cannot_be_changed_once_built(self):
        with pytest.raises(ValueError, match="frozen"):
            Recipe().optim.lr = 1.0  # type: ignore[misc]

    @pytest.mark.parametrize(
        ("path", "allowed"),
        [
            ("optim.lr", "number > 0 | auto"),
            ("data.val_fraction", "number > 0, < 1"),
            ("data.train_samples", "whole number >= 1 | null"),
            ("bn.affine", "trained | frozen | null"),
            ("bn.layers", "text | list of text"),
            ("bn.momentum", "number from 0 to 1 | auto | null"),
            ("recalibrate.at", "list of start | eval | end"),
            ("data.augment.scale", "list of 2: number from 0 to 1"),
        ],
    )
    def test_values_are_described_in_words(self, path, allowed):
        assert find_key(path).allowed == allowed

    def test_the_described_choices_are_exactly_the_accepted_ones(self):
        assert find_key("bn.momentum").choices == ("auto",)
        assert find_key("recalibrate.at").choices == ("start", "eval", "end")
        for section in recipe_schema().walk():
            for key in section.keys:
                listed = key.allowed.startswith("list of ")
                for choice in key.choices:
                    task = {"data.task": "multilabel"} if choice in ("map", "micro_f1") else {}
                    load_recipe({}, {**task, key.path: [choice] if listed else choice})
                if key.choices:
                    with pytest.raises(RecipeError, match=rf"{key.path}.*did you mean {key.choices[0]}\?"):
                        load_recipe({}, {key.path: [f"{key.choices[0]}x"] if listed else f"{key.choices[0]}x"})

    def test_the_described_bounds_are_exactly_the_accepted_ones(self):
        """Read each bound back from its words, and try both sides of it."""
        tried = 0
        for section in recipe_schema().walk():
            for key in section.keys:
                for words in key.allowed.split(" | "):
                    for inside, outside in _sides(words):
                        load_recipe({}, {key.path: inside})
                        with pytest.raises(RecipeError, match=r"allowed: "):
                            load_recipe({}, {key.path: outside})
                        tried += 1
        assert tried > 40

    def test_an_unordered_pair_and_an_endless_number_are_refused_in_python_too(self):
        with pytest.raises(ValueError, match="lower bound"):
            Augment(scale=(1.0, 0.5))
        with pytest.raises(ValueError, match="finite"):
            BN(momentum=math.nan)

    @pytest.mark.parametrize(
        ("wrong", "meant"),
        [
            ("lr", "optim.lr"),
            ("optim.lrr", "optim.lr"),
            ("train.lr", "optim.lr"),
            ("epochs", "train.epochs"),
            ("bn.0.layer", "bn.layers"),
            ("optim.schedule.warmup", "optim.schedule.warmup_lr"),
            ("augment.mixup", "data.augment.mixup"),
            ("batchsize", "train.batch_size"),
            ("zzzzzzzz", None),
        ],
    )
    def test_the_nearest_key_is_the_one_meant(self, wrong, meant):
        assert nearest_key(wrong) == meant


def _sides(words: str) -> list[tuple[float, float]]:
    """For each bound in words such as `number > 0, <= 1`: a value on or just inside it, and one on or just outside."""
    kind = re.fullmatch(r"(whole )?number( .*)", words)
    if kind is None:
        return []
    step, bounds = 1 if kind[1] else 1e-9, re.sub(r" from (\S+) to (\S+)", r" >= \1, <= \2", kind[2])
    sides = []
    for sign, text in re.findall(r"([<>]=?) ([^ ,]+)", bounds):
        bound = int(text) if kind[1] else float(text)
        inward = step if ">" in sign else -step
        sides.append((bound, bound - inward) if "=" in sign else (bound + inward, bound))
    return sides


class TestMerging:
    def test_later_words_win_defaults_base_recipe_overrides(self, write):
        write("low.yaml", "optim: {lr: 0.1, weight_decay: 0.2, name: sgd}\ntrain: {epochs: 3}\n")
        top = write("sub/top.yaml", "base: ../low.yaml\noptim: {weight_decay: 0.3, name: lamb}\n")
        recipe = load_recipe(top, ["optim.name=lion", "optim.name=muon"])
        assert changes(recipe) == {
            "optim.lr": 0.1, "train.epochs": 3, "optim.weight_decay": 0.3, "optim.name": "muon"
        }  # fmt: skip

    def test_a_base_may_be_a_shipped_recipe_and_names_go_to_the_top(self, write):
        write("middle.yaml", "name: chosen\nbase: freeze_bn\n")
        recipe = load_recipe(write("my own.yaml", "base: middle.yaml\n"))
        assert recipe.bn == load_recipe("freeze_bn").bn
        assert recipe.name == "my_own"
        assert load_recipe("middle.yaml").name == "chosen"
        assert load_recipe("middle.yaml", ["name=other"]).name == "other"
        assert load_recipe({}).name == "custom"

    def test_a_circle_of_bases_is_refused(self, write):
        write("a.yaml", "base: b.yaml")
        write("b.yaml", "base: ./c.yaml")
        with pytest.raises(RecipeError, match=r"base: a\.yaml -> b\.yaml -> c\.yaml -> a\.yaml"):
            load_recipe(write("c.yaml", "base: a.yaml").replace("c.yaml", "a.yaml"))

    def test_dotted_and_nested_keys_are_the_same_everywhere(self, write):
        nested = {"optim": {"schedule": {"name": "linear"}, "lr": 0.5}, "bn": {"affine": "frozen"}}
        dotted = {"optim.schedule.name": "linear", "optim.lr": 0.5, "bn.affine": "frozen"}
        mixed = {"optim": {"schedule.name": "linear"}, "optim.lr": 0.5, "bn": {"affine": "frozen"}}
        texts = ["optim.schedule.name=linear", "optim.lr=0.5", "bn={affine: frozen}"]
        file = write("custom.yaml", yaml.safe_dump(mixed))
        expected = load_recipe(nested)
        assert changes(expected) == dotted
        for recipe in (load_recipe(dotted), load_recipe({}, mixed), load_recipe({}, texts), load_recipe(file)):
            assert recipe == expected

    def test_bn_sections_are_replaced_as_a_list_and_entered_by_position(self):
        two = "bn=[{layers: layer4.*}, {exclude: layer4.*, affine: frozen}]"
        recipe = load_recipe("freeze_bn", [two, "bn.0.layers=[a, b]", "bn.1.affine=trained"])
        assert recipe.bn == (BN(layers=("a", "b")), BN(exclude="layer4.*", affine="trained"))

    @pytest.mark.parametrize(
        ("low", "top"), [("[{layers: a}]", "{affine: frozen}"), ("{affine: frozen}", "[{layers: a}]")]
    )
    def test_a_bn_of_the_other_form_replaces_the_one_below(self, write, low, top):
        write("low.yaml", f"bn: {low}")
        assert load_recipe(write("top.yaml", f"base: ./low.yaml\nbn: {top}")).bn == load_recipe({}, [f"bn={top}"]).bn

    def test_free_mappings_are_merged_and_may_be_emptied_of_nothing(self):
        recipe = load_recipe(
            {"model.kwargs": {"a": 1}}, ["model.kwargs={b: [1, 2]}", "model.kwargs.c.d=x", "model.kwargs={}"]
        )
        assert recipe.model.kwargs == {"a": 1, "b": [1, 2], "c": {"d": "x"}}

    def test_python_values_become_plain_ones(self, tmp_path):
        numpy = pytest.importorskip("numpy")
        recipe = load_recipe({}, {"run.dir": tmp_path, "optim.lr": numpy.float32(0.5), "bn.layers": ("a", "b")})
        assert (recipe.run.dir, recipe.optim.lr, recipe.bn.layers) == (str(tmp_path), 0.5, ("a", "b"))

    def test_a_recipe_is_a_recipe(self):
        recipe = load_recipe("bn_only", ["bn=[{layers: a}, {layers: b}]"])
        assert load_recipe(recipe) == recipe
        assert load_recipe(recipe, {"train.epochs": 2}).train.epochs == 2
        assert load_recipe(recipe, {"train.epochs": 2}).name == "bn_only"

    def test_an_open_value_has_to_be_given(self, write):
        path = write("open.yaml", "data:\n  source: ???\nbn:\n- layers: ???")
        with pytest.raises(RecipeError, match=r"bn\.0\.layers: still open .*open\.yaml.* give bn\.0\.layers=VALUE"):
            load_recipe(path)
        assert load_recipe(path, ["data.source=x", "bn.0.layers=y"]).data.source == "x"

    def test_inputs_are_left_as_they_were(self):
        recipe, overrides = {"base": "full", "bn": [{"layers": "a"}]}, {"bn": [{"layers": "b"}]}
        load_recipe(recipe, overrides)
        assert recipe == {"base": "full", "bn": [{"layers": "a"}]}
        assert overrides == {"bn": [{"layers": "b"}]}

    def test_differences_name_dotted_keys_with_both_values(self):
        one, two = load_recipe("full"), load_recipe("full", ["optim.lr=0.5", "model.kwargs.a=1", "data.val_split=x"])
        assert diff_recipes(one, two) == {
            "optim.lr": ("auto", 0.5),
            "model.kwargs.a": (None, 1),
            "model.kwargs": ({}, None),
            "data.val_split": (None, "x"),
        }
        assert diff_recipes(one, one) == {}
        listed = load_recipe("full", ["bn=[{layers: a}, {layers: b}]"])
        assert diff_recipes(listed, load_recipe(listed, ["bn.1.layers=c"])) == {"bn.1.layers": ("b", "c")}


class TestMessages:
    def test_a_mistake_in_a_file_names_the_file_that_made_it(self, write):
        low = write("low.yaml", "optim: {lr: fast}")
        top = write("top.yaml", f"base: {low}\ntrain: {{epochs: 2}}")
        with pytest.raises(
            RecipeError, match=r"^optim\.lr: found 'fast' in \S*low\.yaml; allowed: number > 0 \| auto$"
        ):
            load_recipe(top)
        with pytest.raises(RecipeError, match=r"^optim\.lr: found 'slow'; allowed: number > 0 \| auto$"):
            load_recipe(top, ["optim.lr=slow"])

    def test_the_first_mistake_is_told_and_the_others_counted(self):
        with pytest.raises(RecipeError, match=r"^model\.pretrained: .* \(and 2 more mistakes\)$"):
            load_recipe({}, ["optim.lr=x", "model.pretrained=7", "data.image_size=2"])

    def test_a_found_value_is_shown_short(self):
        with pytest.raises(RecipeError) as caught:
            load_recipe({}, {"optim.lr": "x" * 10_000})
        assert len(str(caught.value)) < 200


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in itertools.pairwise("abcdefghi")
)


class TestHostileText:
    @pytest.mark.parametrize(
        ("text", "message"),
        [
            pytest.param(BOMB, "values", id="billion laughs"),
            pytest.param(BOMB.replace("[", "{k: [").replace("]", "]}"), "values", id="billion laughs in mappings"),
            pytest.param("a: &a {b: *a}", r"\*a stands for nothing", id="an alias inside its own anchor"),
            pytest.param("x: " + "[" * 20_000, "levels", id="deep list"),
            pytest.param("x: " + "{a: " * 10_000, "levels", id="deep mapping"),
            pytest.param("".join(f"{' ' * i}a:\n" for i in range(300)), "levels", id="deep block"),
            pytest.param("x: [" + "1," * 30_000 + "]", "values", id="many values"),
            pytest.param("model: {kwargs: {" + "a: 1, " * 3_000 + "}}", "values", id="many keys"),
            pytest.param("# " + "x" * MAX_BYTES, "64 KiB", id="large"),
            pytest.param("run: !!python/object/apply:os.system ['touch owned']", "tag", id="python tag"),
            pytest.param("run: {dir: !!python/name:os.getcwd ''}", "tag", id="python name"),
            pytest.param("run: {dir: !include /etc/passwd}", "tag", id="own tag"),
            pytest.param("run: {dir: !!binary aGk=}", "tag", id="binary"),
            pytest.param("run: {dir: '${oc.env:HOME}'}", "interpolation", id="environment"),
            pytest.param('run: {dir: "\\x24{oc.env:HOME}"}', "interpolation", id="escaped environment"),
            pytest.param("'${oc.env:HOME}': 1", "interpolation", id="environment as key"),
            pytest.param("run: {dir: [a, {b: '${model.name}'}]}", "interpolation", id="another key"),
            pytest.param("run: {dir: '${${${'}", "interpolation", id="broken interpolation"),
            pytest.param("optim: {lr: 1, lr: 2}", "duplicate key", id="a key twice"),
            pytest.param("a: 1\n---\nb: 2", "document", id="two documents"),
            pytest.param("a: b: c", "line 1", id="not YAML"),
            pytest.param("a:\n\tb: c", "line 2", id="tab"),
            pytest.param("a: \x07", "not", id="control character"),
            pytest.param("bn: {layers: *.bn1}", "begins with \\* is quoted", id="unquoted glob"),
            pytest.param("bn: {layers: *}", "begins with \\* is quoted", id="unquoted star"),
            pytest.param("- a", "mapping", id="a list"),
            pytest.param("just words", "mapping", id="words"),
            pytest.param("12", "mapping", id="a number"),
            pytest.param(f"optim: {{lr: {'9' * 5000}}}", None, id="endless digits"),
            pytest.param(
                f"optim: {{lr: 0x{'f' * 5000}}}", "whole number of 20000 bits", id="endless hexadecimal digits"
            ),
            pytest.param("{1: 2}", "not a key", id="a number as key"),
            pytest.param("{null: 2}", None, id="null as key"),
            pytest.param("{[1]: 2}", None, id="a list as key"),
            pytest.param("'a[0]': 1", "not a key", id="brackets in a key"),
            pytest.param("bn: [[[[1]]]]", r"bn\.0: found", id="lists in a list"),
            pytest.param("base: [full]", "base: found", id="two bases"),
            pytest.param("base: ful", "did you mean full", id="misspelt base"),
        ],
    )
    def test_is_refused_in_one_line_that_names_the_file(self, write, text, message):
        path = write("bad.yaml", text)
        with pytest.raises(RecipeError, match=message) as caught:
            load_recipe(path)
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 500
        assert sorted(p.name for p in Path.cwd().iterdir()) == ["bad.yaml"]

    @pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"a: \xc3\x28"])
    def test_bytes_that_are_not_text_are_refused(self, tmp_path, content):
        (tmp_path / "bad.yaml").write_bytes(content)
        with pytest.raises(RecipeError, match="not UTF-8"):
            load_recipe(tmp_path / "bad.yaml")

    def test_no_more_of_a_file_is_read_than_a_recipe_may_have(self, tmp_path):
        (tmp_path / "wide.yaml").write_text("#" + "é" * MAX_BYTES, encoding="utf-8")
        with pytest.raises(RecipeError, match="64 KiB"):
            load_recipe(tmp_path / "wide.yaml")
        with (tmp_path / "sparse.yaml").open("wb") as file:
            file.truncate(1 << 40)
        with pytest.raises(RecipeError, match="64 KiB"):
            load_recipe(tmp_path / "sparse.yaml")

    def test_the_environment_reaches_no_recipe_and_no_message(self, write, monkeypatch):
        monkeypatch.setenv("SECRET_TOKEN", "hunter2")
        asked = "${oc.env:SECRET_TOKEN}"
        path = write("leak.yaml", f"run: {{tracking: '{asked}'}}")
        attempts = [
            (path, []),
            ({}, [f"run.tracking={asked}"]),
            ({}, [f"run.tracking=*{asked}"]),
            ({}, {"run.tracking": asked}),
            ({"run": {"tracking": [asked]}}, []),
            ({}, [f"model.kwargs={{a: '{asked}'}}"]),
            ({"base": asked}, []),
        ]
        for recipe, overrides in attempts:
            with pytest.raises(RecipeError) as caught:
                load_recipe(recipe, overrides)
            assert "hunter2" not in str(caught.value)

    @pytest.mark.parametrize("value", [print, object(), {1: 2}, {"a": {3}}, b"x", [[[object()]]], "\ud800"])
    def test_python_objects_that_yaml_cannot_hold_are_refused(self, value):
        with pytest.raises(RecipeError, match=r"model\.kwargs|is not a key"):
            load_recipe({}, {"model.kwargs": {"a": value}})

    def test_a_structure_that_holds_itself_is_refused(self):
        ring: list = []
        ring.append(ring)
        loop: dict = {}
        loop["a"] = loop
        for value in (ring, loop):
            with pytest.raises(RecipeError):
                load_recipe({}, {"model.kwargs": {"a": value}})

    def test_modest_aliases_and_merge_keys_are_welcome(self, write):
        text = "bn:\n- &first {layers: a, affine: frozen}\n- {<<: *first, layers: b}\n"
        assert load_recipe(write("good.yaml", text)).bn == (
            BN(layers="a", affine="frozen"),
            BN(layers="b", affine="frozen"),
        )

    @settings(max_examples=150, deadline=None)
    @given(st.text(alphabet="{}[]*&!:-?#|>%@`\"',. \n\tab01~$<=", max_size=40) | st.text(max_size=20))
    def test_any_text_is_read_or_refused(self, text):
        for read in (
            read_override,
            partial(read_yaml, origin="file"),
            lambda text: load_recipe({}, [f"run.dir={text}"]),
        ):
            with suppress(RecipeError):
                read(text)


scalars = (
    st.none() | st.booleans() | st.integers(-(10**18), 10**18) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text().filter(lambda text: "${" not in text)
)  # fmt: skip
names = st.from_regex(r"[A-Za-z_][A-Za-z0-9_]{0,8}", fullmatch=True)


def as_override(value) -> str:
    """The value in YAML's flow style, every text quoted."""
    if isinstance(value, str):
        return yaml.safe_dump(value, default_style='"', width=math.inf).strip()
    if isinstance(value, list):
        return f"[{', '.join(map(as_override, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{as_override(key)}: {as_override(item)}' for key, item in value.items())}}}"
    return json.dumps(value)


class TestOverrideGrammar:
    @settings(max_examples=150, deadline=None)
    @given(
        st.lists(names, min_size=1, max_size=4),
        st.recursive(
            scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(names, inner, max_size=3), max_leaves=8
        ),
    )
    def test_every_plain_value_comes_back_as_it_was_written(self, key, value):
        assert read_override(f"{'.'.join(key)}={as_override(value)}") == (".".join(key), value)

    def test_words_that_yaml_takes_for_false_reach_the_keys_that_know_them(self):
        words = ["run.check=off", "bn.fold=off", "train.cache_features=off", "train.mixed_precision=no"]
        recipe = load_recipe({}, words)
        assert (recipe.run.check, recipe.bn.fold, recipe.train.cache_features) == ("off", "off", "off")
        assert recipe.train.mixed_precision == "no"

    @settings(max_examples=150, deadline=None)
    @given(st.from_regex(r"[A-Za-z/*._][A-Za-z0-9/*._=\\-]{0,20}", fullmatch=True))
    def test_globs_and_paths_need_no_quotes(self, text):
        words = {"true", "false", "yes", "no", "on", "off", "null"}
        is_word = text.lower() in words or text[0] == "."  # .5, .inf and .nan are numbers
        assert is_word or read_override(f"bn.layers={text}") == ("bn.layers", text)

    @pytest.mark.parametrize(
        ("text", "value"),
        [
            ("1e-3", 1e-3), ("1E5", 1e5), ("-2", -2), ("0.5", 0.5), (".5", 0.5), ("true", True), ("null", None),
            ("~", None), ("None", "None"), ("2024-01-01", "2024-01-01"), ("'1'", "1"), ('""', ""), ("[a, 1]", ["a", 1]),
            ("{a: 1}", {"a": 1}), ("*.bn?", "*.bn?"), ("!x", "!x"), ("@x", "@x"), ("#3", "#3"), ("a #b", "a #b"),
            ("train[:10%]", "train[:10%]"), ("hf-hub:timm/resnet18.a1_in1k", "hf-hub:timm/resnet18.a1_in1k"),
            ("a=b=c", "a=b=c"), ("C:\\images", "C:\\images"), ("../données", "../données"), ("🐈", "🐈"),
        ],
    )  # fmt: skip
    def test_values_are_yaml(self, text, value):
        assert read_override(f"key={text}") == ("key", value)
        assert type(read_override(f"key={text}")[1]) is type(value)

    @pytest.mark.parametrize(
        "text",
        ["", "=", "=1", "a", "a.=1", ".a=1", "a..b=1", "a b=1", "a[0]=1", "--a=1", "a=", "a= ", "é=1", "a\n=1"],
    )
    def test_what_is_no_override_is_refused(self, text):
        with pytest.raises(RecipeError):
            read_override(text)

    @settings(max_examples=20, deadline=None)
    @given(
        st.permutations(
            ["optim.lr=0.5", "train.epochs=2", "bn.affine=frozen", "data.augment.scale=[0.1, 0.2]", "model.kwargs.a=1"]
        )
    )
    def test_overrides_of_different_keys_commute(self, overrides):
        assert load_recipe("full", overrides) == load_recipe("full", sorted(overrides))


valid_overrides = st.fixed_dictionaries(
    {},
    optional={
        "name": st.from_regex(r"[a-z0-9_][a-z0-9_.-]{0,12}", fullmatch=True),
        "model.name": st.text(min_size=1).filter(lambda text: "${" not in text and text != "???"),
        "model.kwargs": st.dictionaries(names, scalars.filter(lambda value: value != "???"), max_size=3),
        "data.val_split": st.sampled_from([None, "no", "null", "1e-3", "1", "~", "a: b", " a", "*", "x\ny", "0_1"]),
        "data.augment.scale": st.tuples(st.floats(0, 0.5), st.floats(0.5, 1)).map(list),
        "optim.lr": st.floats(0, 1e6, exclude_min=True),
        "optim.schedule.milestones": st.lists(st.floats(0, 1), max_size=3),
        "train.epochs": st.integers(1, 10**12),
        "train.mixed_precision": st.sampled_from(["no", "fp16", "bf16"]),
        "bn": st.lists(st.fixed_dictionaries({"layers": st.lists(names, max_size=2)}), max_size=2),
    },
)  # fmt: skip


@pytest.mark.parametrize(
    "text", ["1e-3", "1", "no", "null", "~", "2024-01-01", "1:30", "", " a", "a: b", "*", "x\ny", "'", "[]"]
)
def test_text_that_looks_like_something_else_stays_text(text):
    recipe = load_recipe({}, {"data.config": text})
    assert read_yaml(dump_recipe(recipe), "dumped")["data"]["config"] == recipe.data.config == text


@settings(max_examples=20, deadline=None)
@given(valid_overrides)
def test_a_dumped_recipe_is_the_same_recipe_again(tmp_path_factory, overrides):
    recipe = load_recipe("freeze_stats", overrides)
    path = tmp_path_factory.getbasetemp() / "dumped.yaml"
    path.write_text(dump_recipe(recipe), encoding="utf-8")
    assert load_recipe(path) == recipe
    assert all(
        isinstance(getattr(recipe, name), Section | tuple) for name in type(recipe).model_fields if name != "name"
    )


WORDS = [
    *(
        "yes",
        "no",
        "on",
        "Off",
        "true",
        "010",
        "12:30",
        "1e3",
        "1_000",
        "2024",
        "2024-01-01",
        "0x1F",
        ".5",
        "1.",
        "None",
    ),
    *("[2026] photos", "[a]", "my images: v2", "{x", "a #b", "- x", "!x", "%x", "~x", "'a' b"),
]


class TestWordsThatYamlReadsAsSomethingElse:
    @pytest.mark.parametrize("word", WORDS)
    @pytest.mark.parametrize("key", ["data.source", "run.dir", "data.config", "data.val_split", "model.checkpoint"])
    def test_are_text_where_a_key_takes_text(self, key, word, monkeypatch):
        monkeypatch.setenv("HOME", "/no/home")
        section, _, leaf = key.partition(".")
        recipe = load_recipe({}, [f"{key}={word}"])
        assert getattr(getattr(recipe, section), leaf) == word

    def test_are_what_quotes_hold(self):
        assert load_recipe({}, ["data.source=' yes '"]).data.source == " yes "
        assert load_recipe({}, ['run.dir="12:30"']).run.dir == "12:30"

    def test_null_is_none(self):
        for word in ("null", "~", "NULL"):
            assert load_recipe({"run": {"dir": "x"}}, [f"run.dir={word}"]).run.dir is None

    def test_are_text_in_a_file(self, write):
        text = "data: {source: yes, classes: [yes, no, 010, 1e3, null, x], val_split: 12:30}\nrun: {dir: 2024}"
        recipe = load_recipe(write("words.yaml", text))
        assert (recipe.data.source, recipe.data.val_split, recipe.run.dir) == ("yes", "12:30", "2024")
        assert recipe.data.classes == ("yes", "no", "010", "1e3", "null", "x")
        assert load_recipe(write("again.yaml", dump_recipe(recipe))) == recipe

    @pytest.mark.parametrize("words", ["yes,no,maybe", "1,2,10", "None, NA ,nan", "on, 'off', \"~\"", "1e3,true,null"])
    def test_are_class_names(self, words):
        expected = tuple(word.strip(" '\"") for word in words.split(","))
        assert load_recipe({}, [f"data.classes=[{words}]"]).data.classes == expected

    def test_numbers_stay_numbers_where_a_key_takes_them(self):
        recipe = load_recipe({}, ["data.classes=3", "optim.lr=1e-3", "train.steps=7", "model.kwargs={drop_rate: 0.1}"])
        assert (recipe.data.classes, recipe.optim.lr, recipe.train.steps) == (3, 1e-3, 7)
        assert recipe.model.kwargs == {"drop_rate": 0.1}
        assert load_recipe({}, ["train.mixed_precision=no", "bn.fold=off"]).bn.fold == "off"

    def test_globs_are_lists_or_text(self):
        assert load_recipe({}, ["bn.layers=[layer1*, layer2*]"]).bn.layers == ("layer1*", "layer2*")
        assert load_recipe({}, ["bn.layers=1"]).bn.layers == "1"


class TestTheNetworkForTheData:
    @pytest.mark.parametrize("source", ["demo", "demo-characters", "demo-domains"])
    def test_the_demo_has_its_own(self, source):
        assert load_recipe({}, [f"data.source={source}"]).model.name == "bnf_resnet"

    @pytest.mark.parametrize("source", ["photos", "~/photos", "x.parquet", "user/flowers"])
    def test_photos_get_one_of_their_size(self, source):
        for recipe in (load_recipe("full", [f"data.source={source}"]), Recipe(data={"source": source})):
            assert recipe.model.name == "resnet50.a1_in1k"
        assert load_recipe(load_recipe("full", [f"data.source={source}"])).model.name == "resnet50.a1_in1k"

    def test_a_name_that_is_given_stands(self, write):
        words = ["data.source=photos", "model.name=bnf_resnet"]
        assert load_recipe("full", words).model.name == "bnf_resnet"
        assert load_recipe(write("mine.yaml", "model: {name: resnet18}"), words[:1]).model.name == "resnet18"
        kept = load_recipe("linear_probe", words[:1]).model
        assert (kept.name, kept.trainable) == ("resnet50.a1_in1k", "head")


@pytest.mark.parametrize(
    ("key", "value", "found"),
    [
        *((key, "~/a b", "/home/me/a b") for key in ("data.source", "model.checkpoint", "run.dir", "train.resume")),
        ("train.cache_dir", "~", "/home/me"),
        ("model.name", "local-dir:~/nets/best", "local-dir:/home/me/nets/best"),
        ("data.source", "a~b", "a~b"),
        ("model.name", "resnet18", "resnet18"),
    ],
)
def test_every_path_may_begin_at_home(key, value, found, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    section, _, leaf = key.partition(".")
    for recipe in (load_recipe({}, {key: value}), *([load_recipe({}, [f"{key}={value}"])] if value != "~" else [])):
        assert getattr(getattr(recipe, section), leaf) == found
