"""Draw what a model does, as a picture and a movie of each clip.

For a pretraining checkpoint: the clip, the objects on it, the mask, the teacher's features, the student's prediction
and its error. For a fine-tuned one: the most likely classes, and the attention of the last block. Without --resume: the
clips that training would show to the student. All options of run_smile_pretraining.py are accepted; those that are not
given are the checkpoint's.
"""

import argparse
import os
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np
import torch
import torch.nn.functional as F

import modeling_finetune
import modeling_pretrain
import run_smile_pretraining as pretraining
import utils
from datasets import PretrainDataset, sample_rng
from datasets_finetune import DATA_SETS, clip_indices, read_class_names
from lists import VideoList, label_text, read_list
from metrics import MultiLabelTask, Task, label_classes
from modeling_finetune import channel_stats, normalize_clips
from options import make_parser
from utils import RunError, logger, user_errors
from video_reader import Clip, VideoError, read_clip
from video_transforms_finetune import long_side_crop, short_side_resize
from visualization import Guess, Row, attention_rows, movie, picture, pretraining_rows, write_movie
from weights import load_strictly, local_path, model_weights, read_checkpoint


class Drawing(NamedTuple):
    """Arguments of visualization.picture and movie for one clip."""

    rows: list[Row]
    captions: list[str]
    guesses: list[Guess]


Drawer = Callable[[int], Drawing]  # index in the list → its drawing


class PretrainSample(NamedTuple):
    """A training sample; see visualization.pretraining_rows."""

    natural: np.ndarray
    clip: np.ndarray
    boxes: np.ndarray | None
    mask: np.ndarray
    captions: list[str]


