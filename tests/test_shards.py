"""Members of tar files are read as the files they were made of; what is wrong with a shard is one line."""

import os
import subprocess
import tarfile

import index_shards
import numpy as np
import pytest
from fixtures_data_tools import SIZE
from fixtures_video import source_frames, video_list, write_mp4

import shards
from object_overlay import IMAGE_ERRORS, ObjectLibrary, find_objects, read_object
from utils import RunError
from video_check import slow_reasons, wrong_frames
from video_reader import VideoError, read_clip

pytest_plugins = "fixtures_data_tools"
# By suffix: codec; those of some formats are told by the file's name alone.
KINDS = dict.fromkeys(("mp4", "mkv", "flv"), "libx264") | dict.fromkeys(("ts", "m2v"), "mpeg2video")
KINDS |= {"avi": "mpeg4", "mpg": "mpeg1video", "webm": "libvpx-vp9"}


def make_shard(path, files, index=True):
    """A tar file of these files, by their names in it."""
    with tarfile.open(path, "w") as tar:
        for name, file in files.items():
            tar.add(file, name)
    if index:
        index_shards.main([str(path)])
    return str(path)


@pytest.fixture(scope="module")
def kinds(tmp_path_factory):
    """A video of each kind, a folder with all of them, and a shard of them."""
    folder, frames = tmp_path_factory.mktemp("kinds"), source_frames("bikes", 40, 30, SIZE)
    for suffix, codec in KINDS.items():
        write_mp4(folder / f"x.{suffix}", frames, codec)
    names = {f"./some folder/{suffix}.{suffix}": folder / f"x.{suffix}" for suffix in KINDS}
    return folder, make_shard(folder / "videos.tar", names)


@pytest.mark.parametrize("reader", ["pyav", "decord"])
@pytest.mark.parametrize("suffix", KINDS)
def test_a_member_is_read_as_the_file_is(kinds, suffix, reader):
    folder, shard = kinds
    member, choose = f"{shard}/some folder/{suffix}.{suffix}", lambda total: np.arange(total)[[3, 9, 2, -1]]
    results = []
    for path in (str(folder / f"x.{suffix}"), member):
        try:
            results.append(read_clip(path, choose, reader))
        except VideoError as error:
            results.append(str(error))
    one, other = results
    if isinstance(one, str) or isinstance(other, str):
        assert reader == "decord" and type(one) is type(other)  # it reads some of these kinds in no way
        return
    assert np.array_equal(one.frames, other.frames) and np.array_equal(one.seconds, other.seconds)
    if reader == "pyav":
        assert wrong_frames(member, np.random.default_rng(0)) == ""
        assert slow_reasons(member) == slow_reasons(str(folder / f"x.{suffix}"))


def test_an_index_has_the_form_of_wds2idx(tmp_path):
    """Checked against the places that GNU tar tells: block 0 is the first header."""
    for name in ("a.mp4", "a.cls", "b.c.mp4"):
        (tmp_path / name).write_bytes(name.encode() * 300)
    subprocess.run(["tar", "-cf", "s.tar", "--", "a.mp4", "a.cls", "b.c.mp4"], cwd=tmp_path, check=True)
    index_shards.main([str(tmp_path / "s.tar")])
    told = subprocess.run(["tar", "-tRf", "s.tar"], cwd=tmp_path, check=True, capture_output=True, text=True).stdout
    blocks = [int(line.split()[1].rstrip(":")) for line in told.splitlines() if "block" in line and "NUL" not in line]
    a, cls, b = (512 * (block + 1) for block in blocks)
    expected = f"v1.2 2\nmp4 {a} 1500 a.mp4 cls {cls} 1500 a.cls\nc.mp4 {b} 2100 b.c.mp4\n"
    assert (tmp_path / "s.idx").read_text() == expected
    with shards.open_file(str(tmp_path / "s.tar" / "b.c.mp4")) as file:
        assert file.read() == b"b.c.mp4" * 300 and file.seek(7) == 7 and file.read(7) == b"b.c.mp4"


