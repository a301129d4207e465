"""pack_videos.py and make_lists.py shards: tar files hold the videos byte for byte; killed anywhere, it goes on."""

import io
import json
import os
import tarfile
from pathlib import Path

import check_videos
import make_lists
import pack_videos
import pytest
import resize_videos
from data_tools import read_list
from fixtures_data_tools import kill_at
from fixtures_video import source_frames, write_list, write_mp4

import shards
from utils import RunError
from video_reader import read_frames

pytest_plugins = "fixtures_data_tools"


@pytest.fixture
def data(clips, tmp_path):
    """Two lists, relative to tmp_path/data, with a video in both, one that is missing, and names of many kinds."""
    places = ["train/a b/x.1.mp4", "train/a b/x_1.mp4", "train/c/x.mp4", "train/c/x.avi", "val/c/x.mp4"]
    for place, clip in zip(places, ("small", "short", "bunny", "bikes", "upright")):
        (tmp_path / "data" / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / place).write_bytes(clips[f"{clip}.mp4"].read_bytes())
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "classes.txt").write_text("one\n")
    train = [*places[:4], "no.mp4"]
    (tmp_path / "in" / "train.csv").write_text("".join(f"{place} {n}\n" for n, place in enumerate(train)))
    (tmp_path / "in" / "val.csv").write_text("".join(f"{place} 0:1.5-2\n" for place in (places[4], places[2])))
    return [str(tmp_path / "in" / name) for name in ("train.csv", "val.csv")]


def pack(lists, output, *options):
    """Pack them: sources by member names, in the order of the lists; and the shards."""
    pack_videos.main([*lists, "--output", str(output), "--workers", "2", *map(str, options)])
    return sorted(path.name for path in output.glob("*.tar"))


def bytes_of(path):
    with shards.open_file(path) as file:
        return file.read()


def test_shards_hold_the_videos_and_lists_name_them(data, tmp_path, capsys):
    root, out = tmp_path / "data", tmp_path / "out"
    made = pack(data, out, "--data_root", root, "--shard_size", "40KB")
    for path in data:
        expected = [line for line in read_list(path) if line.name != "no.mp4"]
        packed = read_list(str(out / Path(path).name))
        assert [line.label for line in packed] == [line.label for line in expected]
        for (name, _), (source, _) in zip(packed, expected):
            assert bytes_of(name) == (root / source).read_bytes()
    names = [line.name.partition(".tar/")[2] for line in read_list(str(out / "train.csv"))]
    assert names == ["train/a_b/x_1.mp4", "train/a_b/x_1_1.mp4", "train/c/x.mp4", "train/c/x_1.avi"]  # no stem twice
    assert made[0] == "train-000000.tar" and made[-1] == "val-000000.tar" and len(made) > 2
    for shard in made:  # as WebDataset and everybody reads it
        with tarfile.open(out / shard) as tar:
            names = tar.getnames()
            sizes = [member.size for member in tar if not member.name.endswith(".cls")]
            assert names[1::2] == [os.path.splitext(name)[0] + ".cls" for name in names[::2]]
            labels = [tar.extractfile(name).read().decode() for name in names[1::2]]
        assert len(sizes) == 1 or (out / shard).stat().st_size <= 40_000 + tarfile.RECORDSIZE
        assert set(labels) <= ({"0:1.5-2"} if shard.startswith("val") else set("0123"))
    assert (out / "failed.tsv").read_text() == f"path\treason\n{root}/no.mp4\tNo such file or directory\n"
    assert (out / "classes.txt").read_text() == "one\n" and "4 of 5 videos" in capsys.readouterr().out
    assert sorted(path.name for path in out.iterdir() if path.name[0] == ".") == [".lock"]


