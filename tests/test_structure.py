"""The map of the house: who may import whom, options that are read, and sizes of files. Sources are parsed, not run."""

import ast
import importlib
import re
from dataclasses import fields
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from training import RunOptions

ROOT = Path(__file__).resolve().parents[1]
SOURCES = {path.stem: path for path in sorted(ROOT.glob("*.py"))}
TREES = {name: ast.parse(path.read_text()) for name, path in SOURCES.items()}
PROGRAMS = [name for name in SOURCES if name.startswith("run_")]

# What each module may import of ours; a module not named here obeys the general rules below alone.
MAY_IMPORT = {
    "masking_generator": set(),
    "shards": set(),
    "object_overlay": {"lists", "shards"},
    "modeling_finetune": set(),
    "utils": set(),
    "lists": {"shards"},
    "video_reader": {"shards"},
    "video_check": {"shards", "video_reader"},
    "video_transforms": {"object_overlay", "utils", "video_reader"},
    "modeling_teacher": {"modeling_finetune", "utils"},
    "modeling_counting": {"modeling_finetune"},
    "modeling_pretrain": {"modeling_finetune"},
    "optim_factory": {"utils"},
    "weights": {"utils"},
    "checkpoints": {"optim_factory", "utils", "weights"},
    "options": {"checkpoints", "datasets", "lists", "optim_factory", "training", "utils", "video_reader", "weights"},
    "datasets": {"lists", "masking_generator", "object_overlay", "video_reader", "video_transforms", "utils"},
    "video_transforms_finetune": {"video_transforms"},
    "datasets_finetune": {"datasets", "lists", "metrics", "video_reader", "video_transforms_finetune"},
    "datasets_counting": {"datasets", "lists", "modeling_counting", "utils", "video_reader", "video_transforms"},
    "modeling_image": {"modeling_teacher"},
    "modeling_probe": {"modeling_finetune", "modeling_image"},
    "metrics": {"lists", "utils", "video_reader"},
    "deepspeed_stepper": {"optim_factory", "utils", "weights"},
    "meters": {"datasets", "lists", "utils"},
    "training": {"checkpoints", "datasets", "meters", "optim_factory", "utils"},
    "engine_for_pretraining": {"modeling_finetune", "modeling_pretrain", "training"},
    "engine_for_finetuning": {"datasets", "modeling_finetune", "training"},
}


def imports(name):
    """All imports of a module, wherever they stand: module → the names taken from it."""
    found = {}
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            for alias in node.names:
                found.setdefault(alias.name.split(".")[0], set())
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "modules are flat"
            found.setdefault(node.module.split(".")[0], set()).update(alias.name for alias in node.names)
    return found


GRAPH = {name: imports(name).keys() & SOURCES.keys() for name in SOURCES}


@pytest.mark.parametrize("name", MAY_IMPORT)
def test_a_module_imports_only_what_lies_below_it(name):
    assert GRAPH[name] <= MAY_IMPORT[name]


def test_there_are_no_cycles():
    assert len(list(TopologicalSorter(GRAPH).static_order())) == len(SOURCES)  # raises CycleError


def test_nothing_imports_a_program():
    """But the one that draws what pretraining does, with the builders of pretraining."""
    imported = {name: GRAPH[name] & set(PROGRAMS) for name in SOURCES}
    assert imported.pop("run_visualization") == {"run_smile_pretraining"}
    assert not any(imported.values())


def test_drawing_and_masks_know_no_torch():
    assert not imports("visualization").keys() & {"torch", "argparse", *SOURCES}
    assert not imports("masking_generator").keys() & {"torch", "torchvision", "cv2", "os", "pathlib", "argparse"}


@pytest.mark.parametrize("name", [name for name in SOURCES if name.startswith("engine_")])
def test_engines_build_no_models_and_know_no_command_line(name):
    found = imports(name)
    assert not found.keys() & {"argparse", "options", "open_clip"}
    taken = {item for module, items in found.items() if module.startswith("modeling_") for item in items}
    assert not [item for item in taken if item == "MODELS" or item.startswith(("build_", "vit_", "pretrain_"))]
    if name == "engine_for_pretraining":
        assert taken == {"normalize_clips", "split_tokens", "take_tokens"}


def test_a_reader_of_pretraining_meets_few_files():
    """Those that the pretraining program reaches, itself included."""
    seen, ahead = set(), ["run_smile_pretraining"]
    while ahead:
        name = ahead.pop()
        seen.add(name)
        ahead += GRAPH[name] - seen
    assert len(seen) <= 19 and sum(len(SOURCES[name].read_text().splitlines()) for name in seen) <= 4918


def test_leaves_name_no_options():
    """They name their parameters; the programs add the dashes (utils.user_errors)."""
    leaves = [name for name in SOURCES if name.startswith(("modeling_", "masking_", "object_", "video_"))]
    raised = [node for name in leaves for node in ast.walk(TREES[name]) if isinstance(node, ast.Raise)]
    said = [part.value for node in raised for part in ast.walk(node) if isinstance(part, ast.Constant)]
    assert len(said) > 20 and not [text for text in said if re.search("--[a-z]", str(text))]


# Options --------------------------------------------------------------------------------------------------------


def names_read():
    """Attributes read of anything called `args` in any module, and the fields that RunOptions copies."""
    read = {field.name for field in fields(RunOptions)}
    for tree in TREES.values():
        for node in ast.walk(tree):
            match node:
                case ast.Attribute(value=ast.Name("args"), attr=name, ctx=ast.Load()):
                    read.add(name)
                case ast.Call(func=ast.Name("getattr"), args=[_, ast.Constant(name), *_]):
                    read.add(name)
    return read


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_option_is_read(program):
    options = vars(importlib.import_module(program).get_args(["--data_path", "x"])).keys()
    assert options and not options - names_read()


# Sizes and habits -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SOURCES)
def test_a_file_opens_with_a_docstring_and_is_short(name):
    lines = SOURCES[name].read_text().splitlines()
    assert ast.get_docstring(TREES[name]) and len(lines) <= 445
    functions = [node for node in ast.walk(TREES[name]) if isinstance(node, ast.FunctionDef)]
    assert not [node.name for node in functions if node.end_lineno - node.lineno >= 60]


# What is told on the console by other means than logging: errors, predictions, the answers of a child process.
PRINTING = {"utils", "evaluation", "video_check"}


@pytest.mark.parametrize("name", sorted(SOURCES.keys() - PRINTING))
def test_modules_log_and_do_not_print(name):
    """From the first process alone."""
    called = [node.func for node in ast.walk(TREES[name]) if isinstance(node, ast.Call)]
    assert not [node.lineno for node in called if isinstance(node, ast.Name) and node.id == "print"]


def test_args_are_unpacked_in_programs_and_options_alone():
    """Everything below takes plain typed values, and can be built in a test."""
    typed = lambda node: getattr(getattr(node, "annotation", None), "attr", "") == "Namespace"
    takes = {name for name, tree in TREES.items() if any(typed(node) for node in ast.walk(tree))}
    assert takes <= {*PROGRAMS, "options", "options_finetune"}