def test_names_of_any_kind(tmp_path):
    """Long ones and those that are not ASCII have headers of their own in a tar file; spaces stand in the index too."""
    names = ["ab/x.mp4", "b/x.mp4", "x.mp4", "b/x.mp4x", "with two  spaces/x 1 2.mp4", "Mr. Bean.mp4", "Mr. Smith.mp4"]
    names += ["v1.2 x.mp4", "v1.5 x.mp4", "é" * 60 + "/ü.mp4", "d" * 300]
    for number, name in enumerate(names):
        (tmp_path / str(number)).write_bytes(name.encode() + b" %d" % number)
    for form in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        shard = tmp_path / f"{form}.tar"
        held = names[:9] if form == tarfile.USTAR_FORMAT else names
        with tarfile.open(shard, "w", format=form) as tar:
            for number, name in enumerate(held):
                tar.add(tmp_path / str(number), f"./{name}")
        index_shards.main([str(shard)])
        assert [member.name for member in shards.members_of(str(shard))] == held
        for number, name in enumerate(held):
            with shards.open_file(f"{shard}/{name}") as file:
                assert file.read() == name.encode() + b" %d" % number
        assert shards.names_below(f"{shard}/b") == ["x.mp4", "x.mp4x"]


def test_a_name_that_looks_like_an_index_is_refused(tmp_path):
    (tmp_path / "a take 1 2 x.mp4").write_bytes(b"x")
    subprocess.run(["tar", "-cf", "s.tar", "a take 1 2 x.mp4"], cwd=tmp_path, check=True)
    with pytest.raises(RunError, match="s.tar: no index can hold the name 'a take 1 2 x.mp4'"):
        index_shards.main([str(tmp_path / "s.tar")])
    assert not (tmp_path / "s.idx").exists()


def test_a_folder_whose_name_ends_in_tar_is_a_folder(tmp_path, clips):
    (tmp_path / "x.tar").mkdir()
    path = tmp_path / "x.tar" / "a.mp4"
    path.write_bytes(clips["short.mp4"].read_bytes())
    assert shards.split(str(path)) is None and shards.problem_of(str(path)) == ""
    assert len(read_clip(str(path), lambda total: np.arange(total)).frames) == 5


