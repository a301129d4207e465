"""Pictures and movies: what each row shows, against torch, PyAV, matplotlib's colours and the training samples."""

import argparse
from itertools import combinations
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fixtures_pictures import check_texts
from fixtures_teacher import IMAGENET_MEAN, IMAGENET_STD
from fixtures_video import decode_all, write_list

import modeling_finetune
import modeling_pretrain
import run_class_finetuning
import run_smile_pretraining
import run_visualization
import visualization
from modeling_teacher import PixelTarget
from utils import RunError
from visualization import FeatureColours, Guess, Row

pytest_plugins = "fixtures_finetuning"
GRID = (2, 3, 3)  # of 4 frames of 48 px
SHAPE = (4, 48, 48, 3)
N = 18
TINY = "--decoder_depth 1 --target_type pixel --num_frames 4 --input_size 48 --mask_ratio 0.7 --sampling_rate 2"
STAGE1 = "--model pretrain_videomae_tiny_patch16_224 --add_tubelets --use_objects --mask_type tubelet"
GUESSES = [Guess("a class with a name that is much too long to be shown", 0.93, False), Guess("other", 0.04, True)]


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def frames_of(rng):
    return rng.integers(0, 256, SHAPE, dtype=np.uint8)


def some_mask(rng):
    return rng.permutation(np.arange(N) < 12)


# Rows -----------------------------------------------------------------------------------------------------------


def test_pca_is_that_of_torch(rng):
    features = (rng.normal(size=(N, 24)) * 0.7 ** np.arange(24)).astype(np.float32)
    ours = FeatureColours(features).project(features)
    torch.manual_seed(0)
    u, s, _ = torch.pca_lowrank(torch.from_numpy(features), q=12, niter=30)
    expected = (u * s)[:, :3].numpy()
    signs = np.sign((ours * expected).sum(axis=0))
    np.testing.assert_allclose(ours, expected * signs, atol=1e-4)


def test_one_basis_colours_all_features_of_a_clip(rng):
    features = rng.normal(size=(N, 24))
    colours = FeatureColours(features)
    everything = colours(features)
    assert everything.dtype == np.uint8 and everything.min() == 0 and everything.max() == 255
    np.testing.assert_array_equal(colours(features[3:7]), everything[3:7])
    again = FeatureColours(features[::-1])(features)  # signs do not depend on the solver's mood
    np.testing.assert_allclose(again.astype(int), everything, atol=1)
    assert FeatureColours(np.ones((N, 5)))(np.ones((N, 5))).shape == (N, 3)  # though they do not differ


def test_hidden_tokens_are_dark_and_the_others_untouched(rng):
    frames, mask = frames_of(rng), some_mask(rng)
    shown = visualization.hide_tokens(frames, mask, GRID)
    for token, hidden in enumerate(mask):
        t, y, x = np.unravel_index(token, GRID)
        where = np.s_[2 * t : 2 * t + 2, 16 * y : 16 * y + 16, 16 * x : 16 * x + 16]
        expected = np.full_like(shown[where], visualization.HIDDEN) if hidden else frames[where]
        np.testing.assert_array_equal(shown[where], expected)


def test_boxes_are_outlines_and_may_hang_over_the_edge(rng):
    frames = frames_of(rng)
    boxes = np.tile([[[10, 5, 30, 25]], [[-8, 40, 12, 60]]], (1, 4, 1))
    drawn = visualization.draw_boxes(frames, boxes)
    assert (drawn[:, 5, 10:30] == visualization.BOX_COLOURS[0]).all()
    assert (drawn[:, 24, 10:30] == visualization.BOX_COLOURS[0]).all()
    assert (drawn[:, 40, :12] == visualization.BOX_COLOURS[1]).all()
    np.testing.assert_array_equal(drawn[:, 7:23, 12:28], frames[:, 7:23, 12:28])


def test_rows_of_pretraining(rng):
    natural, clip, mask = frames_of(rng), frames_of(rng), some_mask(rng)
    boxes = np.tile([[[10, 5, 30, 25]]], (1, 4, 1))
    targets, predictions = rng.normal(size=(N, 8)), rng.normal(size=(12, 8))
    rows = visualization.pretraining_rows(natural, clip, boxes, mask, targets, GRID, predictions)
    titles = ["clip", "with objects", "mask", "teacher's features", "student's guess", "error"]
    assert [row.title.split("\n")[0].split(",")[0] for row in rows] == titles
    _, _, masked, teacher, student, error = (row.images for row in rows)
    assert masked.shape == SHAPE and "67% hidden" in rows[2].title
    hidden = mask.reshape(GRID)
    assert (student[~hidden] == visualization.UNKNOWN).all() and np.isnan(error[~hidden]).all()
    colours = FeatureColours(targets)
    np.testing.assert_array_equal(teacher.reshape(N, 3), colours(targets))
    np.testing.assert_array_equal(student[hidden], colours(predictions))  # on the teacher's axes
    per_token = np.square(predictions - targets[mask]).mean(axis=1)
    np.testing.assert_allclose(error[hidden], per_token)
    assert f"{per_token.mean():.2f}" in rows[-1].title
    assert len(visualization.pretraining_rows(natural, clip, None, mask, targets, GRID)) == 3


