"""Every command of the documents, of the recipes, and of those that SMILE and VideoMAE publish: its program understands
it, and one of each kind runs as a dry run on small data. Also the links between documents.
"""

import functools
import importlib
import re
import shutil
import subprocess
from itertools import pairwise

import fixtures_scripts
import pytest
import torch
from fixtures_finetuning import CUSTOM
from fixtures_finetuning import TINY as FINETUNE_TINY
from fixtures_pretraining import NAME, TINY
from fixtures_scripts import PROGRAMS, caught, launcher_option, program_args, program_of, write_stubs
from fixtures_video import ROOT, write_list

from modeling_finetune import MODELS

pytest_plugins = ("fixtures_pretraining", "fixtures_finetuning", "fixtures_scripts")

DOCS = {path.stem: path for path in ROOT.glob("*.md")} | {"lists": ROOT / "annotation_files" / "README.md"}
RECIPES = {f"{path.parent.name}/{path.stem}": path for path in fixtures_scripts.RECIPES}

# Command lines of SMILE and VideoMAE, whole but for the program's name and the paths: --data_path, --output_dir and
# others stand in these as DATA, OUT, OBJECTS, WEIGHTS.
VIDEOMAE = """--data_path DATA --mask_type tube --mask_ratio 0.9 --model pretrain_videomae_base_patch16_224
    --decoder_depth 4 --batch_size 32 --num_frames 16 --sampling_rate 4 --opt adamw --opt_betas 0.9 0.95
    --warmup_epochs 40 --save_ckpt_freq 20 --epochs 1601 --log_dir OUT --output_dir OUT"""
SMILE = """--data_path DATA --mask_ratio 0.8 --model pretrain_videomae_base_patch16_224 --decoder_depth 4
    --batch_size 32 --num_frames 16 --sampling_rate 4 --opt adamw --opt_betas 0.9 0.95 --warmup_epochs 40
    --save_ckpt_freq 20 --epochs 801 --log_dir OUT --output_dir OUT --target_type clip --distillation_teacher clip_b
    --multiple_sampling"""
STAGE_1 = """ --mask_type tubelet --sub_mask_type tube+traj_mask --traj_unmask_ratio 0.2 --add_tubelets --use_objects
    --objects_path OBJECTS --motion_type gaussian"""
COMMON = """--data_path DATA --finetune WEIGHTS --log_dir OUT --output_dir OUT --model vit_base_patch16_224
    --input_size 224 --short_side_size 224 --save_ckpt_freq 10 --num_frames 16 --opt adamw --opt_betas 0.9 0.999
    --weight_decay 0.05 --dist_eval --test_num_crop 3 --enable_deepspeed"""
TUNE = "run_class_finetuning.py"
PUBLISHED = {  # name: (program, command line)
    "SMILE K400 stage 1": (NAME, SMILE + STAGE_1),
    "SMILE K400 stage 2": (NAME, SMILE + " --mask_type tube --first_stage_path WEIGHTS"),
    "VideoMAE K400": (NAME, VIDEOMAE),
    "VideoMAE SSv2": (NAME, f"{VIDEOMAE} --sampling_rate 2 --epochs 2401"),
    "VideoMAE UCF101": (
        NAME,
        f"{VIDEOMAE} --mask_ratio 0.75 --lr 3e-4 --normlize_target True --batch_size 24 --epochs 3201",
    ),
    "SMILE K400 fine-tuned": (
        TUNE,
        f"""{COMMON} --data_set Kinetics-400 --nb_classes 400 --batch_size 4 --sampling_rate 4 --num_sample 1 --lr 1e-3
        --layer_decay 0.75 --drop_path 0.1 --epochs 100 --test_num_segment 7""",
    ),
    "SMILE SSv2 fine-tuned": (
        TUNE,
        f"""{COMMON} --data_set SSV2 --nb_classes 174 --batch_size 8 --num_sample 1 --lr 1e-3 --layer_decay 0.7
        --epochs 40 --test_num_segment 2""",
    ),
    "VideoMAE K400 fine-tuned": (
        TUNE,
        f"""{COMMON} --data_set Kinetics-400 --nb_classes 400 --batch_size 8 --sampling_rate 4 --lr 5e-4 --epochs 75
        --test_num_segment 5""",
    ),
    "VideoMAE SSv2 fine-tuned": (
        TUNE,
        f"""{COMMON} --data_set SSV2 --nb_classes 174 --batch_size 8 --num_sample 2 --lr 5e-4 --epochs 50
        --test_num_segment 2 --tubelet_size 2 --use_mean_pooling""",
    ),
    "VideoMAE UCF101 fine-tuned": (
        TUNE,
        f"""{COMMON} --data_set UCF101 --nb_classes 101 --batch_size 8 --sampling_rate 4 --num_sample 2 --lr 5e-4
        --warmup_lr 1e-8 --min_lr 1e-5 --layer_decay 0.7 --epochs 100 --test_num_segment 10 --fc_drop_rate 0.5
        --drop_path 0.2 --use_checkpoint""",
    ),
}


