"""The schema for editors takes what `load_recipe` takes, and refuses what it refuses."""

import json

import pytest
import yaml

from bnfinetune.cli import main
from bnfinetune.errors import RecipeError
from bnfinetune.recipe_files import MODELINE, dump_recipe, load_recipe, shipped_recipes
from bnfinetune.recipe_json_schema import FILE_NAME, json_schema, schema_text, shipped_schema
from bnfinetune.recipe_keys import recipe_schema

jsonschema = pytest.importorskip("jsonschema")


@pytest.fixture(scope="module")
def validator():
    schema = json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


def test_the_shipped_file_is_current(capsys):
    assert shipped_schema().read_text(encoding="utf-8") == schema_text(), f"bnfinetune schema > recipes/{FILE_NAME}"
    assert main(["schema"]) == 0
    assert capsys.readouterr().out == schema_text()


@pytest.mark.parametrize("name", shipped_recipes())
def test_shipped_recipes_fit_it_and_name_it(name, validator):
    path = shipped_recipes()[name]
    text = path.read_text(encoding="utf-8")
    validator.validate(yaml.safe_load(text) or {})
    [line] = [line for line in text.splitlines() if line.startswith(MODELINE)]
    assert path.parent / line.removeprefix(MODELINE) == shipped_schema()


@pytest.mark.parametrize("name", shipped_recipes())
def test_whole_configurations_fit_it(name, validator):
    validator.validate(yaml.safe_load(dump_recipe(load_recipe(name))))


def test_every_key_is_there_nested_and_dotted_with_its_default(validator):
    keys = [key for section in recipe_schema().walk() for key in section.keys]
    assert len(keys) > 100
    for key in keys:
        value = key.default if key.allowed.startswith("text") and key.default != "null" else yaml.safe_load(key.default)
        validator.validate({key.path: value})
        nested = value
        for part in reversed(key.path.split(".")):
            nested = {part: nested}
        validator.validate(nested)
        wrong = {"x": 1} if key.allowed != "mapping" else 1
        assert not validator.is_valid({key.path: wrong}), key.path


@pytest.mark.parametrize(
    "text",
    [
        "",
        "base: full",
        "optim.lr: 3e-4",
        "optim: {lr: 0.1, schedule.name: step}",
        "optim: {schedule: {name: step}}",
        "data: {augment.hflip: 0.5}\ndata.augment: {vflip: 0.5}",
        "model.kwargs.drop_rate: 0.1\nmodel: {kwargs: {drop_path_rate: 0.1}}",
        "bn: {affine: frozen}",
        "bn: [{layers: layer1.*}, {affine: frozen}]",
        "bn.fold: off\nrun: {check: off}\ntrain.mixed_precision: no",
        "data: {source: 2024, classes: [yes, no, 010, x]}",
        "data.classes: 5",
        "bn.layers: [layer1.*, layer2.*]",
        # refused by both
        "optim.lrr: 1",
        "optim: {lr: fast}",
        "optim: {lr: 0}",
        "optim: adam",
        "train.epochs: 1.5",
        "train.mixed_precision: fp8",
        "bn: {affine: thawed}",
        "bn: [{affine: thawed}]",
        "data.augment.scale: [0.5]",
        "data.augment.hflip: 2",
        "bn.train_stats: true",
        "base: [full]",
        "nonsense: 1",
        "optim: {schedule.nme: step}",
        "data.classes: 0",
        "model.name: ''",
    ],
)
def test_agrees_with_the_loader(text, validator, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    try:
        load_recipe(path)
        loads = True
    except RecipeError:
        loads = False
    tree = yaml.safe_load(text.replace("3e-4", "3.0e-4")) or {}
    assert validator.is_valid(tree) == loads


def test_it_is_json_without_what_editors_do_not_need():
    schema = json.loads(schema_text())
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert schema["additionalProperties"] is False
    assert '"title": "Lr"' not in schema_text()
    assert schema["$defs"]["Optim"]["properties"]["lr"]["description"].startswith("peak learning rate")
