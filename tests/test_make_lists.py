"""Lists of each data set from small trees with its real names and oddities, against lists worked out by hand."""

import json
import sys
from pathlib import Path

import pytest
from fixtures_video import video_list

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts" / "data"))
import make_lists

from utils import RunError


@pytest.fixture
def make(tmp_path, capsys):
    """Make lists: gives their lines, classes, problems (list, kind, name), and what was printed."""

    def make(data_set, *options, videos=(), files=None, relative=True, encoding="utf-8"):
        for name in videos:
            path = tmp_path / "my videos" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        for name, text in (files or {}).items():
            path = tmp_path / "annotations" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(text.encode(encoding))
        where = ["--videos", tmp_path / "my videos", "--output", tmp_path / "out"]
        if data_set not in ("folder",) and "--lists" not in options:
            where += ["--annotations", tmp_path / "annotations"]
        make_lists.main([data_set, *map(str, [*where, *options]), *["--relative"] * relative])
        read = lambda name: (tmp_path / "out" / name).read_text().splitlines()
        lists = {path.name: read(path.name) for path in (tmp_path / "out").glob("*.csv")}
        classes = read("classes.txt") if (tmp_path / "out" / "classes.txt").exists() else None
        problems = []
        if (tmp_path / "out" / "problems.tsv").exists():
            problems = [tuple(line.split("\t")[:3]) for line in read("problems.tsv")[1:]]
        return lists, classes, problems, capsys.readouterr().out

    return make


# Kinetics -------------------------------------------------------------------------------------------------------

KINETICS = {
    # Windows line ends, quoted names, one video twice, one with a second label.
    "train.csv": "label,youtube_id,time_start,time_end,split,is_cc\r\n"
    "zumba,-3B32lodo2M,59,69,train,0\r\n"
    '"massaging person\'s head",0wR5jVB-WPk,417,427,train,0\r\n'
    "abseiling,AbCdEfGhIjK,3,13,train,0\r\n"
    "abseiling,AbCdEfGhIjK,3,13,train,0\r\n"
    "zumba,AbCdEfGhIjK,3,13,train,0\r\n"
    "abseiling,abcdefghijk,3,13,train,0\r\n",
    "val.csv": "label,youtube_id,time_start,time_end,split\n"
    "zumba,zzYxbJHs1dA,0,10,val\nabseiling,gone_gone_g,1,11,val\n",
    "test.csv": "youtube_id,time_start,time_end,split\nxxxxxxxxxxx,1,11,test\n",
}


def test_kinetics(make):
    lists, classes, problems, text = make(
        "kinetics",
        files=KINETICS,
        videos=[
            "train/zumba/-3B32lodo2M_000059_000069.mp4",
            "train/massaging_person's_head/0wR5jVB-WPk_000417_000427.mkv",
            "train/abseiling/AbCdEfGhIjK_000003_000013.mp4",  # not the one whose name differs in case
            "val/zzYxbJHs1dA_000000_000010.webm",
            "val/readme.txt",
        ],
    )
    assert classes == ["abseiling", "massaging person's head", "zumba"]
    assert lists["train.csv"] == [
        "train/zumba/-3B32lodo2M_000059_000069.mp4 2",
        "train/massaging_person's_head/0wR5jVB-WPk_000417_000427.mkv 1",
        "train/abseiling/AbCdEfGhIjK_000003_000013.mp4 0",
    ]
    assert lists["val.csv"] == lists["test.csv"] == ["val/zzYxbJHs1dA_000000_000010.webm 2"]
    assert problems == [
        ("train.csv", "twice", "AbCdEfGhIjK_000003_000013"),
        ("train.csv", "two labels", "AbCdEfGhIjK_000003_000013"),
        ("train.csv", "missing", "abcdefghijk_000003_000013"),
        ("val.csv", "missing", "gone_gone_g_000001_000011"),
    ]
    assert "3 of 6 videos" in text and "1 of 2 videos" in text and "3 classes" in text


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("val", ["val", "validate", "validation", "kinetics_validate", "k400-validation"])
@pytest.mark.parametrize("stem", ["{}_000059_000069", "{}_59_69", "{}", "{}_time_trimmed"])
def test_kinetics_under_other_names(make, val, stem, encoding):
    """Of annotation files and of videos, whose ids may begin with a dash."""
    row = "label,youtube_id,time_start,time_end,split\r\nabseiling,{},59,69,{}\r\n"
    files = {"train.csv": row.format("-3B32lodo2M", "train"), f"{val}.csv": row.format("-0wR5jVB-WP", "validate")}
    videos = [stem.format(video) + ".mp4" for video in ("-3B32lodo2M", "-0wR5jVB-WP")]
    lists, classes, problems, _ = make("kinetics", files=files, videos=videos, encoding=encoding)
    assert lists == {"train.csv": [f"{videos[0]} 0"], "val.csv": [f"{videos[1]} 0"], "test.csv": [f"{videos[1]} 0"]}
    assert classes == ["abseiling"] and not problems


