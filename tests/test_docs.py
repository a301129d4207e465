"""Documents: their commands are understood, and their trainings run as dry runs on small data; links lead somewhere;
the messages that TROUBLESHOOTING.md quotes are those of the programs.
"""

import ast
import importlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fixtures_finetuning import CUSTOM
from fixtures_finetuning import TINY as FINETUNE_TINY
from fixtures_pretraining import TINY
from fixtures_video import ROOT

from modeling_finetune import MODELS

sys.path[:0] = [str(ROOT / "scripts" / folder) for folder in ("", "data", "mini", "severe")]
pytest_plugins = ("fixtures_pretraining", "fixtures_finetuning")

DOCS = sorted([*ROOT.glob("*.md"), ROOT / "annotation_files" / "README.md"])
STUBBED = (
    "python",
    "python3",
    "torchrun",
    "pip",
    "conda",
    "sbatch",
    "srun",
    "pre-commit",
    "tar",
)  # stubs note their arguments
# Recipes run, with the stubs; paths that they ask for are made. Other scripts are looked for.
PRELUDE = """
set -eu
bash() {
  case $1 in
    scripts/pretrain/*|scripts/finetune/*|scripts/test/*)
      for path in "${DATA_PATH:-}" "${OBJECTS_PATH:-}" "${MODEL_PATH:-}" "${FIRST_STAGE_CKPT:-output/first.pth}"; do
        if [[ -n $path && $path != hf://* && ! -e $path ]]; then mkdir -p "$(dirname "$path")"; touch "$path"; fi
      done
      FIRST_STAGE_CKPT=${FIRST_STAGE_CKPT:-output/first.pth} command bash "$@" ;;
    *) [[ -f $1 ]] ;;
  esac
}
source() { [[ -f $1 || $1 == .venv/bin/activate ]]; }
"""


def blocks(path, language="bash"):
    """The code blocks of a document in a language, dedented."""
    found = re.findall(rf"^( *)```{language}\n(.*?)^ *```", path.read_text(), re.DOTALL | re.MULTILINE)
    return [re.sub(rf"^{indent}", "", text, flags=re.MULTILINE) for indent, text in found]


@pytest.fixture(scope="module")
def stubs(tmp_path_factory):
    """A folder of programs that note how they were called."""
    folder = tmp_path_factory.mktemp("stubs")
    for name in STUBBED:
        (folder / name).write_text('#!/bin/bash\nprintf \'%s\\0\' "$(basename "$0")" "$@" \'\n\' >> "$STUB_LOG"\n')
        (folder / name).chmod(0o755)
    return folder


def commands(path, stubs, folder):
    """What the bash blocks of a document call, as lists of words; all must end well."""
    for entry in ROOT.iterdir():
        if entry.name != "annotation_files":
            (folder / entry.name).symlink_to(entry)
    shutil.copytree(ROOT / "annotation_files", folder / "annotation_files")  # a document writes a list there
    log = folder / "commands"
    log.write_text("")
    env = {"PATH": f"{stubs}:/usr/bin:/bin", "STUB_LOG": str(log), "HOME": str(folder)}
    text = re.sub(r"(?<!\w)/(data|path/to)/", f"{folder}/data/", "\n".join(blocks(path)))
    text = text.replace("=...", f"={folder}/data/some").replace("find /", "find -L /")
    (folder / "data").mkdir()
    result = subprocess.run(
        ["bash", "-c", PRELUDE + text], env=env, cwd=folder, capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0, f"{path.name}: {result.stderr}"
    return [line.split("\0")[:-1] for line in log.read_text().split("\n\0") if line]


def program_of(words):
    """Index of the Python file that a command starts, and its path; None if it starts none."""
    return next(((i, word) for i, word in enumerate(words) if word.endswith(".py") and "=" not in word), (None, None))


def parse(words):
    """Have a command understood by what it starts."""
    if words[:3] == ["python", "-m", "pytest"]:
        assert all((ROOT / word).exists() for word in words[3:] if word.startswith("tests")), words
        return None
    index, program = program_of(words)
    if index is None:
        if "-r" in words:
            named = [words[i + 1] for i, word in enumerate(words) if word in ("-r", "-c")]
            assert all((ROOT / name).is_file() for name in named), words
        elif words[0] == "sbatch":
            assert (ROOT / words[1]).is_file() and (ROOT / "scripts" / f"{words[2]}.sh").is_file(), words
        elif "-c" in words:
            compile(words[words.index("-c") + 1], "command", "exec")
        return None
    if program == "step_cpu_time.py":  # a document writes it
        return None
    path = Path(program) if os.path.isabs(program) else ROOT / program
    assert path.is_file(), words
    module = importlib.import_module(path.stem)
    if hasattr(module, "get_args"):
        return path.name, module.get_args(words[index + 1 :])
    return path.name, None


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.stem if path.parent == ROOT else "lists")
def test_commands_are_understood(path, stubs, tmp_path):
    for words in commands(path, stubs, tmp_path):
        try:
            parse(words)
        except SystemExit:
            pytest.fail(f"{path.name}: {' '.join(words)}")