# What is called ---------------------------------------------------------------------------------------------------

# Of a document, recipes run, and paths that they ask for are made; other scripts are looked for.
PRELUDE = """
set -eu
bash() {
  case $1 in
    scripts/pretrain/*|scripts/finetune/*|scripts/test/*|scripts/severe/[^r]*)
      export DATA_ROOT=${DATA_ROOT:-output}
      for path in "${DATA_PATH:-}" "${OBJECTS_PATH:-}" "${MODEL_PATH:-}" "${FIRST_STAGE_CKPT:-output/first.pth}"; do
        if [[ -n $path && $path != hf://* && ! -e $path ]]; then mkdir -p "$(dirname "$path")"; touch "$path"; fi
      done
      FIRST_STAGE_CKPT=${FIRST_STAGE_CKPT:-output/first.pth} command bash "$@" ;;
    *) [[ -f $1 ]] ;;
  esac
}
source() { [[ -f $1 || $1 == .venv/bin/activate ]]; }
"""


@pytest.fixture(scope="session")
def called(tmp_path_factory):
    """A function: what the bash blocks of a document, or a recipe, call, as lists of words; all must end well."""
    names = "python python3 torchrun pip conda sbatch srun pre-commit tar".split()
    stubs = write_stubs(tmp_path_factory.mktemp("stubs") / "bin", *names)

    @functools.cache
    def called(name):
        folder = tmp_path_factory.mktemp("called")
        for entry in ROOT.iterdir():
            if entry.name != "annotation_files":
                (folder / entry.name).symlink_to(entry)
        shutil.copytree(ROOT / "annotation_files", folder / "annotation_files")  # a document writes a list there
        (folder / "data").mkdir()
        if name in RECIPES:
            text, paths = f"bash scripts/{name}.sh", dict.fromkeys(("DATA_PATH", "OBJECTS_PATH", "MODEL_PATH"), "x")
        else:
            found = re.findall(r"^( *)```bash\n(.*?)^ *```", DOCS[name].read_text(), re.DOTALL | re.MULTILINE)
            text = "\n".join(re.sub(rf"^{indent}", "", block, flags=re.MULTILINE) for indent, block in found)
            text = re.sub(r"(?<!\w)/(data|path/to)/", f"{folder}/data/", text)
            text, paths = text.replace("=...", f"={folder}/data/some").replace("find /", "find -L /"), {}
        (folder / "commands").write_text("")
        env = {"PATH": f"{stubs}:/usr/bin:/bin", "STUB_LOG": str(folder / "commands"), "HOME": str(folder), **paths}
        words = ["bash", "-c", PRELUDE + text]
        result = subprocess.run(words, env=env, cwd=folder, capture_output=True, text=True, timeout=60)
        assert result.returncode == 0, f"{name}: {result.stderr}"
        return caught(folder / "commands")

    return called