def test_what_is_new_or_failed_comes_into_new_shards(data, clips, tmp_path):
    options = "--data_root", tmp_path / "data", "--relative"
    before = pack(data, tmp_path / "out", *options)
    times = {shard: (tmp_path / "out" / shard).stat().st_mtime_ns for shard in before}
    (tmp_path / "data" / "no.mp4").write_bytes(clips["short.mp4"].read_bytes())
    (tmp_path / "data" / "train/c/x.mp4").unlink()  # an original may be gone by then
    after = pack(data, tmp_path / "out", *options)
    assert after == sorted([*before, "train-000001.tar"]) and not (tmp_path / "out" / "failed.tsv").exists()
    assert {shard: (tmp_path / "out" / shard).stat().st_mtime_ns for shard in before} == times
    assert read_list(str(tmp_path / "out" / "train.csv"))[-1] == ("train-000001.tar/no.mp4", "4")
    with pytest.raises(RunError, match="was made with --data_root"):
        pack(data, tmp_path / "out")


def test_a_video_that_goes_while_others_are_packed_is_left_out(data, tmp_path, monkeypatch):
    work = pack_videos.write_shard

    def late(file, members):
        (tmp_path / "data" / "train/c/x.avi").unlink(missing_ok=True)
        return work(file, members)

    monkeypatch.setattr(pack_videos, "write_shard", late)
    pack(data[:1], tmp_path / "out", "--data_root", tmp_path / "data")
    assert len(read_list(str(tmp_path / "out" / "train.csv"))) == 3
    assert "x.avi\tNo such file" in (tmp_path / "out" / "failed.tsv").read_text()


def test_a_shard_that_is_read_as_something_else_gets_no_name(data, tmp_path, monkeypatch):
    work = pack_videos.scan

    def damaged(shard):
        with open(shard, "r+b") as file:
            file.seek(9000)
            file.write(b"damage")
        return work(shard)

    monkeypatch.setattr(pack_videos, "scan", damaged)
    with pytest.raises(RunError, match="all of its videos failed"):
        pack(data, tmp_path / "out", "--data_root", tmp_path / "data")
    assert "other bytes than were written" in (tmp_path / "out" / "failed.tsv").read_text()
    assert not list((tmp_path / "out").glob("*.tar"))


def test_every_tool_takes_lists_of_members(data, tmp_path, monkeypatch):
    """check, resize, and pack once more: what they make of members is what they make of files."""
    out = tmp_path / "out"
    pack(data, out, "--data_root", tmp_path / "data")
    listed = str(out / "val.csv")
    check_videos.main([listed, "--output", str(tmp_path / "good.csv")])
    assert (tmp_path / "good.csv").read_text() == Path(listed).read_text()
    looked = []
    monkeypatch.setattr(check_videos, "look", lambda *args, **more: looked.append(args))
    check_videos.main([listed, "--output", str(tmp_path / "good.csv")])
    assert not looked  # the state of a member is known again
    for _ in range(2):
        resize_videos.main([listed, "--output", str(tmp_path / "small"), "--short_side", "32"])
        videos = [line.name for line in read_list(str(tmp_path / "small" / "val.csv"))]
        assert [read_frames(video, lambda n: [0]).shape[1:] for video in videos] == [(42, 32, 3), (32, 40, 3)]
    pack([listed], tmp_path / "more")
    for (name, label), (source, expected) in zip(read_list(str(tmp_path / "more" / "val.csv")), read_list(listed)):
        assert bytes_of(name) == bytes_of(source) and label == expected


@pytest.mark.parametrize("size", ["0GB", "1 TB", "big"])
def test_sizes_are_refused(size, tmp_path, capsys):
    with pytest.raises(SystemExit):
        pack_videos.get_args(["l.csv", "--output", "o", "--shard_size", size])
    assert "is not a size such as 500MB or 1GB" in capsys.readouterr().err
    assert pack_videos.get_args(["l.csv", "--output", "o", "--shard_size", "1.5MB"]).shard_size == 1_500_000


@pytest.mark.parametrize("name, calls", [("write_shard", 2), ("put_in_place", 3), ("scan", 1)])
def test_killed_anywhere_it_goes_on(tmp_path, name, calls):
    """The shards are then, byte for byte, what an undisturbed run writes."""
    frames = source_frames("bikes", 0, 27, (96, 64))
    for number in range(9):
        write_mp4(tmp_path / f"{number}.mp4", frames[: 9 + number])
    listed = write_list(tmp_path / "l.csv", [tmp_path / f"{number}.mp4" for number in range(9)])
    argv = [listed, "--shard_size", "30KB", "--workers", "2", "--output"]
    pack_videos.main([*argv, str(tmp_path / "one")])
    for _ in range(3):
        kill_at(pack_videos.main, [*argv, str(tmp_path / "two")], pack_videos, name, calls=calls, done=True)
        for shard in (tmp_path / "two").glob("*.tar"):
            assert shard.read_bytes() == (tmp_path / "one" / shard.name).read_bytes()
    pack_videos.main([*argv, str(tmp_path / "two")])
    one, two = ({path.name: path.read_bytes() for path in (tmp_path / name).glob("*.*")} for name in ("one", "two"))
    assert one.keys() == two.keys() and len(one) > 5
    assert {key: data.replace(b"/two/", b"/one/") for key, data in two.items()} == one


