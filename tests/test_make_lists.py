"""Lists of each data set from small trees with its real names and oddities, against lists worked out by hand."""

import json

import make_lists
import pytest
from fixtures_video import video_list

from utils import RunError


@pytest.fixture
def make(tmp_path, capsys):
    """Make lists: gives their lines, classes, problems (list, kind, name), and what was printed."""

    def make(data_set, *options, videos=(), files=None, relative=True, encoding="utf-8"):
        for folder, contents in (("my videos", dict.fromkeys(videos, "")), ("annotations", files or {})):
            for name, text in contents.items():
                path = tmp_path / folder / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(text.encode(encoding))
        where = ["--videos", tmp_path / "my videos", "--output", tmp_path / "out"]
        if data_set != "folder" and "--lists" not in options:
            where += ["--annotations", tmp_path / "annotations"]
        make_lists.main([data_set, *map(str, [*where, *options]), *["--relative"] * relative])
        made = {path.name: path.read_text().splitlines() for path in (tmp_path / "out").iterdir() if path.is_file()}
        lists = {name: lines for name, lines in made.items() if name.endswith(".csv")}
        problems = [tuple(line.split("\t")[:3]) for line in made.get("problems.tsv", [])[1:]]
        return lists, made.get("classes.txt"), problems, capsys.readouterr().out

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
    videos = [
        "train/zumba/-3B32lodo2M_000059_000069.mp4",
        "train/massaging_person's_head/0wR5jVB-WPk_000417_000427.mkv",
        "train/abseiling/AbCdEfGhIjK_000003_000013.mp4",  # not the one whose name differs in case
        "val/zzYxbJHs1dA_000000_000010.webm",
    ]
    lists, classes, problems, text = make("kinetics", files=KINETICS, videos=[*videos, "val/readme.txt"])
    assert classes == ["abseiling", "massaging person's head", "zumba"]
    assert lists["train.csv"] == [f"{videos[0]} 2", f"{videos[1]} 1", f"{videos[2]} 0"]
    assert lists["val.csv"] == lists["test.csv"] == [f"{videos[3]} 2"]
    assert problems == [
        ("train.csv", "twice", "AbCdEfGhIjK_000003_000013"),
        ("train.csv", "two labels", "AbCdEfGhIjK_000003_000013"),
        ("train.csv", "missing", "abcdefghijk_000003_000013"),
        ("val.csv", "missing", "gone_gone_g_000001_000011"),
    ]
    assert "3 of 6 videos" in text and "1 of 2 videos" in text and "3 classes" in text


@pytest.mark.parametrize(
    "val, stem, encoding",
    [
        ("val", "{}_000059_000069", "utf-8-sig"),
        ("validate", "{}_59_69", "utf-8"),
        ("validation", "{}", "utf-16"),
        ("kinetics_validate", "{}_time_trimmed", "utf-8"),
        ("k400-validation", "{}_000059_000069", "utf-8"),
    ],
)
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
    assert lists["train.csv"] == [f"{videos[1]} 0"] and problems == [("val.csv", "in train.csv too", videos[1])]


def test_mini_kinetics_counts_from_1(make, tmp_path):
    files = {
        "trainlist.txt": "kIRmvrmc2nM_000020_000030 2\r\nnope_000000_000010 1\r\n",
        "vallist.txt": "abc_000001_000011 1\n",
        "action_names.txt": "abseiling 1\nplaying guitar 2\n",
    }
    train, val, names = (tmp_path / "annotations" / name for name in files)
    videos = ["playing guitar/kIRmvrmc2nM_000020_000030.mp4", "abseiling/abc_000001_000011.mp4"]
    options = ["--lists", train, val, "--class_names", names]
    lists, classes, problems, _ = make("kinetics", *options, files=files, videos=videos)
    assert lists["train.csv"] == [f"{videos[0]} 1"] and lists["val.csv"] == [f"{videos[1]} 0"]
    assert classes == ["abseiling", "playing guitar"] and problems[0][1:] == ("missing", "nope_000000_000010")


def test_lists_of_another_machine(make, tmp_path):
    """Paths of somebody's home; and the form with a number of frames."""
    files = {
        "train.csv": "/home/x/VideoData/abseiling/a b_000417_000427.avi 0\n",
        "val.txt": "abseiling/0wR5jVB-WPk_000417_000427 300 0\n",
    }
    videos = ["abseiling/a b_000417_000427.mp4", "abseiling/0wR5jVB-WPk_000417_000427.mp4"]
    paths = [tmp_path / "annotations" / name for name in files]
    lists, classes, problems, _ = make("kinetics", "--lists", *paths, files=files, videos=videos)
    assert lists["train.csv"] == [f"{videos[0]} 0"] and lists["val.csv"] == [f"{videos[1]} 0"]
    assert classes is None and problems == []