def wrong_shard(folder, what, clips, broken):
    """The path of a member that cannot be read, of a shard with two sound ones."""
    names = {"a.mp4": clips["short.mp4"], "b.mp4": clips["small.mp4"], "c.mp4": broken["text"]}
    shard = make_shard(folder / "s.tar", names, index=what != "no index")
    if what == "cut off":
        os.truncate(shard, os.path.getsize(shard) // 2)
        return f"{shard}/c.mp4"
    if what == "another index":
        make_shard(folder / "t.tar", {"b.mp4": clips["short.mp4"]})
        os.replace(folder / "t.idx", folder / "s.idx")
    elif what == "twice":
        with tarfile.open(shard, "a") as tar:
            tar.add(clips["bikes.mp4"], "b.mp4")
        index_shards.main([shard])
    elif what == "old index":
        (folder / "s.idx").write_text("v1.0 1\nmp4 512 10\n")
    elif what == "no shard":
        os.remove(shard)
    return f"{shard}/{'c.mp4' if what == 'no video' else 'none.mp4' if what == 'no member' else 'b.mp4'}"


@pytest.mark.parametrize(
    "what, reason",
    [
        ("no index", "s.tar has no index beside it (No such file or directory); write it with: python scripts/data/"),
        ("old index", "s.idx: not an index of version v1.2; write it with"),
        ("another index", "s.idx is not the index of"),
        ("cut off", "s.tar is cut off: "),
        ("twice", "s.tar has 2 members of the name b.mp4"),
        ("no member", "s.tar has no member none.mp4"),
        ("no shard", "s.tar: No such file or directory"),
        ("no video", "Invalid data found"),
    ],
)
@pytest.mark.parametrize("reader", ["pyav", "decord"])
def test_what_is_wrong_is_one_line(tmp_path, clips, broken, what, reason, reader):
    member = wrong_shard(tmp_path, what, clips, broken)
    with pytest.raises(VideoError) as caught:
        read_clip(member, lambda total: np.arange(total), reader)
    assert str(caught.value).count("\n") == 0
    assert reason in str(caught.value) or (what == "no video" and reader == "decord")
    if what in ("cut off", "twice"):
        assert len(read_clip(f"{member[:-5]}a.mp4", lambda total: np.arange(total)).frames) == 5  # the others are there
    (tmp_path / "l.csv").write_text(f"{member} 0\n")
    if what not in ("cut off", "another index", "no video"):  # they show where the member is opened
        with pytest.raises(ValueError, match=r"l.csv, line 1: .*s\.(tar|idx)"):
            video_list(str(tmp_path / "l.csv")).check_files(0)


@pytest.mark.parametrize("cut", [600, 512 * 3, 0])
def test_a_shard_that_is_cut_off_is_not_indexed(tmp_path, cut):
    """In the middle of a member, after one, and before the first."""
    for name in "ab":
        (tmp_path / name).write_bytes(bytes(700))
    shard = make_shard(tmp_path / "s.tar", {"a.mp4": tmp_path / "a", "b.mp4": tmp_path / "b"}, index=False)
    os.truncate(shard, cut)
    with pytest.raises(RunError, match=r"s\.tar: (the tar file is cut off|cannot be read as a tar file)"):
        index_shards.main([shard])
    assert not (tmp_path / "s.idx").exists()


def test_hidden_files_are_left_out(tmp_path):
    """macOS puts a file ._x.mp4 beside x.mp4; it has no key."""
    (tmp_path / "x.mp4").write_bytes(bytes(700))
    names = ["x.mp4", "._x.mp4", "a/x.mp4", "a/._x.mp4"]
    shard = make_shard(tmp_path / "s.tar", {name: tmp_path / "x.mp4" for name in names})
    assert [member.name for member in shards.members_of(shard)] == ["x.mp4", "a/x.mp4"]


@pytest.mark.parametrize(
    "options, said",
    [
        ("--sparse", "x.mp4 is a link or a sparse file; pack the shard without"),
        ("", "y.mp4 is a link or a sparse file; pack the shard without .* with --dereference"),
        ("--hard-dereference", "z.mp4 is a link or a sparse file"),
        ("--gzip", "cannot be read as a tar file .compressed; unpack it first"),
        ("--hard-dereference --dereference", ""),
    ],
)
def test_what_cannot_be_read_in_place_is_not_indexed(tmp_path, options, said):
    """A sparse file, a hard link, a symbolic link, a compressed shard."""
    (tmp_path / "x.mp4").write_bytes(bytes(700))
    os.truncate(tmp_path / "x.mp4", 1 << 20)
    os.link(tmp_path / "x.mp4", tmp_path / "y.mp4")
    (tmp_path / "z.mp4").symlink_to("x.mp4")
    shard = str(tmp_path / "t.tar")
    subprocess.run(["tar", *options.split(), "-cf", shard, "-C", tmp_path, "x.mp4", "y.mp4", "z.mp4"], check=True)
    if said:
        with pytest.raises(RunError, match=rf"^{shard}: {said}"):
            index_shards.main([shard])
    else:
        index_shards.main([shard])
        assert [member.size for member in shards.members_of(shard)] == [1 << 20] * 3


def test_memory_and_open_files_are_bounded(tmp_path, clips):
    """Of more shards than indices are kept."""
    shards.read_index.cache_clear()
    (tmp_path / "a.mp4").write_bytes(clips["short.mp4"].read_bytes())
    paths = [make_shard(tmp_path / f"{number}.tar", {"a.mp4": tmp_path / "a.mp4"}) for number in range(70)]
    before = len(os.listdir("/proc/self/fd"))
    for path in paths:
        with shards.open_file(f"{path}/a.mp4") as file:
            assert file.read() == (tmp_path / "a.mp4").read_bytes()
    assert len(os.listdir("/proc/self/fd")) <= before + 1
    assert shards.read_index.cache_info().currsize == shards.KEPT_INDICES < 70


@pytest.mark.parametrize("inside", ["", "images/"])
def test_objects_in_a_tar_file(tmp_path, objects_folder, inside):
    names = find_objects(str(objects_folder))
    renamed = f"--transform=s,^./,./{inside},"
    subprocess.run(["tar", "-cf", tmp_path / "o.tar", "-C", objects_folder, renamed, "."], check=True)
    root = str(tmp_path / "o.tar" / inside).rstrip("/")
    with pytest.raises(ValueError, match="objects_path .*o.tar has no index"):
        find_objects(root)
    index_shards.main([str(tmp_path / "o.tar")])
    assert find_objects(root) == names
    (tmp_path / "l.txt").write_text(f"{names[0]}\n")
    assert find_objects(root, str(tmp_path / "l.txt")) == names[:1]
    for name in names:
        try:
            expected = read_object(os.path.join(objects_folder, name), 320)
        except IMAGE_ERRORS:
            continue
        assert np.array_equal(read_object(os.path.join(root, name), 320), expected)
    one, other = (ObjectLibrary(str(place), names) for place in (objects_folder, root))
    draws = [[library.draw(rng) for _ in range(9)] for library in (one, other) for rng in [np.random.default_rng(0)]]
    assert all(np.array_equal(a, b) for a, b in zip(*draws)) and len(one.skipped) == len(other.skipped)