def understood(words):
    """Have a command understood by what it starts."""
    program, options = program_of(words)
    if words[:3] == ["python", "-m", "pytest"]:
        assert all((ROOT / word).exists() for word in words[3:] if word.startswith("tests")), words
    elif program is None and "-r" in words:
        named = [words[i + 1] for i, word in enumerate(words) if word in ("-r", "-c")]
        assert all((ROOT / name).is_file() for name in named), words
    elif program is None and words[0] == "sbatch":
        assert (ROOT / words[1]).is_file() and (ROOT / "scripts" / f"{words[2]}.sh").is_file(), words
    elif program is None and "-c" in words:
        compile(words[words.index("-c") + 1], "command", "exec")
    elif program is not None and program.name != "step_cpu_time.py":  # a document writes that one
        assert (ROOT / program).is_file(), words
        module = importlib.import_module(program.stem)
        if hasattr(module, "get_args"):
            try:
                module.get_args(options)
            except SystemExit:
                pytest.fail(" ".join(words))


@pytest.mark.parametrize("name", [*DOCS, *RECIPES])
def test_commands_are_understood(called, name):
    for words in called(name):
        understood(words)


def means_the_same(args, text, but=()):
    """Options of a command line that take a number or a word have been understood so; the last of several counts."""
    given = {word: value for word, value in pairwise(text.split()) if word.startswith("--")}
    seen = 0
    for name, value in given.items():
        name = name.removeprefix("--")
        if not value.startswith("--") and not value.isupper() and name not in but:
            held = getattr(args, name, None)
            held = held[0] if isinstance(held, list) else held
            assert held is None or str(held) == value or float(held) == float(value), (name, held, value)
            seen += held is not None
    assert seen > 8


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_commands_mean_what_they_say(name):
    program, text = PUBLISHED[name]
    args = PROGRAMS[program].get_args(text.split())
    means_the_same(args, text)
    if program != NAME:
        assert "--dist_eval" in args.not_needed and args.enable_deepspeed


@pytest.mark.parametrize("name", [name for name in RECIPES if not name.startswith("severe/ucf_rc")])
def test_recipes_are_the_published_ones_where_there_are_such(called, name):
    """They differ in what makes the total batch; stage 1 in --traj_unmask_ratio, as PRETRAIN.md says."""
    command = next(words for words in called(name) if words[0] == "torchrun")
    args, folder, stem = program_args(command), *name.split("/")
    output = stem if folder != "severe" else f"severe/{stem}"
    assert args.output_dir == f"output/{output}" and int(launcher_option(command, "--nproc_per_node")) in (4, 8)
    but = ["batch_size", "traj_unmask_ratio", "save_ckpt_freq"]
    if folder == "pretrain" and not stem.startswith("no_video"):
        _, text = PUBLISHED[f"SMILE K400 stage {2 - ('1st' in stem)}"]
        if "ssv2" in stem:
            text = text.replace("--sampling_rate 4", "--sampling_rate 2")  # as VideoMAE's
        sizes = {"b": "base", "l": "large", "s": "small"}
        text = text.replace("base", sizes[stem.split("_")[2]])
        means_the_same(args, text, but)
        flags = {"multiple_sampling", "add_tubelets", "use_objects"}
        assert {flag for flag in flags if getattr(args, flag)} == {flag for flag in flags if f"--{flag}" in text}
    elif stem in ("finetune_k400_vit_b", "finetune_ssv2_vit_b"):
        _, text = PUBLISHED[f"SMILE {'K400' if 'k400' in stem else 'SSv2'} fine-tuned"]
        but += "short_side_size nb_classes test_num_segment test_num_crop".split()  # those of the data set
        means_the_same(args, text, but)
        assert not args.nb_classes and not args.test_num_segment and not args.test_num_crop
    elif folder in ("finetune", "test"):
        assert args.eval == (folder == "test") and args.linear_probe == stem.startswith("linear")