# The others -----------------------------------------------------------------------------------------------------


APPROACHING, SPINNING = "Approaching {} with your camera", "Spinning {} that quickly stops spinning"


def records(templates):
    """Annotations of videos: number → template."""
    return json.dumps([{"id": str(n), "template": text.format("[something]")} for n, text in templates.items()])


SSV2 = {
    "something-something-v2-labels.json": json.dumps(
        {SPINNING.format("something"): "1", APPROACHING.format("something"): "0"}
    ),
    "something-something-v2-train.json": records({74225: SPINNING, 100: APPROACHING, 101: APPROACHING}),
    "something-something-v2-validation.json": records({7: APPROACHING}),
    "something-something-v2-test.json": json.dumps([{"id": "1420"}]),
}
SSV2_VIDEOS = [f"20bn-something-something-v2/{number}.webm" for number in (74225, 100, 7, 1420)]


def test_ssv2(make, tmp_path):
    (tmp_path / "mini.csv").write_text("/home/somebody/videos_avi/74225.avi 1\r\n")
    lists, classes, problems, _ = make("ssv2", "--mini", tmp_path / "mini.csv", files=SSV2, videos=SSV2_VIDEOS)
    assert lists["train.csv"] == [f"{SSV2_VIDEOS[0]} 1", f"{SSV2_VIDEOS[1]} 0"]
    assert lists["train_mini.csv"] == [f"{SSV2_VIDEOS[0]} 1"]
    assert lists["val.csv"] == lists["test.csv"] == [f"{SSV2_VIDEOS[2]} 0"] and len(lists) == 4
    assert classes == [template.format("something") for template in (APPROACHING, SPINNING)]
    assert problems == [("train.csv", "missing", "101")]
    (tmp_path / "mini.csv").write_text("100 0\n74225 0\n")  # another label
    with pytest.raises(RunError, match=r"mini.csv, line 2: '74225 0'"):
        make("ssv2", "--mini", tmp_path / "mini.csv", files=SSV2, videos=SSV2_VIDEOS)
    lists, classes, problems, _ = make("folder", "--unlabelled")  # a second run leaves nothing of the first
    assert list(lists) == ["train.csv"] and classes is None and problems == []


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


@pytest.mark.parametrize(
    "fold, train, test", [(1, [(0, 0), (2, 1), (4, 2)], [(1, 0), (3, 1)]), (2, [(4, 2)], [(0, 0)])]
)
def test_ucf101(make, fold, train, test):
    """`train`, `test`: (number of a video, label)."""
    lists, classes, problems, _ = make("ucf101", "--fold", fold, files=UCF, videos=UCF_VIDEOS)
    assert lists["train.csv"] == [f"{UCF_VIDEOS[number]} {label}" for number, label in train]
    assert lists["val.csv"] == lists["test.csv"] == [f"{UCF_VIDEOS[number]} {label}" for number, label in test]
    assert classes == ["ApplyEyeMakeup", "HandstandPushups", "YoYo"] and problems == []


def test_ntu60(make):
    files = {
        "classInd.txt": "1 drink_water\n2 touch_back__backache_\n",
        "trainlist01.txt": "touch_back__backache_/S017C003P017R001A046_rgb.avi \r\n",
        "testlist01.txt": "drink_water/S001C001P003R001A001_rgb.avi \ndrink_water/S001C001P003R002A001_rgb.avi \n",
    }
    videos = ["nturgb+d_rgb/S017C003P017R001A046_rgb.avi", "nturgb+d_rgb/S001C001P003R001A001_rgb.avi"]
    lists, classes, problems, _ = make("ntu60", files=files, videos=videos)
    assert lists["train.csv"] == [f"{videos[0]} 1"] and lists["val.csv"] == lists["test.csv"] == [f"{videos[1]} 0"]
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


def gym_files():
    text = lambda *labels: "".join(f"{GYM_CLIP.format(label)} {label}\r\n" for label in labels)
    return {
        "gym99_train_element_v1.0.txt": text(0, 5, 6, 16, 17, 73, 74, 88, 89, 98),
        "gym99_val_element.txt": text(7, 87),
        "gym99_categories.txt": "".join(
            f"Clabel: {n}; set: 1; Glabel: {3 * n}; (FX) name {n}, with 0.5 turn\n" for n in range(99)
        ),
    }


