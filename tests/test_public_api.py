"""The public names: complete, lazy, and never shadowed by a module."""

import ast
import importlib
import inspect
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import bnfinetune

SOURCE = ast.parse(Path(bnfinetune.__file__).read_text(encoding="utf-8"))


PROMISED = """
    BNPolicy StatSnapshot absorb_bn adapt_model apply_policy auto_momentum check_bn choose_prior convert_frozen_bn
    convert_group_norm convert_sync_bn describe_bn domain export_domain find_bn_layers finetune fold_bn fold_report
    freeze_bn fuse_bn get_bn_modules inspect_bn load load_bn load_policy_state merge_running_stats no_stat_updates
    param_groups policy_state precise_bn register_bn_class reset_head restore_bn revert_sync_bn save_bn unfold_bn
    unfreeze_bn update_bn_stats watch_bn
"""


def run_python(code: str) -> str:
    """What a fresh interpreter prints."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("name", bnfinetune.__all__)
def test_every_name_is_the_documented_object_of_its_home(name):
    value = getattr(bnfinetune, name)
    home = importlib.import_module(bnfinetune._HOMES[name])
    assert value is getattr(home, name)
    assert value.__module__ == home.__name__
    assert inspect.getdoc(value)


def test_every_promised_name_is_there():
    assert set(PROMISED.split()) <= set(bnfinetune.__all__)


def test_names_are_a_literal_sorted_list_with_one_home_each():
    [listed] = [node.value for node in SOURCE.body if isinstance(node, ast.Assign) and node.targets[0].id == "__all__"]
    assert ast.literal_eval(listed) == bnfinetune.__all__ == sorted(set(bnfinetune.__all__))
    assert list(bnfinetune._HOMES) == bnfinetune.__all__


def test_a_type_checker_sees_the_same_names_in_the_same_homes():
    [block] = [node for node in SOURCE.body if isinstance(node, ast.If)]
    seen = {alias.asname or alias.name: node.module for node in block.body for alias in node.names}
    assert ast.unparse(block.test) == "TYPE_CHECKING"
    assert seen == bnfinetune._HOMES


def test_importing_costs_no_torch_and_sets_nothing():
    code = (
        "import os, random, sys; before = dict(os.environ), random.getstate();"
        "import bnfinetune; assert 'finetune' in dir(bnfinetune);"
        "assert before == (dict(os.environ), random.getstate());"
        "print(sorted({'torch', 'timm', 'pydantic', 'omegaconf'} & set(sys.modules)))"
    )
    assert run_python(code).strip() == "[]"


def test_star_import_and_dir_give_every_name():
    names: dict = {}
    exec("from bnfinetune import *", names)
    assert set(bnfinetune.__all__) == set(names) - {"__builtins__"}
    assert set(bnfinetune.__all__) <= set(dir(bnfinetune))


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'bnfinetune' has no attribute 'freeze'"):
        _ = bnfinetune.freeze
    with pytest.raises(ImportError, match="cannot import name 'freeze'"):
        from bnfinetune import freeze  # noqa: F401


def test_no_module_bears_the_name_of_a_public_function():
    modules = {module.name.rpartition(".")[2] for module in pkgutil.walk_packages(bnfinetune.__path__, "bnfinetune.")}
    assert {"layers", "precise"} <= modules
    assert not modules & set(bnfinetune.__all__)


def test_the_core_exports_all_that_is_public_of_it():
    from bnfinetune import bn

    assert {name for name, home in bnfinetune._HOMES.items() if home.startswith("bnfinetune.bn.")} <= set(bn.__all__)
    assert bn.__all__ == sorted(bn.__all__)


def test_leaves_import_neither_torch_nor_what_stands_above_them():
    package = Path(bnfinetune.__file__).parent
    leaves = ["errors", "machine", *(path.stem for kind in ("recipe", "cli") for path in package.glob(f"{kind}*.py"))]
    assert {"recipe_hints", "cli_lookup"} <= set(leaves)
    code = (
        f"import sys, importlib; [importlib.import_module('bnfinetune.' + name) for name in {leaves}];"
        "print([name for name in sys.modules if name.startswith(('torch', 'timm', 'accelerate', 'datasets', 'numpy', "
        "'bnfinetune.bn', 'bnfinetune.training', 'bnfinetune.diagnose', 'bnfinetune.demo'))])"
    )
    assert run_python(code).strip() == "[]"


def test_a_run_starts_without_what_only_its_end_or_a_demo_needs():
    late = "{'matplotlib', 'scipy.stats', 'sklearn'}"
    assert run_python(f"import sys, bnfinetune.training.run; print({late} & set(sys.modules))").strip() == "set()"