def test_frames_are_lit_by_attention(rng):
    attention = np.full(N, 0.2 / (N - 1))
    attention[4] = 0.8  # the middle of the first two frames
    frames = np.full(SHAPE, 200, np.uint8)
    _, lit, share = (row.images for row in visualization.attention_rows(frames, attention, GRID))
    assert share.sum() == pytest.approx(N) and share[0, 1, 1] == pytest.approx(0.8 * N)
    assert (lit[:2, 24, 24] > 180).all() and (lit[2:] < 30).all() and (lit[:, :8, :8] < 30).all()


# Layout ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def drawn(monkeypatch):
    """Figures in the order of their pages."""
    figures, pixels = [], visualization.pixels
    monkeypatch.setattr(visualization, "pixels", lambda figure: figures.append(figure) or pixels(figure))
    return figures


@pytest.mark.parametrize("steps, students", [(16, True), (2, False)])
def test_nothing_overlaps(rng, drawn, steps, students):
    grid, frames = (steps, 3, 3), 2 * steps
    clip, mask = rng.integers(0, 200, (frames, 48, 48, 3), dtype=np.uint8), np.tile(rng.permutation(9) < 6, steps)
    boxes = np.tile([[[10, 5, 30, 25]]], (1, frames, 1))
    predictions = rng.normal(size=(mask.sum(), 8)) if students else None
    rows = visualization.pretraining_rows(clip, clip, boxes, mask, rng.normal(size=(9 * steps, 8)), grid, predictions)
    others = visualization.attention_rows(clip, np.full(9 * steps, 1 / (9 * steps)), grid)
    title = ("a-checkpoint, sample 3", "/a/very/long/path/" * 20 + "video.mp4")
    captions = [f"frame {number}, 9.99 s" for number in np.arange(frames) * 40 + 1000]
    for arguments in ((rows, captions), (others, captions, GUESSES)):
        next(visualization.movie(title, *arguments))
        for figure in (visualization.picture(title, *arguments), drawn.pop()):
            texts = check_texts(figure)
            assert {title[0], *(row.title for row in arguments[0])} <= set(texts)
            assert any("…" in text and text.endswith("video.mp4") for text in texts)
            assert len(arguments) == 2 or {"93.0%", "4.0%", "other"} <= set(texts)
            cells = [axes.get_window_extent() for axes in figure.axes if axes.images]
            assert cells and not any(a.overlaps(b) for a, b in combinations(cells, 2))


def test_every_cell_shows_its_step_in_its_column_under_its_caption():
    """In the pixels of the page: frames of one grey each, numbers in the colours of the bar, unknown ones grey."""
    frames = np.arange(0, 240, 15, dtype=np.uint8)[:, None, None, None] * np.ones((1, 32, 32, 3), np.uint8)
    steps = np.arange(8, dtype=float)[:, None, None] * np.ones((1, 2, 2))
    steps[2] = np.nan
    rows = [Row("f", frames), Row("t", steps, 7.0)]
    figure = visualization.picture(("", ""), rows, [f"frame {n}" for n in range(100, 116)])
    page = visualization.pixels(figure)
    cells = [axes for axes in figure.axes if axes.images]
    assert [axes.get_title() for axes in cells[:8]] == [f"frame {n}" for n in range(100, 116, 2)]
    places = np.array([axes.get_window_extent().get_points().mean(axis=0) for axes in cells])  # x, y from below
    x, y = np.split(places.reshape(2, 8, 2).round().astype(int), 2, axis=2)
    assert (x[0] == x[1]).all() and (np.diff(x[0, :, 0]) > 50).all() and (y[0] > y[1]).all()
    shown = page[figure.bbox.height.astype(int) - y[..., 0], x[..., 0]]
    np.testing.assert_array_equal(shown[0], frames[::2, 0, 0])
    expected = matplotlib.colormaps["inferno"](np.arange(8) / 7, bytes=True)[:, :3]
    expected[2] = visualization.UNKNOWN
    np.testing.assert_array_equal(shown[1], expected)


# Files ----------------------------------------------------------------------------------------------------------