@pytest.mark.parametrize("part, first, end, total", [("gym99", 0, 99, 99), ("fx-s1", 6, 17, 11), ("ub-s1", 74, 89, 15)])
def test_finegym(make, part, first, end, total):
    """The parts are classes 6 to 16, and 74 to 88."""
    videos = [f"subactions/{GYM_CLIP.format(label)}.mp4" for label in range(99)]
    lists, classes, problems, _ = make("finegym", "--part", part, files=gym_files(), videos=videos)
    of_part = lambda labels: [f"{videos[label]} {label - first}" for label in labels if first <= label < end]
    assert lists["train.csv"] == of_part([0, 5, 6, 16, 17, 73, 74, 88, 89, 98])
    assert lists["val.csv"] == lists["test.csv"] == of_part([7, 87])
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
    train = [record("-mmq0PT-u8k_00155", 1), record("8mqTGnXR8ws_00000", 0)]
    classes = [["Back", "15som", "05Twis", "FREE"], ["Reverse", "Dive", "NoTwis", "PIKE"]]
    files = {"V2_train": train, "V2_test": [record("6mqTGnXR8ws_00361", 1)], "vocab": classes}
    files = {f"Diving48_{name}.json": json.dumps(content) for name, content in files.items()}
    videos = ["rgb/-mmq0PT-u8k_00155.mp4", "rgb/6mqTGnXR8ws_00361.mp4"]
    lists, names, problems, _ = make("diving48", files=files, videos=videos)
    assert lists["train.csv"] == [f"{videos[0]} 1"] and lists["test.csv"] == [f"{videos[1]} 1"]
    assert names == list(map(" ".join, classes)) and problems == [("train.csv", "missing", "8mqTGnXR8ws_00000")]


HEAD = "id,subject,scene,quality,relevance,verified,script,objects,descriptions,actions,length\n"
NO_ACTIONS = ("c092 11.90", "c157 1.00 2.00", "92 1.00 2.00")
CUT = f"{HEAD}A,S,K,6,7,Yes,x,y,z,,9.9\nA,S,K,6,7,Yes,x,y,z\n"  # its second row is not a video in which nothing is done


def charades_files(train_rows):
    row = '46GP8,HR43,Kitchen,6,7,Yes,"A person cooks; then, eats.",food;stove,"He\'s ""cooking"".\nTwice.",{},24.83\n'
    return {
        "Charades_v1_train.csv": HEAD + "".join(row.replace("46GP8", name).format(acts) for name, acts in train_rows),
        "Charades_v1_test.csv": HEAD + row.format("c001 0.00 25.10"),
        "Charades_v1_classes.txt": "".join(f"c{n:03d} Doing thing {n}\n" for n in range(157)),
    }


def test_charades(make):
    rows = [("YSKX3", "c092 11.90 21.20;c147 0.00 12.60"), ("AAAAA", ""), ("BBBBB", "c000 5.00 4.00;c156 1 2.5")]
    videos = [f"Charades_v1/{name}.mp4" for name in ("YSKX3", "AAAAA", "BBBBB", "46GP8")]
    lists, classes, problems, _ = make("charades", files=charades_files(rows), videos=videos)
    labels = ["92:11.90-21.20,147:0.00-12.60", "-", "156:1-2.5", "1:0.00-25.10"]
    lines = [f"{video} {label}" for video, label in zip(videos, labels)]
    assert lists["train.csv"] == lines[:3] and lists["val.csv"] == lists["test.csv"] == lines[3:]
    assert len(classes) == 157 and classes[92] == "Doing thing 92"
    assert problems == [("train.csv", "ends before it starts", "BBBBB")]


# One's own folder, and what is common to all --------------------------------------------------------------------


def test_folder_with_splits(make):
    videos = ["train/a cat/1.mp4", "train/dog/2.MOV", "val/dog/3.mp4", "test/a cat/4.mp4"]
    lists, classes, problems, _ = make("folder", videos=videos)
    assert lists["train.csv"] == [f"{videos[0]} 0", f"{videos[1]} 1"]
    assert lists["val.csv"] == [f"{videos[2]} 1"] and lists["test.csv"] == [f"{videos[3]} 0"] and len(lists) == 3
    assert classes == ["a cat", "dog"] and problems == [("val.csv", "classes without a video in it", "a cat")]