# The options of a command that name data or weights, or make it large, give way to these.
SMALL = ["--num_workers", "0", "--output_dir=", "--log_dir=", "--data_root=", "--epochs", "2", "--update_freq", "1"]
UNTRIED = {"--eval", "--predict", "--knn", "--encoder"}  # no training, or weights that have to be fetched
TRAINED = ("README", "PRETRAIN", "FINETUNE", "INSTALL", "MODEL_ZOO")


@pytest.fixture(scope="module")
def trainings(stubs, tmp_path_factory):
    """The trainings that the documents name, one of each kind: program → options → words."""
    found = {"run_smile_pretraining.py": {}, "run_class_finetuning.py": {}}
    for name in TRAINED:
        for words in commands(ROOT / f"{name}.md", stubs, tmp_path_factory.mktemp(name)):
            index, program = program_of(words)
            options = words[index + 1 :] if program else []
            if Path(program or "").name in found and not UNTRIED & set(options):
                kind = frozenset(word for word in options if word.startswith("--") and word != "--dry_run")
                found[Path(program).name][kind] = options
    assert all(found.values())
    return found


def test_pretraining_commands_run(trainings, start, clips, objects_folder, tmp_path):
    listed = tmp_path / "list.csv"
    listed.write_text("".join(f"{path} -1\n" for path in clips.values()))
    runs = []
    for number, options in enumerate(trainings["run_smile_pretraining.py"].values()):
        source = objects_folder if "image" in options else listed
        small = [*TINY, *SMALL, "--data_path", source, "--batch_size", "4", "--target_type", "pixel", "--dry_run"]
        small += ["--objects_path", objects_folder] if "--objects_path" in options else []
        if "--first_stage_path" in options:
            place = options.index("--first_stage_path")
            options = options[:place] + options[place + 2 :]
        runs.append((options, start(*options, *small)))
        assert number < 12, "more kinds of commands than a test should run"
    for options, run in runs:
        result = run.end()
        assert result.code == 0 and "steps went well" in result.out, f"{options}\n{result.err}"


def test_fine_tuning_commands_run(trainings, run, clips, tmp_path):
    for name in ("train.csv", "val.csv", "test.csv", "train_mini.csv"):
        (tmp_path / name).write_text("".join(f"{path} {i % 3}\n" for i, path in enumerate(clips.values())))
    torch.save({"model": MODELS["vit_tiny_patch16_224"](num_classes=0).state_dict()}, tmp_path / "encoder.pth")
    small = [*FINETUNE_TINY, *SMALL, *CUSTOM, "--data_path", tmp_path, "--finetune", tmp_path / "encoder.pth"]
    assert len(trainings["run_class_finetuning.py"]) < 12, "more kinds of commands than a test should run"
    for options in trainings["run_class_finetuning.py"].values():
        result = run(*options, *small, "--batch_size", "2", "--dry_run")
        assert result.code == 0 and "steps went well" in result.out, f"{options}\n{result.err}"


# Links and messages ---------------------------------------------------------------------------------------------


def anchor(heading):
    """GitHub's name of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.stem if path.parent == ROOT else "lists")
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
        name, _, heading = target.partition("#")
        if target.startswith("http"):
            continue
        linked = path.parent / name if name else path
        assert linked.exists(), target
        headings = re.findall(r"^#+ (.*)$", linked.read_text(), re.MULTILINE) if heading else ()
        assert not heading or heading in map(anchor, headings), target


def test_the_readme_links_all_documents():
    text = (ROOT / "README.md").read_text()
    missing = [path.name for path in ROOT.glob("*.md") if path.name != "README.md" and f"({path.name})" not in text]
    assert missing == []


def templates():
    """Texts of the programs' messages, with … for what is filled in."""
    for path in ROOT.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                yield "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield re.sub(r"%[-.\d]*[sdfg]", "…", node.value)
    yield re.sub(r"\$\w+|\$\{[^}]*\}", "…", (ROOT / "scripts" / "common.sh").read_text())


def quoted_messages():
    """What stands in backticks in the first column of the tables, where it is a sentence."""
    for line in (ROOT / "TROUBLESHOOTING.md").read_text().splitlines():
        if line.startswith("| "):
            cell = line.split(" | ")[0].replace("``path label``", "\0path label\0")
            yield from (text.replace("\0", "`") for text in re.findall(r"`([^`]+)`", cell) if " " in text)


def test_quoted_messages_are_those_of_the_programs():
    """Sentences that are put together from parts (an option's name and why) are looked for by their parts."""
    known, quoted = list(templates()), list(quoted_messages())
    assert len(quoted) > 25
    own = {"--use_cls is not supported: the encoder has no class token": " is not supported: …"}
    own |= {text: text.removeprefix("--clip") for text in quoted if text.startswith("--clip_weights …")}
    for text in quoted:
        wanted = own.get(text, text)
        placed = wanted.replace("…, line …: ", "…: ")  # the place comes from elsewhere
        assert any(wanted in template or placed in template for template in known), text