# Dry runs -----------------------------------------------------------------------------------------------------------

# The options of a command that name data or weights, or make it large, give way to these.
SMALL = "--num_workers 0 --output_dir= --log_dir= --data_root= --epochs 2 --update_freq 1 --dry_run".split()
# No training, or weights that have to be fetched; and what is given in its place.
UNTRIED = {"--eval", "--predict", "--knn", "--encoder"}
GIVEN = {*TINY, *FINETUNE_TINY, *SMALL, *CUSTOM} | {f"--{name}" for name in ("target_type", "finetune", "resume")}
GIVEN |= {f"--{name}" for name in ("first_stage_path", "distillation_teacher", "clip_model", "clip_weights", "log_dir")}


def kind_of(options):
    """What sets commands apart: flags, and options with words; numbers and paths do not."""
    values, kind = {}, set()
    for word in options:
        if word.startswith("--"):
            name, _, value = word.partition("=")
            values[name] = [value] if value else []
        else:
            values[name].append(word)
    for name, words in values.items():
        text = " ".join(words)
        if name not in GIVEN and not re.search(r"\d[\d.e -]*$|/|[A-Z]{3}", text):
            kind.add((name, text))
    return frozenset(kind)


@pytest.fixture(scope="session")
def trainings(called):
    """Program → kind → options, of all commands that train."""
    found = {name: {} for name in PROGRAMS}
    commands = [words for name in (*DOCS, *RECIPES) for words in called(name)]
    for words in [*commands, *([program, *text.split()] for program, text in PUBLISHED.values())]:
        program, options = program_of(words)
        if program is not None and program.name in found and not UNTRIED & set(options):
            found[program.name].setdefault(kind_of(options), options)
    assert all(3 < len(kinds) < 14 for kinds in found.values()), "fewer or more kinds than a test should run"
    return found


def test_pretraining_commands_run(trainings, start, clips, objects_folder, tmp_path):
    listed = write_list(tmp_path / "list.csv", clips.values())
    small = [*TINY, *SMALL, "--batch_size", "4", "--target_type", "pixel", "--objects_path", objects_folder]
    for options in trainings[NAME].values():
        source = objects_folder if "image" in options else listed
        result = start(*options, *small, "--first_stage_path=", "--data_path", source).end()
        assert result.code == 0 and "steps went well" in result.out, f"{options}\n{result.err}"


def test_fine_tuning_commands_run(trainings, run, clips, tmp_path):
    for name in ("train.csv", "val.csv", "test.csv", "train_mini.csv"):
        (tmp_path / name).write_text("".join(f"{path} {i % 3}\n" for i, path in enumerate(clips.values())))
    torch.save({"model": MODELS["vit_tiny_patch16_224"](num_classes=0).state_dict()}, tmp_path / "encoder.pth")
    small = [*FINETUNE_TINY, *SMALL, *CUSTOM, "--data_path", tmp_path, "--finetune", tmp_path / "encoder.pth"]
    for options in trainings[TUNE].values():
        result = run(*options, *small, "--batch_size", "2", "--short_side_size", "32")
        assert result.code == 0 and "steps went well" in result.out, f"{options}\n{result.err}"


# Links --------------------------------------------------------------------------------------------------------------


def anchor(heading):
    """GitHub's name of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("name", DOCS)
def test_links_lead_somewhere(name):
    for target in re.findall(r"\]\(([^)\s]+)\)", DOCS[name].read_text()):
        file, _, heading = target.partition("#")
        if target.startswith("http"):
            continue
        linked = DOCS[name].parent / file if file else DOCS[name]
        assert linked.exists(), target
        headings = re.findall(r"^#+ (.*)$", linked.read_text(), re.MULTILINE) if heading else ()
        assert not heading or heading in map(anchor, headings), target


def test_the_readme_links_all_documents():
    text = (ROOT / "README.md").read_text()
    assert not [path.name for path in ROOT.glob("*.md") if path.name != "README.md" and f"({path.name})" not in text]