def get_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line (`argv`, or sys.argv).

    Returns:
        the options of this program; those of run_smile_pretraining.py as `defaults` (all) and `given` (those named).
    """
    parser = make_parser("SMILE pictures", __doc__)
    parser.usage = "%(prog)s [options] [options of run_smile_pretraining.py]"
    parser.add_argument("--resume", nargs="+", default=[], metavar="CHECKPOINT", help="models to draw")
    parser.add_argument("--output_dir", default="pictures", help="folder to write")
    parser.add_argument("--samples", type=int, nargs="+", default=[0], help="indices in the list, from 0")
    parser.add_argument("--fps", type=float, default=8, help="frames per second of the movie")
    args, words = parser.parse_known_args(argv)
    if args.fps <= 0:
        parser.error(f"--fps {args.fps}: must be more than 0")
    args.defaults = vars(pretraining.get_args(words))
    args.given = {name: args.defaults[name] for name in args.defaults["given"]}
    return args


def captions_of(clip: Clip) -> list[str]:
    """Caption each frame of a clip with its number, and its second if it has one."""
    seconds = [f", {second:.2f} s" if np.isfinite(second) else "" for second in clip.seconds]
    return [f"frame {index}{second}" for index, second in zip(clip.indices, seconds)]


def normalized(clip: np.ndarray, device: torch.device) -> torch.Tensor:
    """Convert a clip, uint8 ``[T, H, W, 3]``, to the input of the models, float ``[1, 3, T, H, W]``."""
    clips = torch.from_numpy(clip).permute(3, 0, 1, 2)[None].to(device)
    return normalize_clips(clips, *channel_stats("imagenet", device))


# Pretraining ----------------------------------------------------------------------------------------------------


def draw_sample(dataset: PretrainDataset, index: int) -> PretrainSample:
    """Make the sample that training shows in epoch 0, its first view if there are several.

    Raises:
        VideoError: unreadable. RunError: no usable object.
    """
    rng = sample_rng(dataset.seed, 0, index)
    found = dataset.source.read(rng, dataset.videos.path(index))
    natural, clip = np.empty((2, *dataset.source.shape), np.uint8)
    dataset.source.crop(deepcopy(rng), found.frames, natural)
    boxes, mask = dataset.view(rng, found.frames, clip)
    return PretrainSample(natural, clip, boxes, mask, captions_of(found))


def pretraining_drawer(run: argparse.Namespace, checkpoint: str, device: torch.device) -> tuple[VideoList, Drawer]:
    """Return the list, and the function that draws its samples; without a checkpoint there is no student."""
    dataset, teacher, student = pretraining.build_dataset(run), pretraining.choose_teacher(run, device), None
    if checkpoint:
        build = modeling_pretrain.MODELS[run.model]
        student = build(decoder_depth=run.decoder_depth, decoder_num_classes=teacher.out_dim)
        load_strictly(student, checkpoint)
        student.eval().to(device)
    grid = modeling_finetune.token_grid(run.num_frames, run.input_size, run.input_size)

    @torch.inference_mode()
    def draw(index: int) -> Drawing:
        sample = draw_sample(dataset, index)
        clips, masks = normalized(sample.clip, device), torch.from_numpy(sample.mask)[None].to(device)
        predictions = student(clips, masks)[0].float().cpu().numpy() if student else None
        targets = teacher(clips)[0].cpu().numpy()
        return Drawing(pretraining_rows(*sample[:4], targets, grid, predictions), sample.captions, [])

    return dataset.videos, draw


# Fine-tuned models ----------------------------------------------------------------------------------------------


def received_attention(attention: modeling_finetune.Attention, x: torch.Tensor) -> torch.Tensor:
    """Compute the attention each token receives, the mean over heads and queries: ``[B, N, D]`` → ``[B, N]``, sum 1.

    It is the weight of a token's value in the average over all tokens that the classifier sees.
    """
    B, N, D = x.shape
    bias = torch.cat([attention.q_bias, torch.zeros_like(attention.q_bias)])  # keys have none
    q, k = F.linear(x, attention.qkv.weight[: 2 * D], bias).view(B, N, 2, attention.num_heads, -1).unbind(2)
    scores = (q[:, :, head] @ k[:, :, head].mT * q.shape[-1] ** -0.5 for head in range(attention.num_heads))
    heads = [score.softmax(dim=-1).mean(dim=1) for score in scores]  # one at a time: N x N numbers each
    return torch.stack(heads).mean(dim=0)


@torch.inference_mode()
def classify(
    model: modeling_finetune.VisionTransformer, clips: torch.Tensor, task: Task
) -> tuple[np.ndarray, np.ndarray]:
    """Return class probabilities ``[C]`` and the last block's attention ``[N]`` of a clip ``[1, 3, T, H, W]``."""
    last, inputs = cast(modeling_finetune.Block, model.blocks[-1]).attn, []
    with last.register_forward_pre_hook(lambda module, args: inputs.append(args[0])):
        probabilities = task.probabilities(model(clips).float())[0]
    return probabilities.cpu().numpy(), received_attention(last, inputs[0])[0].float().cpu().numpy()


def classifier_drawer(
    run: argparse.Namespace, checkpoint: str, num_classes: int, device: torch.device
) -> tuple[VideoList, Drawer]:
    """Return the list (of a folder, its test.csv), and the function that draws the centre clip, as in validation."""
    if getattr(run, "data_set", "") not in DATA_SETS or run.model not in modeling_finetune.MODELS:
        raise RunError(f"{checkpoint} does not say how it was fine-tuned; only this project's checkpoints can be drawn")
    data_set, path = DATA_SETS[run.data_set], Path(run.data_path)
    if path.is_dir():
        path = Path(data_set.list_path(run.data_path, "test.csv"))
    videos = read_list(str(path), label_text, run.data_root)
    several = data_set.multi_label or bool(getattr(run, "several_labels", False))
    task = MultiLabelTask() if several else Task()
    names = read_class_names(str(path.parent), num_classes) or [f"class {label}" for label in range(num_classes)]
    model = modeling_finetune.MODELS[run.model](num_classes=num_classes)
    load_strictly(model, checkpoint, "model_ema" if getattr(run, "model_ema", False) else "")
    model.eval().to(device)
    centre = lambda total: clip_indices(None, total, run.num_frames, run.sampling_rate, data_set.sampling)
    grid = modeling_finetune.token_grid(run.num_frames, run.input_size, run.input_size)

    def draw(index: int) -> Drawing:
        found = read_clip(videos.path(index), centre, run.reader)
        frames = short_side_resize(found.frames, run.input_size)
        clip = long_side_crop(frames, run.input_size, 0, 1)
        probabilities, attention = classify(model, normalized(clip, device), task)
        best = np.argsort(-probabilities, kind="stable")[:5]
        shown = label_classes(os.fsdecode(videos.labels[index]))
        guesses = [Guess(names[c], float(probabilities[c]), int(c) in shown) for c in best]
        return Drawing(attention_rows(clip, attention, grid), captions_of(found), guesses)

    return videos, draw