def test_kinetics_prefers_the_class_folder(make):
    row = "label,youtube_id,time_start,time_end,split\ncutting watermelon,aaaaaaaaaaa,0,10,{}\n"
    videos = ["arranging flowers/aaaaaaaaaaa.avi", "cutting_watermelon/aaaaaaaaaaa.avi"]  # no times in the name
    files = {"kinetics_train.csv": row.format("train"), "kinetics_val.csv": row.format("val")}
    lists, _, problems, _ = make("kinetics", files=files, videos=videos)
    assert lists["train.csv"] == ["cutting_watermelon/aaaaaaaaaaa.avi 0"]
    assert problems == [(name, "in train.csv too", lists["train.csv"][0][:-2]) for name in ("val.csv",)]


def test_mini_kinetics_counts_from_1(make, tmp_path):
    given = {
        "trainlist.txt": "kIRmvrmc2nM_000020_000030 2\r\nnope_000000_000010 1\r\n",
        "vallist.txt": "abc_000001_000011 1\n",
    }
    files = {**given, "action_names.txt": "abseiling 1\nplaying guitar 2\n"}
    paths = [tmp_path / "annotations" / name for name in (*given, "action_names.txt")]
    lists, classes, problems, _ = make(
        "kinetics", "--lists", *paths[:2], "--class_names", paths[2], files=files,
        videos=["playing guitar/kIRmvrmc2nM_000020_000030.mp4", "abseiling/abc_000001_000011.mp4"],
    )  # fmt: skip
    assert lists["train.csv"] == ["playing guitar/kIRmvrmc2nM_000020_000030.mp4 1"]
    assert lists["val.csv"] == ["abseiling/abc_000001_000011.mp4 0"]
    assert classes == ["abseiling", "playing guitar"] and problems[0][1:] == ("missing", "nope_000000_000010")


def test_lists_of_another_machine(make, tmp_path):
    """Paths of somebody's home; and the form with a number of frames."""
    files = {
        "train.csv": "/home/x/VideoData/abseiling/a b_000417_000427.avi 0\n",
        "val.txt": "abseiling/0wR5jVB-WPk_000417_000427 300 0\n",
    }
    paths = [tmp_path / "annotations" / name for name in files]
    lists, classes, problems, _ = make(
        "kinetics", "--lists", *paths, files=files,
        videos=["abseiling/a b_000417_000427.mp4", "abseiling/0wR5jVB-WPk_000417_000427.mp4"],
    )  # fmt: skip
    assert lists["train.csv"] == ["abseiling/a b_000417_000427.mp4 0"] and classes is None and problems == []
    assert lists["val.csv"] == ["abseiling/0wR5jVB-WPk_000417_000427.mp4 0"]


# The others -----------------------------------------------------------------------------------------------------


