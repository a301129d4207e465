"""What pretraining's objects move over: videos, stills and nothing; the clips of the program against PyAV and PIL."""

import numpy as np
import pytest
from fixtures_video import decode_all, write_list
from PIL import Image
from scipy import stats

import run_smile_pretraining
import run_visualization
from datasets import find_images, sample_rng
from utils import RunError
from video_reader import VideoError
from video_transforms import IMAGE_SHARE, pan_window, read_picture

pytest_plugins = "fixtures_video"
FRAMES, SIDE = 8, 64
OPTIONS = f"--num_frames {FRAMES} --input_size {SIDE} --target_type pixel --sampling_rate 2 --num_workers 0 --seed 3"


def dataset_of(*words):
    """The training clips of a command line."""
    return run_smile_pretraining.build_dataset(run_smile_pretraining.get_args([*OPTIONS.split(), *map(str, words)]))


def objects_of(folder):
    return ["--add_tubelets", "--use_objects", "--objects_path", folder, "--mask_type", "tubelet"]


@pytest.fixture
def pictures(tmp_path):
    """A folder with three images, two of them in a folder of their own, one file that is none, and a text."""
    (tmp_path / "a" / "b").mkdir(parents=True)
    y, x = np.mgrid[0:150, 0:200]
    ramp = np.stack([x, y, np.full_like(x, 77)], axis=2).astype(np.uint8)
    Image.fromarray(ramp).save(tmp_path / "ramp.png")
    Image.fromarray(ramp[:90, :70]).save(tmp_path / "a" / "small.PNG")
    Image.fromarray(ramp).convert("L").save(tmp_path / "a" / "b" / "grey.jpg", quality=95)
    (tmp_path / "a" / "broken.png").write_bytes(b"no image")
    (tmp_path / "a" / "readme.txt").write_text("not an image")
    return tmp_path


# Blank ----------------------------------------------------------------------------------------------------------


def test_black_is_black_except_for_the_objects(objects_folder):
    words = ["--background", "black", "--epoch_size", 5]
    empty, moving = dataset_of(*words), dataset_of(*words, *objects_of(objects_folder))
    assert len(empty) == len(moving) == 5
    sample = empty[0, 1]
    assert sample["clips"].shape == (1, FRAMES, SIDE, SIDE, 3) and not sample["clips"].any()
    assert sample["path"] == "black" and sample["bad"] == [] and sample["num_bad_videos"] == 0
    for index in range(3):
        sample = run_visualization.draw_sample(moving, index)
        inside = np.zeros((FRAMES, SIDE, SIDE), bool)
        for boxes in sample.boxes:  # a turned object fills more than its box
            for frame, (x1, y1, x2, y2) in zip(inside, boxes):
                reach = int(np.hypot(x2 - x1, y2 - y1) / 2) + 2
                x, y = (x1 + x2) // 2, (y1 + y2) // 2
                frame[max(0, y - reach) : y + reach, max(0, x - reach) : x + reach] = True
        assert sample.clip.any() and not sample.clip[~inside].any()


def test_noise_is_uniform_and_stands_still():
    dataset = dataset_of("--background", "noise", "--epoch_size", 4, "--num_sample", 2)
    clips = [clip for key in ((0, 0), (0, 1), (1, 0)) for clip in dataset[key]["clips"]]
    for clip in clips:
        assert (clip == clip[0]).all()
        counts = np.bincount(clip[0].ravel(), minlength=256)
        assert stats.chisquare(counts).pvalue > 1e-4
        assert abs(np.corrcoef(clip[0, :, 1:, 0].ravel(), clip[0, :, :-1, 0].ravel())[0, 1]) < 0.1  # not smoothed
    assert all((one != other).any() for i, one in enumerate(clips) for other in clips[:i])  # views and epochs too
    np.testing.assert_array_equal(dataset[0, 1]["clips"], dataset[0, 1]["clips"])
    other = dataset_of("--background", "noise", "--epoch_size", 4, "--num_sample", 2, "--seed", 4)
    assert (other[0, 0]["clips"] != dataset[0, 0]["clips"]).any()


# Stills ---------------------------------------------------------------------------------------------------------