def test_movies_have_all_frames_and_the_size_of_the_pages(clips, tmp_path):
    frames = decode_all(clips["bikes.mp4"])[:6]
    pages = list(visualization.movie(("t", "v"), [Row("clip", frames), Row("again", frames)], range(6)))
    height, width = pages[0].shape[:2]
    assert len(pages) == 6 and height % 2 == width % 2 == 0
    visualization.write_movie(tmp_path / "m.mp4", pages, 7.5)
    decoded = decode_all(tmp_path / "m.mp4")
    assert decoded.shape == (6, height, width, 3)
    assert np.square(decoded.astype(float) - np.stack(pages)).mean() < 255**2 / 10**3  # PSNR > 30 dB


# The program ----------------------------------------------------------------------------------------------------


@pytest.fixture
def video_list(clips, broken, tmp_path):
    return write_list(tmp_path / "train list.csv", [*clips.values(), broken["text"]], label=1)


@pytest.fixture
def pretrained(video_list, objects_folder, tmp_path):
    """A checkpoint of stage 1, its model and its arguments."""
    words = [*TINY.split(), *STAGE1.split(), "--data_path", video_list, "--objects_path", str(objects_folder)]
    args = run_smile_pretraining.get_args([*words, "--seed", "3", "--num_sample", "2"])
    model = modeling_pretrain.MODELS[args.model](decoder_depth=1, decoder_num_classes=1536).eval()
    path = tmp_path / "stage1" / "checkpoint-0.pth"
    path.parent.mkdir()
    torch.save({"model": model.state_dict(), "args": args}, path)
    return path, model, args


@pytest.fixture
def finetuned(video_list, tmp_path):
    """A fine-tuned checkpoint whose averaged weights are the ones to use, and that model."""
    folder = tmp_path / "labelled"
    folder.mkdir()
    (folder / "test.csv").write_text(Path(video_list).read_text())
    (folder / "classes.txt").write_text("riding\nwalking\nphoning\n")
    words = """--model vit_tiny_patch16_224 --data_set custom --nb_classes 3 --model_ema --input_size 48 --num_frames 4
        --sampling_rate 2 --data_path""".split()
    args = run_class_finetuning.get_args([*words, str(folder)])
    model, other = (modeling_finetune.vit_tiny_patch16_224(num_classes=3, init_scale=20).eval() for _ in range(2))
    path = tmp_path / "finetuned" / "checkpoint-best.pth"
    path.parent.mkdir()
    torch.save({"model": other.state_dict(), "model_ema": model.state_dict(), "args": args}, path)
    return path, model, args


def visualize(*words):
    return run_visualization.main(run_visualization.get_args([str(word) for word in words]))


def drawer(*words, path=""):
    args = run_visualization.get_args([str(word) for word in words])
    return run_visualization.build_drawer(args, str(path), torch.device("cpu"))