def ssv2_record(number, template):
    return {"id": str(number), "label": "something", "template": template, "placeholders": ["cube"]}


SSV2 = {
    "something-something-v2-labels.json": json.dumps(
        {"Spinning something that quickly stops spinning": "1", "Approaching something with your camera": "0"}
    ),
    "something-something-v2-train.json": json.dumps(
        [
            ssv2_record(74225, "Spinning [something] that quickly stops spinning"),
            ssv2_record(100, "Approaching [something] with your camera"),
            ssv2_record(101, "Approaching [something] with your camera"),
        ]
    ),
    "something-something-v2-validation.json": json.dumps([ssv2_record(7, "Approaching [something] with your camera")]),
    "something-something-v2-test.json": json.dumps([{"id": "1420"}]),
}
SSV2_VIDEOS = [f"20bn-something-something-v2/{number}.webm" for number in (74225, 100, 7, 1420)]


def test_ssv2(make, tmp_path):
    (tmp_path / "mini.csv").write_text("/home/somebody/videos_avi/74225.avi 1\r\n")
    lists, classes, problems, _ = make("ssv2", "--mini", tmp_path / "mini.csv", files=SSV2, videos=SSV2_VIDEOS)
    folder = "20bn-something-something-v2"
    assert lists == {
        "train.csv": [f"{folder}/74225.webm 1", f"{folder}/100.webm 0"],
        "train_mini.csv": [f"{folder}/74225.webm 1"],
        "val.csv": [f"{folder}/7.webm 0"],
        "test.csv": [f"{folder}/7.webm 0"],
    }
    assert classes == ["Approaching something with your camera", "Spinning something that quickly stops spinning"]
    assert problems == [("train.csv", "missing", "101")]


def test_ssv2_mini_with_another_label_is_refused(make, tmp_path):
    (tmp_path / "mini.csv").write_text("100 0\n74225 0\n")
    with pytest.raises(RunError, match=r"mini.csv, line 2: '74225 0'"):
        make("ssv2", "--mini", tmp_path / "mini.csv", files=SSV2, videos=SSV2_VIDEOS)


UCF = {
    "classInd.txt": "1 ApplyEyeMakeup\r\n2 HandstandPushups\r\n3 YoYo\r\n",
    "trainlist01.txt": "ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.avi 1\r\n"
    "HandstandPushups/v_HandStandPushups_g01_c01.avi 2\r\n"
    "YoYo/v_YoYo_g09_c01.avi 3\r\n",
    "testlist01.txt": "ApplyEyeMakeup/v_ApplyEyeMakeup_g01_c01.avi\r\n"
    "HandstandPushups/v_HandStandPushups_g02_c01.avi\r\n",
    "trainlist02.txt": "YoYo/v_YoYo_g09_c01.avi 3\n",
    "testlist02.txt": "ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.avi\n",
}
UCF_VIDEOS = [
    "UCF-101/ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.avi",
    "UCF-101/ApplyEyeMakeup/v_ApplyEyeMakeup_g01_c01.avi",
    "UCF-101/HandStandPushups/v_HandstandPushups_g01_c01.avi",  # either spelling may be on the disk
    "UCF-101/HandstandPushups/v_HandStandPushups_g02_c01.avi",
    "UCF-101/YoYo/v_YoYo_g09_c01.avi",
]


def test_ucf101(make):
    lists, classes, problems, _ = make("ucf101", files=UCF, videos=UCF_VIDEOS)
    assert lists["train.csv"] == [f"{UCF_VIDEOS[0]} 0", f"{UCF_VIDEOS[2]} 1", f"{UCF_VIDEOS[4]} 2"]
    assert lists["val.csv"] == lists["test.csv"] == [f"{UCF_VIDEOS[1]} 0", f"{UCF_VIDEOS[3]} 1"]
    assert classes == ["ApplyEyeMakeup", "HandstandPushups", "YoYo"] and problems == []


