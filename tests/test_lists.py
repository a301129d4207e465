"""Lists: their reading against a reader of a few lines, their messages, their labels, and memory."""

import glob
import os
import shlex
import tracemalloc

import numpy as np
import pytest
from fixtures_video import video_list, write_list

import lists
from datasets_finetune import find_multi_label
from lists import label_text, read_list, read_text
from metrics import class_label, label_classes, read_actions
from options_finetune import get_args as get_finetuning_args
from options_finetune import predict_videos
from run_smile_pretraining import get_args, read_videos

pytest_plugins = "fixtures_video"
TEXT = "a.mp4 0\n\n  b c.avi  1 \n\xe9t\xe9.mp4 2\n"
ENCODINGS = ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"]
MARKS = {"utf-16-le": b"\xff\xfe", "utf-16-be": b"\xfe\xff"}


# Reading --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_a_list_in_any_encoding_with_any_line_ends(tmp_path, encoding, end):
    path = tmp_path / "list.csv"
    path.write_bytes(MARKS.get(encoding, b"") + TEXT.replace("\n", end).encode(encoding))
    videos = video_list(path, 3)
    assert [videos.path(i) for i in range(3)] == ["a.mp4", "b c.avi", "\xe9t\xe9.mp4"]
    assert videos.labels.tolist() == [0, 1, 2] and videos.lines.tolist() == [1, 3, 4]
    assert read_text(path) == TEXT


@pytest.mark.parametrize("data", ["caf\xe9.mp4 0\n".encode("latin-1"), TEXT.encode("utf-16-le"), b"\x00\x01 0\n"])
def test_other_encodings_are_refused(tmp_path, data):
    (tmp_path / "list.csv").write_bytes(data)
    with pytest.raises(ValueError, match="list.csv: cannot be read as a list, a text file"):
        video_list(tmp_path / "list.csv")


@pytest.mark.parametrize("block", [1, 37, 1 << 18])
def test_blocks_make_no_difference(tmp_path, monkeypatch, block):
    """Against Python's own cutting of lines, of lists with spaces, tabs and blank lines anywhere."""
    monkeypatch.setattr(lists, "BLOCK", block)
    rng = np.random.default_rng(0)
    for _ in range(20):
        words = rng.choice(["a", "b c", "\xe9", " ", "  ", "\t", "\n", "\n\n", "\r\n", " 7\n", " 12 \n", "\t3\n"], 60)
        text = "".join(words) + rng.choice(["", "\n"])
        (tmp_path / "list.csv").write_bytes(text.encode())
        lines = [(n, line.strip(" \t")) for n, line in enumerate(text.replace("\r\n", "\n").split("\n"), 1)]
        wanted = [(n, *line.rsplit(None, 1)) for n, line in lines if line]
        if bad := [n for n, *parts in wanted if len(parts) < 2]:
            with pytest.raises(ValueError, match=f"list.csv, line {bad[0]}: .* is not `path label`"):
                read_list(str(tmp_path / "list.csv"), label_text)
        elif wanted:
            videos = read_list(str(tmp_path / "list.csv"), label_text)
            found = zip(videos.lines, map(os.fsdecode, videos.paths), map(os.fsdecode, videos.labels), strict=True)
            assert list(found) == [(n, name.rstrip(), label) for n, name, label in wanted]


def test_memory_is_that_of_the_paths(tmp_path):
    """At most 1.3 times their array, also while reading."""
    lines = "".join(f"kinetics/some class/{i:07d}_000010_000020.mp4 {i % 400}\n" for i in range(200_000))
    (tmp_path / "list.csv").write_text(lines)
    tracemalloc.start()
    videos = video_list(tmp_path / "list.csv", 400)
    now, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(videos) == 200_000 and videos.labels.tolist() == [i % 400 for i in range(200_000)]
    assert now < 1.2 * videos.paths.nbytes and peak - 2**23 < 1.2 * videos.paths.nbytes  # 8 MiB: blocks in hand