def write_tar(path, files):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def video2dataset(numbers, clip, **fields):
    """Members as video2dataset writes them; of every third sample the download failed."""
    for number in numbers:
        values = {"key": f"{number:05d}", "caption": "a ride", **{key: of(number) for key, of in fields.items()}}
        if number % 3 < 2:
            yield f"{number:05d}.mp4", clip
            yield f"{number:05d}.txt", b"a ride"
        yield f"{number:05d}.json", json.dumps(values).encode()


def lists_of(tmp_path, *options):
    make_lists.main(["shards", "--videos", str(tmp_path / "in"), "--output", str(tmp_path / "lists"), *options])
    return {path.stem: [tuple(line) for line in read_list(str(path))] for path in (tmp_path / "lists").glob("*.csv")}


@pytest.mark.parametrize("field, labels", [("", ["-1"] * 4), ("number", list("0134")), ("kind", list("0101"))])
def test_shards_of_video2dataset_get_lists(clips, tmp_path, field, labels):
    clip, kinds = clips["short.mp4"].read_bytes(), ("car", "dog ride", "-")
    fields = {"number": lambda number: number, "kind": lambda number: kinds[number % 3]}
    write_tar(tmp_path / "in" / "00000.tar", video2dataset(range(3), clip, **fields))
    write_tar(tmp_path / "in" / "deep" / "00001.tar", video2dataset(range(3, 6), clip, **fields))
    lists = lists_of(tmp_path, *(["--label_field", field] if field else []))
    names = ["00000.tar/00000.mp4", "00000.tar/00001.mp4", "deep/00001.tar/00003.mp4", "deep/00001.tar/00004.mp4"]
    assert lists == {"train": [(f"{tmp_path}/in/{name}", label) for name, label in zip(names, labels)]}
    assert bytes_of(lists["train"][3][0]) == clip
    problems = (tmp_path / "lists" / "problems.tsv").read_text()
    assert problems.count("samples without a video") == 2
    assert (tmp_path / "lists" / "classes.txt").exists() == (field == "kind")
    if field == "kind":
        assert (tmp_path / "lists" / "classes.txt").read_text() == "car\ndog ride\n"


def test_our_own_shards_get_their_lists_again(data, tmp_path):
    pack(data, tmp_path / "in", "--data_root", tmp_path / "data", "--shard_size", "40KB")
    written = (tmp_path / "in" / Path(path).name for path in data)
    packed = {path.stem: [tuple(line) for line in read_list(str(path))] for path in written}
    packed["val"] = packed["val"][:1]  # the other one lies in a shard of train.csv
    assert lists_of(tmp_path) == {**packed, "test": packed["val"]}


def test_a_shard_that_has_grown_is_indexed_anew(clips, tmp_path):
    clip = clips["short.mp4"].read_bytes()
    for count in (2, 3):
        write_tar(tmp_path / "in" / "a.tar", [(f"{number}.mp4", clip) for number in range(count)])
        assert lists_of(tmp_path, "--relative") == {"train": [(f"a.tar/{n}.mp4", "-1") for n in range(count)]}
    index = tmp_path / "in" / "a.idx"
    index.chmod(0o444)
    before = index.stat()
    lists_of(tmp_path)
    assert index.stat().st_ino == before.st_ino  # not written again


