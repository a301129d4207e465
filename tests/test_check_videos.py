"""check_videos.py and video_check.py: good, bad and slow videos are told apart; interrupted, it goes on."""

import json
import logging
import os
import time

import av
import check_videos
import data_tools
import processes
import pytest
from fixtures_data_tools import kill_at
from fixtures_video import source_frames, video_list, write_list, write_mp4

from datasets import VideoCheck
from utils import RunError
from video_check import slow_reasons

pytest_plugins = "fixtures_data_tools"


@pytest.fixture
def check(tmp_path, capsys):
    """Check a list: names of the good videos, reason by name of the bad, wrong and slow ones, and what was printed."""

    def check(list_path, *options):
        check_videos.main([str(list_path), "--output", str(tmp_path / "out.csv"), "--workers", "2", *options])
        text = capsys.readouterr().out
        good = [line.rpartition(" ")[0].rpartition("/")[2] for line in (tmp_path / "out.csv").read_text().splitlines()]
        tables = []
        for kind in ("bad", "wrong", "slow"):
            path = tmp_path / f"out.{kind}.tsv"
            rows = [line.split("\t") for line in path.read_text().splitlines()[1:]] if path.exists() else []
            tables.append({os.path.basename(row[1]): row[2] for row in rows})
        return good, *tables, text

    return check


def test_slow_reasons(odd_videos):
    videos, _ = odd_videos
    reasons = {name: slow_reasons(str(path)) for name, path in videos.items()}
    assert reasons.pop("one key.mp4") == ["one key frame for all its 160 frames"]
    assert reasons.pop("large.mp4") == ["960 x 576 pixels for clips of 224"]
    assert slow_reasons(str(videos["large.mp4"]), 288) == [] != slow_reasons(str(videos["large.mp4"]), 287)
    [reason] = reasons.pop("broken stamps.mp4")
    assert reason == "frames cannot be found by timestamps: every clip is decoded from the start of the file"
    assert set(map(tuple, reasons.values())) == {()} and len(reasons) >= 3


def test_good_bad_and_slow(check, clips, broken, odd_videos, tmp_path):
    odd, _ = odd_videos
    slow = [odd[name] for name in ("broken stamps.mp4", "one key.mp4")]
    bad = [broken[name] for name in ("text", "empty", "truncated", "cut", "sound only", "missing")]
    listed = [slow[0], bad[0], *clips.values(), *bad[1:], slow[1], bad[0]]
    good, bad_table, wrong_table, slow_table, text = check(write_list(tmp_path / "in.csv", listed))
    assert good == [path.name for path in listed if path not in bad]  # in the list's order
    assert bad_table.keys() == {path.name for path in bad} and all(bad_table.values())
    assert bad_table["missing.mp4"] == "no such file"
    assert slow_table.keys() == {path.name for path in slow} and not wrong_table
    assert "15 videos: 8 good; 0 read wrongly; 7 bad; 2 slow to load" in text
    assert "resize_videos.py" in text and "resize_videos.py" in (tmp_path / "out.slow.tsv").read_text()


def test_full_finds_a_fault_far_from_the_frames_looked_at(check, clips, tmp_path):
    """A packet without its start, two key frames after the first frame, and long before the middle one."""
    write_mp4(tmp_path / "hole.mp4", source_frames("bikes", 0, 240, (96, 64)))
    with av.open(str(tmp_path / "hole.mp4")) as container:
        packets = [(packet.is_keyframe, packet.pos) for packet in container.demux(video=0) if packet.size]
    data = bytearray((tmp_path / "hole.mp4").read_bytes())
    place = next(place for number, (key, place) in enumerate(packets) if number > 30 and not key)
    data[place : place + 4] = b"\xff" * 4
    (tmp_path / "hole.mp4").write_bytes(data)
    good, _, wrong, *_ = check(write_list(tmp_path / "in.csv", [clips["bikes.mp4"], tmp_path / "hole.mp4"]), "--full")
    assert good == ["bikes.mp4"] and wrong.keys() == {"hole.mp4"}


def test_labels_of_all_kinds_and_relative_paths_are_kept(check, clips, tmp_path):
    folder = clips["bikes.mp4"].parent
    lines = ["bikes.mp4 92:11.90-21.20,147:0.00-12.60", "with two spaces.mp4 -", "gone.mp4 3", "bunny.mp4 -1"]
    (tmp_path / "in.csv").write_text("\n".join(lines) + "\n")
    check(tmp_path / "in.csv", "--data_root", str(folder))
    assert (tmp_path / "out.csv").read_text().splitlines() == [*lines[:2], lines[3]]