def normalised(clips):
    """uint8 [B, 3, T, H, W] by ImageNet's statistics."""
    mean, std = (torch.tensor(values).view(3, 1, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return (clips / 255 - mean) / std


def test_the_clip_and_the_mask_are_those_of_training(pretrained):
    dataset = run_smile_pretraining.build_dataset(pretrained[2])
    for index in range(4):
        sample, trained_on = run_visualization.draw_sample(dataset, index), dataset[(0, index)]
        np.testing.assert_array_equal(sample.clip, trained_on["clips"][0])
        np.testing.assert_array_equal(sample.mask, trained_on["masks"][0])
        assert (sample.natural != sample.clip).any() and sample.boxes.shape == (2, 4, 4)


def test_the_error_is_the_loss(pretrained):
    path, model, args = pretrained
    _, draw = drawer(path=path)
    drawing = draw(1)
    sample = run_visualization.draw_sample(run_smile_pretraining.build_dataset(args), 1)
    clips = normalised(torch.from_numpy(sample.clip).permute(3, 0, 1, 2)[None])
    mask = torch.from_numpy(sample.mask)[None]
    with torch.inference_mode():
        loss = F.mse_loss(model(clips, mask)[0], PixelTarget()(clips)[mask])
    assert np.nanmean(drawing.rows[-1].images) == pytest.approx(float(loss), rel=1e-4)
    assert drawing.captions == sample.captions and all(text.endswith(" s") for text in sample.captions)


def test_typed_options_win_over_the_checkpoint_and_that_over_the_defaults(pretrained):
    args = run_visualization.get_args(["--resume", "x", "--mask_type=tube", "--mask_ratio", "0.8", "--samples", "2"])
    run = run_visualization.run_arguments(args, {"args": argparse.Namespace(mask_type="tubelet", num_frames=8)})
    assert (run.mask_type, run.mask_ratio, run.num_frames, run.input_size) == ("tube", 0.8, 8, 224)
    assert (args.resume, args.samples) == (["x"], [2])
    assert run_visualization.run_arguments(args, {"args": None}).num_frames == 16
    path = pretrained[0]
    assert [len(drawer(*words, path=path)[1](0).rows) for words in ((), ("--mask_type", "tube"))] == [6, 6]
    assert len(drawer(*TINY.split(), "--data_path", pretrained[2].data_path)[1](0).rows) == 3  # what a run would see


def test_classes_and_attention_of_a_fine_tuned_model(finetuned, clips):
    path, model, args = finetuned
    videos, draw = drawer(path=path)
    drawing = draw(0)
    views = run_class_finetuning.build_evaluator(args, torch.device("cpu")).val_views(videos.path(0))
    with torch.inference_mode():
        expected = model(normalised(views))[0].softmax(dim=0)
    assert [guess.probability for guess in drawing.guesses] == pytest.approx(expected.sort(descending=True)[0].tolist())
    names = ["riding", "walking", "phoning"]
    assert [guess.name for guess in drawing.guesses] == [names[i] for i in expected.argsort(descending=True)]
    assert [guess.name for guess in drawing.guesses if guess.right] == ["walking"]
    assert drawing.rows[-1].images.sum() == pytest.approx(N, rel=1e-4)


def test_attention_received_is_that_of_torch():
    torch.manual_seed(0)
    attention, x = modeling_finetune.Attention(12, 3), torch.randn(2, 7, 12)
    torch.nn.init.normal_(attention.qkv.weight)
    torch.nn.init.normal_(attention.q_bias)
    with torch.inference_mode():
        q, k, _ = attention.qkv(x).chunk(3, dim=2)
        q, k = ((part.view(2, 7, 3, 4).transpose(1, 2)) for part in (q + attention.q_bias, k))
        weights = F.scaled_dot_product_attention(q, k, torch.eye(7).expand(2, 3, 7, 7))  # values: which token it was
        received = run_visualization.received_attention(attention, x)
    torch.testing.assert_close(received, weights.mean(dim=(1, 2)))
    torch.testing.assert_close(received.sum(dim=1), torch.ones(2))


def test_the_program_writes_a_picture_and_a_movie_of_each_clip(run, pretrained, finetuned, tmp_path):
    """As a process; the line that cannot be read does not stop the others."""
    words = ["--resume", pretrained[0], finetuned[0], *"--samples 6 2 --output_dir".split(), tmp_path / "out"]
    result = run(*words, file="run_visualization.py")
    assert result.code == 1 and "text.mp4: " in result.out and "Traceback" not in result.err
    found = sorted(path.name for path in (tmp_path / "out").iterdir())
    stems = ("finetuned-checkpoint-best-0002", "stage1-checkpoint-0-0002")
    assert found == [stem + suffix for stem in stems for suffix in (".mp4", ".png")]
    for path in (tmp_path / "out").glob("*.mp4"):
        assert len(decode_all(path)) == 4


def test_what_cannot_be_drawn_is_named(pretrained, finetuned, tmp_path):
    path, _, args = pretrained
    probes = tmp_path / "probes.pth"
    torch.save({"model": {"encoder.norm.weight": torch.ones(3)}}, probes)
    bare = tmp_path / "bare.pth"
    torch.save({"model": finetuned[1].state_dict()}, bare)
    (tmp_path / "test.csv").write_text(Path(args.data_path).read_text())
    (tmp_path / "classes.txt").write_text("one\n")
    moved = tmp_path / "moved.pth"
    torch.save(torch.load(path, weights_only=False) | {"args": argparse.Namespace(data_path="/gone.csv")}, moved)
    out = ("--output_dir", tmp_path / "pictures")
    for words, message in (
        (("--resume", path, "--samples", 7), "--samples 7: .*train list.csv has 7 videos"),
        (("--resume", path, path), "the same name"),
        (("--resume", probes, "--data_path", tmp_path), "probes.pth is neither a pretraining nor a fine-tuned"),
        (("--resume", bare, "--data_path", tmp_path), "bare.pth does not say how it was fine-tuned"),
        (("--resume", finetuned[0], "--data_path", tmp_path), "classes.txt has 1 lines"),
        (("--resume", path, "--data_path", "nothing.csv"), "--data_path nothing.csv: no such file"),
        (("--resume", path, "--objects_path", "nothing"), "--objects_path nothing: no such folder"),
        (("--resume", moved), "--data_path /gone.csv .from .*moved.pth.: no such file"),
        ((), "give --data_path"),
        (("--resume", path, "--output_dir", bare), "File exists"),
    ):
        with pytest.raises(RunError, match=message):
            visualize(*out, *words)
    with pytest.raises(SystemExit):
        run_visualization.get_args(["--no_such_option"])