def test_data_root_is_put_before_relative_paths_only(tmp_path):
    path = write_list(tmp_path / "list.csv", ["/abs/x.mp4", "rel/y  z.mp4"], label=-1)
    videos = video_list(path, data_root="/videos dir")
    assert [videos.path(i) for i in range(2)] == ["/abs/x.mp4", "/videos dir/rel/y  z.mp4"]
    assert videos.labels.tolist() == [-1, -1]


@pytest.mark.parametrize("line", ["c.mp4", "c.mp4,1", "c.mp4 one", "c.mp4 1.5", "7", "c.mp4 --1", "c.mp4 -", "c \xb2"])
def test_a_line_without_a_label_is_named_by_its_number(tmp_path, line):
    (tmp_path / "list.csv").write_text(f"a.mp4 0\n\n{line}\nb.mp4 1\n")
    with pytest.raises(ValueError, match="list.csv, line 3: "):
        video_list(str(tmp_path / "list.csv"))


@pytest.mark.parametrize("label", [-1, 2, 99])
def test_a_label_out_of_range_is_named_by_its_number(tmp_path, label):
    (tmp_path / "list.csv").write_text(f"a.mp4 0\nb.mp4 1\nc.mp4 {label}\n")
    with pytest.raises(ValueError, match=rf"list.csv, line 3: label {label} .*\[0, 2\)"):
        video_list(str(tmp_path / "list.csv"), num_classes=2)
    assert len(video_list(str(tmp_path / "list.csv"), num_classes=100 if label > 0 else None)) == 3


@pytest.mark.parametrize("text", ["", "\n \n\n"])
def test_an_empty_or_missing_list(tmp_path, text):
    (tmp_path / "none.csv").write_text(text)
    with pytest.raises(ValueError, match="none.csv: the list is empty"):
        video_list(str(tmp_path / "none.csv"))
    for path in (tmp_path / "nowhere.csv", tmp_path):
        with pytest.raises(ValueError, match=f"{path}: no such list file"):
            video_list(str(path))


# Files ----------------------------------------------------------------------------------------------------------


def list_with_missing(clips, folder, total, missing):
    """`total` lines after a blank one; the videos at the places `missing` are not there."""
    lines = [f"gone {i}.mp4 1" if i in missing else f"{clips['small.mp4']} 0" for i in range(total)]
    (folder / "some.csv").write_text("\n" + "\n".join(lines))
    return video_list(str(folder / "some.csv"), data_root="/videos")


def test_missing_files_are_reported_by_list_line_path_and_remedy(clips, tmp_path):
    videos = list_with_missing(clips, tmp_path, 10, {3, 7})
    said = r"some.csv, line 5: no such file: /videos/gone 3.mp4 \(2 of 10 .* --max_bad_fraction 0.1.*; .* --data_root"
    with pytest.raises(ValueError, match=f"^{tmp_path}/{said}"):
        videos.check_files(0.1)
    videos.check_files(0.2)
    videos.subset(np.array([0, 1, 2])).check_files(0)
    with pytest.raises(ValueError, match="line 9: no such file: /videos/gone 7.mp4 .1 of 2"):
        videos.subset(np.array([4, 7])).check_files(0)


def test_a_long_list_is_looked_through_evenly(clips, tmp_path):
    list_with_missing(clips, tmp_path, 3000, set(range(1, 3000, 100))).check_files(0.05)
    for missing in (range(200), range(2800, 3000), range(1400, 1600)):  # 200 of 3000: one in 15
        with pytest.raises(ValueError, match="1[34] of 200 looked for are missing"):
            list_with_missing(clips, tmp_path, 3000, set(missing)).check_files(0.05)
    with pytest.raises(ValueError, match="line 2: .*200 of 200"):
        list_with_missing(clips, tmp_path, 3000, set(range(3000))).check_files(0.05)