def test_a_second_run_looks_at_what_changed_alone(check, clips, broken, tmp_path, monkeypatch):
    copy = tmp_path / "copy.mp4"
    copy.write_bytes(broken["text"].read_bytes())
    listed = write_list(tmp_path / "in.csv", [clips["bikes.mp4"], broken["empty"], copy])
    first = check(listed)
    with open(tmp_path / "out.seen.jsonl", "a") as file:
        file.write('["half a li')  # as a kill leaves it
    looked_at, work = [], processes.in_processes
    noted = lambda function, items, *rest: looked_at.append(items) or work(function, items, *rest)
    monkeypatch.setattr(check_videos, "in_processes", noted)
    assert check(listed)[:4] == first[:4]
    copy.write_bytes(clips["bunny.mp4"].read_bytes())
    assert check(listed)[0] == ["bikes.mp4", "copy.mp4"]
    check(listed)
    check(listed, "--input_size", "112")
    assert [len(items) for items in looked_at] == [0, 1, 0, 3]


def hang_or_die(item):
    """What a decoder may do."""
    if item == "hangs":
        time.sleep(60)
    if item == "dies":
        os.kill(os.getpid(), 9)
    if item == "refuses":
        raise data_tools.Unusable("not mine")
    return item.upper()


def test_a_worker_that_hangs_or_dies_costs_its_item_alone():
    items = ["a", "hangs", "b", "dies", "refuses", "c"]
    found = list(processes.in_processes(hang_or_die, items, 2, 1.5, ""))
    assert {item: result for item, result, _ in found if result} == {"a": "A", "b": "B", "c": "C"}
    why = {item: why for item, _, why in found}
    assert why["dies"].startswith("the process that read it died (exit code -9)")
    assert "--timeout" in why["hangs"] and why["refuses"] == "not mine"


def test_killed_it_goes_on(clips, tmp_path):
    listed = write_list(tmp_path / "in.csv", [*clips.values()] * 3)
    argv = [listed, "--output", str(tmp_path / "out.csv"), "--workers", "1"]
    kill_at(check_videos.main, argv, check_videos, "look", calls=3)
    assert (tmp_path / "out.seen.jsonl").read_text()  # the first was written down before the third was begun
    check_videos.main(argv)
    assert (tmp_path / "out.csv").read_text() == (tmp_path / "in.csv").read_text()
    names = [json.loads(line)[0] for line in (tmp_path / "out.seen.jsonl").read_text().splitlines() if line]
    assert sorted(names) == sorted(str(path) for path in clips.values())  # each once


@pytest.mark.parametrize("text, message", [("", "is empty"), ("\na.mp4 0\nb\n", "line 3: 'b' is not `path label`")])
def test_a_wrong_list_is_refused(tmp_path, text, message):
    (tmp_path / "in.csv").write_text(text)
    with pytest.raises(RunError, match=message):
        check_videos.main([str(tmp_path / "in.csv"), "--output", str(tmp_path / "out.csv")])


def test_no_readable_video_is_an_error_and_the_list_is_not_overwritten(broken, tmp_path, capsys):
    listed = write_list(tmp_path / "in.csv", [broken["text"]])
    with pytest.raises(RunError, match="not one of its videos can be read"):
        check_videos.main([listed, "--output", str(tmp_path / "out.csv")])
    assert not (tmp_path / "out.csv").exists() and "text.mp4" in (tmp_path / "out.bad.tsv").read_text()
    with pytest.raises(SystemExit):
        check_videos.main([listed, "--output", listed])
    assert "other than the list" in capsys.readouterr().err


# At the start of a training -------------------------------------------------------------------------------------


def warnings_of(tmp_path, caplog, videos, seconds=60):
    """What a VideoCheck of these videos has to tell."""
    with caplog.at_level(logging.WARNING, "smile"):
        VideoCheck(video_list(write_list(tmp_path / "look.csv", videos)), 224, seconds=seconds).report()
    return caplog.messages


def test_slow_videos_are_reported_at_the_start(odd_videos, broken, tmp_path, caplog):
    videos, _ = odd_videos
    assert warnings_of(tmp_path, caplog, [videos["plain.mp4"]] * 3 + [broken["missing"]]) == []
    slow = [videos["one key.mp4"], videos["broken stamps.mp4"]]
    (message,) = warnings_of(tmp_path, caplog, [videos["plain.mp4"], *slow])
    first = f"{videos['one key.mp4']}: one key frame for all its 160 frames"
    assert f"look.csv: 2 of 3 checked videos are slow to load, for example {first}. " in message
    assert "scripts/data/resize_videos.py" in message


def test_a_video_on_which_the_decoder_hangs_does_not_stop_the_start(odd_videos, tmp_path, caplog):
    """As no file that hangs is at hand, there is no time to read any."""
    (message,) = warnings_of(tmp_path, caplog, [odd_videos[0]["plain.mp4"]] * 2, seconds=0)
    assert (
        f"1 of 1 checked videos are slow to load, for example {odd_videos[0]['plain.mp4']}: not read within 0 s"
        in message
    )
