"""Few-shot lists, and the table of data sets."""

from collections import Counter

import numpy as np
import pytest
from fixtures_video import video_list

from datasets_finetune import DATA_SETS, few_shot

pytest_plugins = "fixtures_video"


@pytest.fixture
def uneven(tmp_path):
    """Classes 0, 1 and 2 with 50, 20 and 8 videos, shuffled."""
    labels = np.random.default_rng(0).permutation([0] * 50 + [1] * 20 + [2] * 8)
    (tmp_path / "train.csv").write_text("".join(f"video {i}.mp4 {label}\n" for i, label in enumerate(labels)))
    return video_list(str(tmp_path / "train.csv"), 3)


def content(videos):
    return [(videos.path(i), int(videos.labels[i])) for i in range(len(videos))]


def test_so_many_videos_of_each_class(uneven):
    for number in (1, 5, 8):
        part = content(few_shot(uneven, 0, samples_per_class=number))
        assert Counter(label for _, label in part) == {0: number, 1: number, 2: number}
        assert part == [line for line in content(uneven) if line in part]  # the list's order, no video twice
    with pytest.raises(ValueError, match="samples_per_class 9: class 2 .*train.csv"):
        few_shot(uneven, 0, samples_per_class=9)


def test_so_many_videos_in_all(uneven):
    part = content(few_shot(uneven, 0, num_train_videos=30))
    assert len(set(part)) == 30 and part == [line for line in content(uneven) if line in part]
    assert len(few_shot(uneven, 0, num_train_videos=78)) == 78
    with pytest.raises(ValueError, match="num_train_videos 79: .*train.csv has 78"):
        few_shot(uneven, 0, num_train_videos=79)
    both = Counter(label for _, label in content(few_shot(uneven, 0, samples_per_class=6, num_train_videos=10)))
    assert sum(both.values()) == 10 and max(both.values()) <= 6


def test_the_subset_is_fixed_by_the_seed(uneven, tmp_path):
    one, again, other = (content(few_shot(uneven, seed, samples_per_class=4)) for seed in (7, 7, 8))
    assert one == again != other
    few_shot(uneven, 7, samples_per_class=4).write(str(tmp_path / "subset.csv"))
    assert content(video_list(str(tmp_path / "subset.csv"), 3)) == one
    drawn = Counter(path for seed in range(400) for path, _ in content(few_shot(uneven, seed, num_train_videos=20)))
    assert len(drawn) == 78 and min(drawn.values()) > 60 and max(drawn.values()) < 150


def test_mini_kinetics_lists_may_have_their_released_names(tmp_path):
    lists = {"train_mini_kinetics.csv": "a.mp4 199", "val_mini_kinetics.csv": "b.mp4 0", "train.csv": "c.mp4 5"}
    for name, line in lists.items():
        (tmp_path / name).write_text(line + "\n")
    read = lambda data_set, name: content(video_list(DATA_SETS[data_set].list_path(str(tmp_path), name), 200))
    assert read("Mini-Kinetics", "train.csv") == [("a.mp4", 199)] and read("Mini-Kinetics", "val.csv") == [("b.mp4", 0)]
    assert read("Kinetics-400", "train.csv") == [("c.mp4", 5)]  # lists of all of Kinetics may lie beside them
    for name in lists:
        if name != "train.csv":
            (tmp_path / name).unlink()
    assert read("Mini-Kinetics", "train.csv") == [("c.mp4", 5)]


def test_the_table_of_data_sets():
    """the recipe; the test views of UCF101, HMDB51 and custom sets are VideoMAE's, of Charades the benchmark's."""
    classes = """Kinetics-400 400 Mini-Kinetics 200 SSV2 174 SSV2-Mini 174 UCF101 101 HMDB51 51 Gym99 99 Gym288 288
        FX-S1 11 UB-S1 15 Diving48 48 NTU60 60 Charades 157 EPIC-verbs 97 custom None custom-unmirrored None""".split()
    views = {"Kinetics-400": 7, "Mini-Kinetics": 7, "SSV2": 2, "SSV2-Mini": 2, "Charades": 10}
    assert {name: str(data.num_classes) for name, data in DATA_SETS.items()} == dict(zip(classes[::2], classes[1::2]))
    for name, data in DATA_SETS.items():
        assert (data.test_segments, data.test_crops) == (views.get(name, 5), 3)
        assert data.sampling == ("segments" if "SSV2" in name else "dense")
        assert data.flip == ("SSV2" not in name and name != "custom-unmirrored")
        assert data.train_list == ("train_mini.csv" if name == "SSV2-Mini" else "train.csv")