def test_ucf101_fold_2(make):
    lists, _, _, _ = make("ucf101", "--fold", 2, files=UCF, videos=UCF_VIDEOS)
    assert lists["train.csv"] == [f"{UCF_VIDEOS[4]} 2"] and lists["test.csv"] == [f"{UCF_VIDEOS[0]} 0"]


def test_ucf101_with_a_wrong_number_is_refused(make):
    files = UCF | {"trainlist01.txt": "YoYo/v_YoYo_g09_c01.avi 2\n"}
    with pytest.raises(RunError, match=r"trainlist01.txt, line 1: the number 2 is not that of the class YoYo"):
        make("ucf101", files=files, videos=UCF_VIDEOS)


def test_ntu60(make):
    lists, classes, problems, _ = make(
        "ntu60",
        files={
            "classInd.txt": "1 drink_water\n2 touch_back__backache_\n",
            "trainlist01.txt": "touch_back__backache_/S017C003P017R001A046_rgb.avi \r\n",
            "testlist01.txt": "drink_water/S001C001P003R001A001_rgb.avi \ndrink_water/S001C001P003R002A001_rgb.avi \n",
        },
        videos=["nturgb+d_rgb/S017C003P017R001A046_rgb.avi", "nturgb+d_rgb/S001C001P003R001A001_rgb.avi"],
    )
    assert lists["train.csv"] == ["nturgb+d_rgb/S017C003P017R001A046_rgb.avi 1"]
    assert lists["val.csv"] == lists["test.csv"] == ["nturgb+d_rgb/S001C001P003R001A001_rgb.avi 0"]
    assert classes == ["drink_water", "touch_back__backache_"]
    assert problems == [("val.csv", "missing", "drink_water/S001C001P003R002A001_rgb.avi")]


def test_hmdb51(make):
    names = {
        "brush_hair": ["April_09_brush_hair_u_nm_np1_ba_goo_0.avi", "b2.avi", "b3.avi"],
        "wave": ["#122_Rhythm_clap!_wave_u_nm_np1_fr_goo_0.avi", "b2.avi"],  # b2 is in two classes
    }
    files = {
        "brush_hair_test_split1.txt": f"{names['brush_hair'][0]} 1 \nb2.avi 2 \nb3.avi 0 \n",
        "wave_test_split1.txt": f"{names['wave'][0]} 2 \r\nb2.avi 1 \r\n",
        "wave_test_split2.txt": f"{names['wave'][0]} 1 \n",
    }
    videos = [f"{of_class}/{name}" for of_class, part in names.items() for name in part]
    lists, classes, problems, _ = make("hmdb51", files=files, videos=videos)
    assert lists["train.csv"] == [f"{videos[0]} 0", "wave/b2.avi 1"]
    assert lists["val.csv"] == lists["test.csv"] == ["brush_hair/b2.avi 0", f"{videos[3]} 1"]
    assert classes == ["brush_hair", "wave"] and problems == []


GYM_CLIP = "A0xAXXysHUo_E_002184_002237_A_0035_{:04d}"


def gym_files(suffix=""):
    text = lambda labels: "".join(f"{GYM_CLIP.format(label)}{suffix} {label}\r\n" for label in labels)
    categories = "".join(f"Clabel: {n}; set: 1; Glabel: {3 * n}; (FX) name {n}, with 0.5 turn\n" for n in range(99))
    return {
        "gym99_train_element_v1.0.txt": text([0, 5, 6, 16, 17, 73, 74, 88, 89, 98]),
        "gym99_val_element.txt": text([7, 87]),
        "gym99_categories.txt": categories,
    }