def test_split_folders_in_capitals(make):
    videos = ["Training/a/1.mp4", "Training/b/2.mp4", "Validation/a/3.mp4", "Validation/b/4.mp4", "TEST/a/5.mp4"]
    lists, classes, problems, _ = make("folder", videos=videos)
    assert [len(lists[f"{split}.csv"]) for split in ("train", "val", "test")] == [2, 2, 1] and not problems
    assert classes == ["a", "b"]


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
        lines_in = lambda name: sum(line.endswith(f" {label}") for line in lists.get(name, ()))
        train, val = lines_in("train.csv"), lines_in("val.csv")
        assert train + val == count and train > 0 and (val > 0) == (count > 1 and fraction != "0")
        if val:
            assert val == min(max(round(float(fraction) * count), 1), count - 1)
        assert (name in [problem[2] for problem in problems]) == (val == 0)
    assert ("val.csv: " in text and "--val_fraction above 0: " in text) == bool(problems)


def test_folder_without_splits_draws_a_part_of_each_class(make):
    videos = [f"{name}/{number}.mp4" for name in ("cat", "dog") for number in range(20)]
    first, again, other = (
        make("folder", "--val_fraction", "0.25", "--seed", seed, videos=videos)[0] for seed in (0, 0, 1)
    )
    assert first == again != other
    assert sorted(first["train.csv"] + first["val.csv"]) == sorted(f"{name} {int('dog' in name)}" for name in videos)
    assert [sum("dog" in line for line in first["val.csv"]), len(first["val.csv"])] == [5, 10]
    assert first["val.csv"] == first["test.csv"]


@pytest.mark.parametrize(
    ("videos", "message"),
    [
        (["cat/1.mp4", "2.mp4"], "2.mp4 is in no class folder"),
        (["train/cat/1.mp4", "other/2.mp4"], "other/2.mp4 is in none of train/"),
        (["readme.txt"], "no videos below it"),
        (["clips/cat/1.mp4", "clips/dog/2.mp4"], "all videos are in one class folder, clips/"),
    ],
)
def test_a_folder_of_another_form_is_refused(make, videos, message):
    with pytest.raises(RunError, match=message):
        make("folder", videos=videos)


def test_links_that_lead_back_and_odd_names(make, tmp_path):
    (tmp_path / "my videos" / "cat").mkdir(parents=True)
    (tmp_path / "my videos" / "cat" / "round").symlink_to(tmp_path / "my videos")
    videos = ["cat/two  words.mp4", "cat/line\nbreak.mp4", "x.webm"]
    lists, classes, problems, _ = make("folder", "--unlabelled", videos=videos)
    assert lists == {"train.csv": ["cat/two  words.mp4 -1", "x.webm -1"]} and classes is None
    assert [kind for _, kind, _ in problems] == ["a name that no list can hold"]


def test_paths_are_absolute_and_training_reads_them(make, tmp_path, capsys):
    files = {"wave_test_split1.txt": "a.avi 1 \nb b.avi 2 \n"}
    make("hmdb51", files=files, videos=["a.avi", "wave/b b.avi"], relative=False)
    videos = video_list(str(tmp_path / "out" / "test.csv"), 1)
    assert videos.path(0) == str(tmp_path / "my videos" / "wave" / "b b.avi") and videos.labels.tolist() == [0]
    with pytest.raises(SystemExit):
        make_lists.main(["kinetics", "--videos", "x", "--annotations", str(tmp_path), "--output", str(tmp_path)])
    assert "would be overwritten" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("data_set", "files", "message"),
    [
        ("ucf101", {}, "no classInd.txt there"),
        ("ucf101", {"classInd.txt": "1 A\n3 B\n"}, "not consecutive from 0 or 1"),
        ("ucf101", UCF | {"trainlist01.txt": "YoYo/v.avi 2\n"}, "trainlist01.txt, line 1: the number 2 is not that of"),
        *(("charades", charades_files([("Y", action)]), "train.csv, line 3: ") for action in NO_ACTIONS),
        ("charades", charades_files([]) | {"Charades_v1_train.csv": CUT}, "ends before the column 'actions'"),
        ("kinetics", {"train.csv": "id,class\n", "val.csv": ""}, "no column 'label' in its header"),
        ("hmdb51", {"wave_test_split1.txt": "a.avi 3 \n"}, "wave_test_split1.txt, line 1: 3 is not 0"),
        ("hmdb51", {"wave_test_split1.txt": "b.avi 1 \n"}, "not one video .* b.avi: missing"),
        ("diving48", {"Diving48_vocab.json": "[["}, "no JSON file"),
        ("finegym", {"gym99_train.txt": "x 99\n", "gym99_val.txt": ""}, r"line 1: label 99 is not in \[0, 99\)"),
        ("finegym", {"gym99_train.txt": "x y\n", "gym99_val.txt": ""}, "line 1: 'y' is not a whole number"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(make, data_set, files, message):
    with pytest.raises(RunError, match=message):
        make(data_set, files=files, videos=["a.avi"])