# The program ----------------------------------------------------------------------------------------------------


def run_arguments(args: argparse.Namespace, checkpoint: dict) -> argparse.Namespace:
    """Combine arguments: as typed, else from the checkpoint, else the defaults of pretraining; always fp32."""
    stored = checkpoint.get("args")
    stored = vars(stored) if isinstance(stored, argparse.Namespace) else {}
    return argparse.Namespace(**args.defaults | stored | args.given | {"precision": "fp32"})


def build_drawer(args: argparse.Namespace, path: str, device: torch.device) -> tuple[VideoList, Drawer]:
    """Return the list, and the function that draws its samples for a checkpoint; an empty `path` means none.

    Raises:
        RunError: unreadable, of another kind, or arguments that do not go together.
    """
    checkpoint = read_checkpoint(path) if path else {}
    run = run_arguments(args, checkpoint)
    for name in pretraining.TEACHER_WEIGHTS:
        setattr(run, name, local_path(getattr(run, name, None) or ""))
    weights = model_weights(checkpoint, path) if path else {}
    if not run.data_path and run.background not in pretraining.GENERATED:
        raise RunError("give --data_path, a list of videos")
    if run.data_path and not os.path.exists(run.data_path):
        source = "" if "data_path" in args.given else f" (from {path})"
        raise RunError(f"--data_path {run.data_path}{source}: no such file")
    with user_errors():
        if not path or "encoder_to_decoder.weight" in weights:
            return pretraining_drawer(run, path, device)
        if "head.weight" in weights:
            return classifier_drawer(run, path, len(weights["head.weight"]), device)
    raise RunError(f"{path} is neither a pretraining nor a fine-tuned checkpoint (probes cannot be drawn)")


def main(args: argparse.Namespace) -> int:
    """Draw the samples of every checkpoint. Returns the exit code: 1 if one of them could not be read."""
    device = utils.init_distributed(args.defaults["device"])
    utils.setup_logging()
    resumed = [local_path(path) for path in args.resume]
    paths = [Path(path).absolute() for path in resumed]
    names = [f"{path.parent.name}-{path.stem}" for path in paths]
    if len(set(names)) < len(names):
        raise RunError("--resume: two of these checkpoints would give pictures of the same name: draw one at a time")
    with user_errors():
        os.makedirs(args.output_dir, exist_ok=True)
    code = 0
    for path, name in zip(resumed or [""], names or ["data"]):
        videos, draw = build_drawer(args, path, device)
        for index in args.samples:
            if not 0 <= index < len(videos):
                raise RunError(f"--samples {index}: {videos.source} has {len(videos)} videos, numbered from 0")
            try:
                drawing = draw(index)
            except VideoError as error:
                logger.error("sample %d, %s: %s", index, videos.path(index), error)
                code = 1
                continue
            title = (f"{name}, sample {index}" if path else f"sample {index}", videos.path(index))
            figure, pages = picture(title, *drawing), list(movie(title, *drawing))
            stem = os.path.join(args.output_dir, f"{name}-{index:04d}")
            with user_errors():
                figure.savefig(f"{stem}.png")
                write_movie(Path(f"{stem}.mp4"), pages, args.fps)
            logger.info("%s.png, %s.mp4", stem, stem)
    return code


if __name__ == "__main__":
    utils.run_main(main, get_args())