@pytest.mark.parametrize(
    ("part", "first", "kept", "tested", "total"),
    [
        ("gym99", 0, [0, 5, 6, 16, 17, 73, 74, 88, 89, 98], [7, 87], 99),
        ("fx-s1", 6, [6, 16], [7], 11),
        ("ub-s1", 74, [74, 88], [87], 15),
    ],
)
def test_finegym(make, part, first, kept, tested, total):
    videos = [f"subactions/{GYM_CLIP.format(label)}.mp4" for label in range(99)]
    lists, classes, problems, _ = make("finegym", "--part", part, files=gym_files(), videos=videos)
    assert lists["train.csv"] == [f"{videos[label]} {label - first}" for label in kept]
    assert lists["val.csv"] == lists["test.csv"] == [f"{videos[label]} {label - first}" for label in tested]
    assert classes == [f"(FX) name {first + n}, with 0.5 turn" for n in range(total)] and problems == []


def test_finegym_with_clips_named_by_suffix_and_no_categories(make):
    files = {
        "gym288_train.txt": f"{GYM_CLIP.format(1)}.avi 287\n",
        "gym288_val.txt": f"{GYM_CLIP.format(2)}.avi 0\n",
        "gym288_train_org.txt": "another form of the same 1\n",
    }
    videos = [f"videos/{GYM_CLIP.format(number)}.mp4" for number in (1, 2)]
    lists, classes, _, _ = make("finegym", "--part", "gym288", files=files, videos=videos)
    assert lists["train.csv"] == [f"{videos[0]} 287"] and classes is None


def test_diving48(make):
    record = lambda name, label: {"vid_name": name, "label": label, "start_frame": 0, "end_frame": 48}
    lists, classes, problems, _ = make(
        "diving48",
        files={
            "Diving48_V2_train.json": json.dumps([record("-mmq0PT-u8k_00155", 1), record("8mqTGnXR8ws_00000", 0)]),
            "Diving48_V2_test.json": json.dumps([record("6mqTGnXR8ws_00361", 1)]),
            "Diving48_vocab.json": json.dumps(
                [["Back", "15som", "05Twis", "FREE"], ["Reverse", "Dive", "NoTwis", "PIKE"]]
            ),
        },
        videos=["rgb/-mmq0PT-u8k_00155.mp4", "rgb/6mqTGnXR8ws_00361.mp4"],
    )
    assert lists["train.csv"] == ["rgb/-mmq0PT-u8k_00155.mp4 1"]
    assert lists["test.csv"] == ["rgb/6mqTGnXR8ws_00361.mp4 1"]
    assert classes == ["Back 15som 05Twis FREE", "Reverse Dive NoTwis PIKE"]
    assert problems == [("train.csv", "missing", "8mqTGnXR8ws_00000")]


def charades_files(train_rows):
    head = "id,subject,scene,quality,relevance,verified,script,objects,descriptions,actions,length\n"
    row = '46GP8,HR43,Kitchen,6,7,Yes,"A person cooks; then, eats.",food;stove,"He\'s ""cooking"".\nTwice.",{},24.83\n'
    return {
        "Charades_v1_train.csv": head + "".join(row.replace("46GP8", name).format(acts) for name, acts in train_rows),
        "Charades_v1_test.csv": head + row.format("c001 0.00 25.10"),
        "Charades_v1_classes.txt": "".join(f"c{n:03d} Doing thing {n}\n" for n in range(157)),
    }


def test_charades(make):
    rows = [("YSKX3", "c092 11.90 21.20;c147 0.00 12.60"), ("AAAAA", ""), ("BBBBB", "c000 5.00 4.00;c156 1 2.5")]
    videos = [f"Charades_v1/{name}.mp4" for name in ("YSKX3", "AAAAA", "BBBBB", "46GP8")]
    lists, classes, problems, _ = make("charades", files=charades_files(rows), videos=videos)
    assert lists["train.csv"] == [
        "Charades_v1/YSKX3.mp4 92:11.90-21.20,147:0.00-12.60",
        "Charades_v1/AAAAA.mp4 -",
        "Charades_v1/BBBBB.mp4 156:1-2.5",
    ]
    assert lists["val.csv"] == lists["test.csv"] == ["Charades_v1/46GP8.mp4 1:0.00-25.10"]
    assert len(classes) == 157 and classes[92] == "Doing thing 92"
    assert problems == [("train.csv", "ends before it starts", "BBBBB")]