@pytest.mark.parametrize("line", ["{clip}", "{clip} 20", "{root}/frames 5 25"])
def test_a_folder_of_frames_is_reported_with_the_command_that_makes_a_video(tmp_path, line):
    clip = tmp_path / "frames" / "a clip's"
    clip.mkdir(parents=True)
    for number in range(1, 21):
        (clip / f"img_{number:05d}.png").touch()
    (tmp_path / "list.csv").write_text(line.format(clip=clip, root=tmp_path) + " 0\n")
    with pytest.raises(ValueError, match=r"line 1: .* is a folder of frames, which are not read") as error:
        video_list(tmp_path / "list.csv").check_files(0)
    command = str(error.value).partition("list that: ")[2].partition(" (1 of 1")[0]
    words = shlex.split(command)
    assert sorted(glob.glob(words[words.index("-i") + 1])) == sorted(map(str, clip.iterdir()))
    assert words[0] == "ffmpeg" and words[-1] == f"{clip}.mp4"


@pytest.mark.parametrize("line", ["{video} 120 0", "{video} 0, 2", "{video} 5 90 1"])
def test_more_than_path_and_label(clips, tmp_path, line):
    (tmp_path / "list.csv").write_text(line.format(video=clips["with two spaces.mp4"]) + "\n")
    with pytest.raises(ValueError, match=r"line 1: .*spaces.mp4, so '[\d ,]+' should not be there"):
        video_list(tmp_path / "list.csv").check_files(0)


@pytest.mark.parametrize("line", ['"{video}" 0', '"{video}", 0', "{video}; 0"])
def test_quotes_and_commas_around_a_path(clips, tmp_path, line):
    (tmp_path / "list.csv").write_text(line.format(video=clips["bikes.mp4"]) + "\n")
    with pytest.raises(ValueError, match=r"there is .*bikes.mp4: a line is `path label`, without quotes and commas"):
        video_list(tmp_path / "list.csv").check_files(0)


# Labels ---------------------------------------------------------------------------------------------------------


def test_labels_that_are_not_needed_may_be_anything(tmp_path):
    (tmp_path / "list.csv").write_text("a b.mp4 92:0.10-0.60,147:0.00-0.90\nc.mp4 -\nd.mp4 playing_guitar\ne.mp4 3\n")
    videos = read_videos(get_args(["--data_path", str(tmp_path / "list.csv")]))  # of pretraining
    assert [videos.path(i) for i in range(4)] == ["a b.mp4", "c.mp4", "d.mp4", "e.mp4"]
    assert videos.labels.tolist() == [-1] * 4
    read_list(str(tmp_path / "list.csv"), label_text).write(str(tmp_path / "again.csv"))
    assert (tmp_path / "again.csv").read_text() == (tmp_path / "list.csv").read_text()


def test_a_list_to_predict_needs_no_labels(tmp_path, monkeypatch):
    """With spaces in paths, and labels or not, line by line."""
    monkeypatch.chdir(tmp_path)
    names = ["a.mp4", "my clip.MP4", "b.webm", "c d.avi"]
    for name in names:
        (tmp_path / name).touch()
    (tmp_path / "list.txt").write_text("a.mp4\nmy clip.MP4\nb.webm 3\nc d.avi -1\n")
    videos = predict_videos(get_finetuning_args(["--predict", "list.txt"]))
    assert [videos.path(i) for i in range(4)] == names


def test_the_forms_of_labels(tmp_path):
    whole = [-np.inf, np.inf]
    assert read_actions("0,2").tolist() == [[0, *whole], [2, *whole]] and read_actions("-").shape == (0, 3)
    assert read_actions("92:11.90-21,3").tolist() == [[92, 11.9, 21], [3, *whole]]
    assert label_classes("0,2:1-3") == {0, 2} and label_classes("guitar") == label_classes("-") == set()
    assert class_label("-1") == -1
    for text in ("1,", "1:2", "1:3-2", "1;2", "-1,2", "1:2-3x"):
        with pytest.raises(ValueError):
            read_actions(text)
    for number, text in enumerate(["a 1\n", "b 0\n\nc 1:0-1\n", "d 1,2\n"]):
        (tmp_path / f"{number}.csv").write_text(text)
    paths = [str(tmp_path / name) for name in ("none.csv", "0.csv", "1.csv", "2.csv")]
    assert find_multi_label(paths[:2]) == "" and find_multi_label(paths) == f"{tmp_path}/1.csv, line 3: 1:0-1"