def test_one_frame_of_each_video_is_its_middle_one(clips, broken, tmp_path):
    names = ["bikes.mp4", "bunny.mp4", "short.mp4"]
    path = write_list(tmp_path / "list.csv", [clips[name] for name in names] + [broken["text"]])
    dataset = dataset_of("--background", "frame", "--data_path", path)
    for index, name in enumerate(names):
        middle = decode_all(clips[name])
        number = len(middle) // 2
        found = dataset.source.read(sample_rng(0, 0, index), str(clips[name]))
        assert (found.frames == found.frames[0]).all() and found.indices.tolist() == [number] * FRAMES
        assert np.abs(found.frames[0].astype(int) - middle[number]).mean() < 1.5
        sample = dataset[7, index]
        assert (sample["clips"] == sample["clips"][:, :1]).all() and sample["num_bad_videos"] == 0
    sample = dataset[0, 3]  # unreadable: another takes its place
    assert [path for path, _ in sample["bad"]][:1] == [str(broken["text"])] and sample["path"] != str(broken["text"])


def test_images_of_a_folder(pictures):
    dataset = dataset_of("--background", "image", "--data_path", pictures)
    assert len(dataset) == 4 and all(path.startswith(str(pictures)) for path in map(dataset.videos.path, range(4)))
    assert [dataset.videos.path(i) for i in range(4)] == [find_images(str(pictures)).path(i) for i in range(4)]
    index = [dataset.videos.path(i) for i in range(4)].index(str(pictures / "ramp.png"))
    side = round(IMAGE_SHARE * SIDE)
    found = dataset.source.read(sample_rng(0, 0, 0), dataset.videos.path(index))
    with Image.open(pictures / "ramp.png") as image:
        expected = np.asarray(image.resize((round(200 * side / 150), side), Image.Resampling.BILINEAR))
    assert found.frames.shape == (FRAMES, *expected.shape) and (found.frames == found.frames[0]).all()
    assert np.abs(found.frames[0].astype(int) - expected).max() <= 1
    for number in range(4):
        sample = dataset[0, number]
        assert sample["clips"].shape == (1, FRAMES, SIDE, SIDE, 3) and (sample["clips"] == sample["clips"][:, :1]).all()
        assert (sample["num_bad_videos"] > 0) == ("broken" in dataset.videos.path(number))  # it may be drawn again
        assert all("broken.png" in path and "\n" not in why and path not in why for path, why in sample["bad"])


def test_a_photo_is_seen_upright(tmp_path):
    """An orientation of 6 in EXIF: the camera was turned, so the picture is to be turned right."""
    pixels, turned = np.zeros((40, 80, 3), np.uint8), Image.Exif()
    pixels[:, :40] = 255
    turned[0x0112] = 6
    Image.fromarray(pixels).save(tmp_path / "photo.png", exif=turned)
    assert np.array_equal(read_picture(str(tmp_path / "photo.png"), 80), np.rot90(pixels, -1))


@pytest.mark.filterwarnings("ignore:.*:UserWarning:PIL")
def test_damaged_exif_data_spoil_no_photo(tmp_path):
    """Pillow fails on them in several ways, also when it only turns the image."""
    rng, exif = np.random.default_rng(0), Image.Exif()
    exif[0x0112], exif[0x010E], exif[0x8769] = 6, "a photo", {0x9003: "2020:01:01 00:00:00"}
    Image.fromarray(np.zeros((40, 80, 3), np.uint8)).save(tmp_path / "photo.jpg", exif=exif)
    data = (tmp_path / "photo.jpg").read_bytes()
    start, length = data.index(b"Exif"), len(exif.tobytes())
    for _ in range(300):
        damaged = bytearray(data)
        for place in rng.integers(start + 6, start + length, 3):
            damaged[place] = rng.integers(256)
        (tmp_path / "damaged.jpg").write_bytes(damaged)
        assert sorted(read_picture(str(tmp_path / "damaged.jpg"), 80).shape) == [3, 40, 80]


def test_small_images_stay_as_they_are(pictures):
    path = str(pictures / "a" / "small.PNG")
    np.testing.assert_array_equal(read_picture(path, 70), np.asarray(Image.open(path)))
    assert read_picture(str(pictures / "a" / "b" / "grey.jpg"), 100).shape == (100, 133, 3)
    with pytest.raises(VideoError, match="cannot identify"):
        read_picture(str(pictures / "a" / "broken.png"), 70)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.4])