@pytest.mark.parametrize("actions", ["c092 11.90", "c157 1.00 2.00", "92 1.00 2.00"])
def test_charades_with_a_wrong_action_is_refused(make, actions):
    with pytest.raises(RunError, match=r"Charades_v1_train.csv, line 3: "):
        make("charades", files=charades_files([("YSKX3", actions)]), videos=["YSKX3.mp4"])


def test_a_charades_row_cut_short_is_refused(make):
    """It is not a video in which nothing is done."""
    files = charades_files([("YSKX3", "c092 11.90 21.20"), ("AAAAA", "")])
    name = "Charades_v1_train.csv"
    files[name] = files[name].rpartition(",,")[0] + "\n"
    with pytest.raises(RunError, match=rf"{name}, line 5: ends before the column 'actions'"):
        make("charades", files=files, videos=["YSKX3.mp4", "AAAAA.mp4"])


# One's own folder, and what is common to all --------------------------------------------------------------------


def test_folder_with_splits(make):
    videos = ["train/a cat/1.mp4", "train/dog/2.MOV", "val/dog/3.mp4", "test/a cat/4.mp4"]
    lists, classes, problems, _ = make("folder", videos=videos)
    assert lists == {
        "train.csv": ["train/a cat/1.mp4 0", "train/dog/2.MOV 1"],
        "val.csv": ["val/dog/3.mp4 1"],
        "test.csv": ["test/a cat/4.mp4 0"],
    }
    assert classes == ["a cat", "dog"] and problems == [("val.csv", "classes without a video in it", "a cat")]


def test_folder_without_val_draws_it_from_train(make):
    videos = [f"{split}/{name}/{number}.m2ts" for split in ("train", "test") for name in "ab" for number in range(4)]
    lists, _, problems, _ = make("folder", videos=videos)
    assert [len(lists[f"{split}.csv"]) for split in ("train", "val", "test")] == [6, 2, 8] and not problems
    assert {line[:7] for line in lists["val.csv"]} == {"train/a", "train/b"}


@pytest.mark.parametrize("counts", [(1, 1, 1), (2, 1, 3), (5, 8, 3), (1, 40, 2)])
@pytest.mark.parametrize("fraction", ["0.1", "0.9", "0"])
def test_a_class_of_two_videos_or_more_has_one_in_val(make, counts, fraction):
    """And one in train; classes that have none in val are named."""
    videos = [f"{name}/{number}.ogv" for name, count in zip("abc", counts) for number in range(count)]
    lists, _, problems, text = make("folder", "--val_fraction", fraction, videos=videos)
    for label, (name, count) in enumerate(zip("abc", counts)):
        train, val = (
            sum(line.endswith(f" {label}") for line in lists.get(f"{part}.csv", [])) for part in ("train", "val")
        )
        assert train + val == count and train > 0 and (val > 0) == (count > 1 and fraction != "0")
        if count > 1 and fraction != "0":
            assert val == min(max(round(float(fraction) * count), 1), count - 1)
        assert (name in [problem[2] for problem in problems]) == (val == 0)
    assert ("val.csv: " in text and "--val_fraction above 0: " in text) == bool(problems)


def test_folder_without_splits_draws_a_part_of_each_class(make):
    videos = [f"{name}/{number}.mp4" for name in ("cat", "dog") for number in range(20)]
    first, _, _, _ = make("folder", "--val_fraction", "0.25", videos=videos)
    again, _, _, _ = make("folder", "--val_fraction", "0.25")
    other, _, _, _ = make("folder", "--val_fraction", "0.25", "--seed", "1")
    assert first == again != other
    assert sorted(first["train.csv"] + first["val.csv"]) == sorted(f"{name} {int('dog' in name)}" for name in videos)
    assert [sum("dog" in line for line in first["val.csv"]), len(first["val.csv"])] == [5, 10]
    assert first["val.csv"] == first["test.csv"]