def test_names_with_dots_are_videos_of_their_own(clips, tmp_path):
    """WebDataset takes them for parts of one sample, so a label belongs to the video of its name, or to all of them."""
    clip, numbers = clips["short.mp4"].read_bytes(), range(3)
    own = [
        (f"scene.{n:03}.{end}", clip if end == "mp4" else f"{n}".encode()) for n in numbers for end in ("mp4", "cls")
    ]
    common = [("day.left.mp4", clip), ("day.right.mp4", clip), ("day.cls", b"7")]
    one = [
        ("night.x264.mp4", clip),
        ("night.label.cls", b"8"),
        ("some.1.mp4", clip),
        ("some.2.mp4", clip),
        ("some.1.cls", b"9"),
    ]
    write_tar(tmp_path / "in" / "a.tar", [*own, *common, *one])
    labels = {f"scene.{n:03}": str(n) for n in numbers} | {"day.left": "7", "day.right": "7", "night.x264": "8"}
    labels |= {"some.1": "9", "some.2": "-1"}
    assert lists_of(tmp_path, "--relative") == {
        "train": [(f"a.tar/{name}.mp4", label) for name, label in labels.items()]
    }


def test_shards_that_are_wrong_are_named_and_the_others_listed(clips, tmp_path):
    clip = clips["short.mp4"].read_bytes()
    for name in ("good", "cut", "cut-later"):
        write_tar(tmp_path / "in" / f"{name}.tar", [("a.mp4", clip), ("a.cls", b"4"), ("b.MP4", clip)])
    damaged = [("c.mp4", clip), ("c.json", b"{")]
    write_tar(tmp_path / "in" / "odd.tar", [("a.mp4", clip), ("a.mp4", clip), ("b.mp4", clip), *damaged])
    (tmp_path / "in" / "text.tar").write_text("no tar file")
    os.truncate(tmp_path / "in" / "cut.tar", 700)
    make_lists.main(["shards", "--videos", str(tmp_path / "in"), "--output", str(tmp_path / "lists")])
    os.truncate(tmp_path / "in" / "cut-later.tar", 700)
    lists = lists_of(tmp_path, "--relative")
    names = [("good.tar/a.mp4", "4"), ("good.tar/b.MP4", "-1"), ("odd.tar/b.mp4", "-1"), ("odd.tar/c.mp4", "-1")]
    assert lists == {"train": names}
    problems = [line.split("\t") for line in (tmp_path / "lists" / "problems.tsv").read_text().splitlines()[1:]]
    assert [row[2] for row in problems] == ["cut-later.tar", "cut.tar", "odd.tar/a.mp4", "text.tar"]
    assert {row[1] for row in problems} == {"shards that cannot be read", "several members of one name"}
    assert "is cut off" in problems[0][3] and not (tmp_path / "in" / "cut.idx").exists()
    write_tar(tmp_path / "damaged" / "in" / "a.tar", damaged)
    with pytest.raises(RunError, match="not one video .* the first: a.tar/c.mp4: labels that cannot be read"):
        lists_of(tmp_path / "damaged", "--label_field", "kind")


def test_names_that_begin_with_a_slash_and_a_shard_that_was_replaced(clips, tmp_path):
    clip = clips["short.mp4"].read_bytes()
    write_tar(tmp_path / "in" / "a.tar", [("/abs/a.mp4", clip)])
    write_tar(tmp_path / "in" / "b.tar", [("b.mp4", clip)])
    assert lists_of(tmp_path, "--relative") == {"train": [("a.tar//abs/a.mp4", "-1"), ("b.tar/b.mp4", "-1")]}
    assert len(read_frames(f"{tmp_path}/in/a.tar//abs/a.mp4", lambda total: [0])) == 1
    write_tar(tmp_path / "in" / "b.tar", [("c.mp4", clip), ("b.mp4", clip)])
    assert lists_of(tmp_path, "--relative") == {"train": [("a.tar//abs/a.mp4", "-1")]}
    assert "b.idx is not the index of" in (tmp_path / "lists" / "problems.tsv").read_text()


def test_labels_of_two_kinds_are_refused(clips, tmp_path):
    clip = clips["short.mp4"].read_bytes()
    write_tar(tmp_path / "in" / "a.tar", [("a.mp4", clip), ("a.cls", b"4"), ("b.mp4", clip), ("b.cls", b"dog")])
    with pytest.raises(RunError, match="labels are names, such as 'dog', and numbers, such as 4"):
        lists_of(tmp_path)