def test_a_picture_glides_evenly_by_its_share(share):
    """Red is the column and green the row of a picture, so that every pixel tells where it is from."""
    y, x = np.mgrid[0:150, 0:200]
    picture = np.stack([x, y, 0 * x], axis=2).astype(np.uint8)
    angles = []
    for seed in range(40):
        frames = pan_window(np.random.default_rng(seed), picture, 12, share).astype(int)
        corners = frames[:, 0, 0, :2]
        size = np.array(frames.shape[2:0:-1])
        np.testing.assert_array_equal(frames[:, -1, -1, :2], corners + size - 1)  # whole pixels, inside
        moved = corners[-1] - corners[0]
        assert abs(np.hypot(*moved) - share * 150) <= 1.5
        even = corners[0] + np.linspace(0, 1, 12)[:, None] * moved
        assert np.abs(corners - even).max() <= 1
        assert (size >= np.array([200, 150]) - np.abs(moved) - 1).all()  # as large as there is room for
        angles.append(np.arctan2(*moved))
    if share:
        assert stats.kstest((np.array(angles) / np.pi + 1) / 2, "uniform").pvalue > 1e-4


def test_pan_moves_the_clips(pictures):
    """Those without it stand still: test_images_of_a_folder."""
    dataset = dataset_of("--background", "image", "--data_path", pictures, "--pan", 0.2)
    index = [dataset.videos.path(i) for i in range(4)].index(str(pictures / "ramp.png"))
    clip = dataset[0, index]["clips"][0]
    assert (clip[1:] != clip[:-1]).any()


# Input and pictures ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words, message",
    [
        ("--background black", "--background black needs --epoch_size"),
        ("--background noise --epoch_size -3", "--background noise needs --epoch_size"),
        ("--background image", "--data_path : not a folder with images"),
        ("--background image --data_path {t}/nowhere", "--data_path {t}/nowhere: not a folder with images"),
        ("--background image --data_path {t}", "--data_path {t}: not a folder with images"),
        ("--background frame", "--background frame needs --data_path"),
        ("", "--background video needs --data_path, a list of videos"),
        ("--background noise --epoch_size 4 --pan 0.1", "--pan moves an image or frame, not --background noise"),
        ("--background black --epoch_size 4 --pan 0.9", "--pan 0.9: must lie between"),
        ("--background black --epoch_size 4 --speed -1", "--speed -1.0: must not be negative"),
        (
            "--data_path {t}/list.csv --epoch_size 9",
            "--epoch_size: an epoch of --background video is all of --data_path",
        ),
    ],
)
def test_wrong_options_are_reported(words, message, clips, tmp_path):
    write_list(tmp_path / "list.csv", clips.values())
    words = [*OPTIONS.split(), *words.format(t=tmp_path).split()]
    problems = run_smile_pretraining.find_problems(run_smile_pretraining.get_args(words)).found
    assert problems and message.format(t=tmp_path) in problems[0] and not any("\n" in line for line in problems)


@pytest.mark.parametrize("kind", ["black", "noise", "image", "frame"])
def test_pictures_are_drawn_of_every_background(kind, pictures, objects_folder, clips, tmp_path):
    source = {"image": pictures, "frame": write_list(tmp_path / "list.csv", clips.values())}
    where = ["--data_path", source[kind]] if kind in source else ["--epoch_size", "3"]
    index = 3 if kind == "image" else 1  # the second image is broken
    words = ["--background", kind, *where, *objects_of(objects_folder), "--samples", index]
    folder = tmp_path / "drawn"
    args = [*OPTIONS.split(), "--num_frames", 2, "--device", "cpu", *words, "--output_dir", folder]
    assert run_visualization.main(run_visualization.get_args([str(word) for word in args])) == 0
    assert {path.name for path in folder.iterdir()} == {f"data-{index:04}.png", f"data-{index:04}.mp4"}
    with pytest.raises(RunError, match="needs --(epoch_size|data_path)|give --data_path"):
        run_visualization.main(run_visualization.get_args([*OPTIONS.split(), "--background", kind, "--device", "cpu"]))