def test_folder_without_labels(make):
    lists, classes, _, _ = make("folder", "--unlabelled", videos=["x.mp4", "deep/er/y.webm"])
    assert lists == {"train.csv": ["deep/er/y.webm -1", "x.mp4 -1"]} and classes is None


@pytest.mark.parametrize(
    ("videos", "message"),
    [
        (["cat/1.mp4", "2.mp4"], "2.mp4 is in no class folder"),
        (["train/cat/1.mp4", "other/2.mp4"], "other/2.mp4 is in none of train/"),
        (["readme.txt"], "no videos below it"),
    ],
)
def test_a_folder_of_another_form_is_refused(make, videos, message):
    with pytest.raises(RunError, match=message):
        make("folder", videos=videos)


def test_links_that_lead_back_and_odd_names(make, tmp_path):
    (tmp_path / "my videos" / "cat").mkdir(parents=True)
    (tmp_path / "my videos" / "cat" / "round").symlink_to(tmp_path / "my videos")
    lists, _, problems, _ = make("folder", "--unlabelled", videos=["cat/two  words.mp4", "cat/line\nbreak.mp4"])
    assert lists["train.csv"] == ["cat/two  words.mp4 -1"]
    assert [kind for _, kind, _ in problems] == ["a name that no list can hold"]


def test_paths_are_absolute_and_training_reads_them(make, tmp_path):
    make(
        "hmdb51",
        files={"wave_test_split1.txt": "a.avi 1 \nb b.avi 2 \n"},
        videos=["a.avi", "wave/b b.avi"],
        relative=False,
    )
    videos = video_list(str(tmp_path / "out" / "test.csv"), 1)
    assert videos.path(0) == str(tmp_path / "my videos" / "wave" / "b b.avi") and videos.labels.tolist() == [0]


def test_a_second_run_leaves_nothing_of_the_first(make, tmp_path):
    make("ssv2", "--mini", write(tmp_path / "mini.csv", "100\n"), files=SSV2, videos=SSV2_VIDEOS)
    lists, classes, problems, _ = make("folder", "--unlabelled")
    assert list(lists) == ["train.csv"] and classes is None and problems == []


def write(path, text):
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("data_set", "files", "message"),
    [
        ("ucf101", {}, "no classInd.txt there"),
        ("ucf101", {"classInd.txt": "1 A\n3 B\n"}, "not consecutive from 0 or 1"),
        ("kinetics", {"train.csv": "id,class\n", "val.csv": ""}, "no column 'label' in its head"),
        ("hmdb51", {"wave_test_split1.txt": "a.avi 3 \n"}, "wave_test_split1.txt, line 1: 3 is not 0"),
        ("hmdb51", {"wave_test_split1.txt": "b.avi 1 \n"}, "not one video .* b.avi: missing"),
        ("diving48", {"Diving48_vocab.json": "[["}, "no JSON file"),
        ("finegym", {"gym99_train.txt": "x 99\n", "gym99_val.txt": ""}, r"line 1: label 99 is not in \[0, 99\)"),
        ("finegym", {"gym99_train.txt": "x y\n", "gym99_val.txt": ""}, "line 1: 'y' is no whole number"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(make, data_set, files, message):
    with pytest.raises(RunError, match=message):
        make(data_set, files=files, videos=["a.avi"])


def test_the_annotations_are_not_overwritten(tmp_path, capsys):
    with pytest.raises(SystemExit):
        make_lists.main(["kinetics", "--videos", "x", "--annotations", str(tmp_path), "--output", str(tmp_path)])
    assert "would be overwritten" in capsys.readouterr().err
