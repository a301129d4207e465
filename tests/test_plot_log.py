"""Curves, confusion matrices and accuracy by class: what is drawn is what the files hold."""

import json
from collections import Counter

import numpy as np
import plot_log
import pytest
from fixtures_pictures import check_texts
from fixtures_video import video_list
from PIL import Image

from evaluation import compute_metrics
from meters import RunLog
from metrics import Task, VideoScore
from utils import RunError

CLASSES = ["opening something", "closing something", "something else that has quite a long name"]


def write_run(folder, epochs, accuracy=False):
    """A log.txt as a run writes it."""
    folder.mkdir(parents=True)
    log = RunLog(str(folder), "")
    for epoch in range(epochs):
        values = {"train_loss": 1 / (1 + epoch), "lr": 1e-3 * epoch, "bad_clips": 0, "seconds": 9.5}
        log.epoch({"epoch": epoch, **values} | ({"val_acc1": 10.0 * epoch, "val_acc5": 50.0} if accuracy else {}))
    if accuracy:
        log.epoch({"test_acc1": 33.0, "test_acc5": 60.0})
    return folder


@pytest.fixture
def tested(tmp_path):
    """A folder with what a test of 40 videos writes, two of them unreadable; labels, scores, and the metrics."""
    rng, folder = np.random.default_rng(0), tmp_path / "tested"
    folder.mkdir()
    labels = rng.integers(0, 3, 40)
    (folder / "test.csv").write_text("".join(f"{i}.mp4 {label}\n" for i, label in enumerate(labels)))
    views = rng.dirichlet(np.ones(3), (40, 2)).astype(np.float32)
    views[labels == 2] = 1 / 3  # ties: class 0
    scores = [VideoScore(i, views[i]) for i in range(40)]
    scores[4] = scores[9] = VideoScore(0, np.empty((0, 3), np.float32), "no such file")
    scores = [VideoScore(i, score.views, score.error) for i, score in enumerate(scores)]
    metrics = compute_metrics(
        scores, video_list(str(folder / "test.csv")), Task(num_classes=3, names=CLASSES), str(folder)
    )
    return folder, labels, views.mean(axis=1), metrics


def test_the_confusion_matrix_counts_every_readable_video_once(tested):
    folder, labels, scores, metrics = tested
    matrix = plot_log.confusion_matrix(*plot_log.read_predictions(folder / "test_predictions.npz"))
    answers = [max(range(3), key=lambda c: row[c]) for row in scores]
    pairs = Counter(pair for i, pair in enumerate(zip(labels, answers)) if i not in (4, 9))
    assert matrix.sum() == 38 and {pair: matrix[pair] for pair in pairs} == pairs
    assert 100 * np.trace(matrix) / 40 == pytest.approx(metrics["acc1"])  # an unreadable video is wrong
    assert matrix[2, 0] == matrix[2].sum()


def test_a_confusion_picture_says_what_is_in_the_matrix():
    matrix = np.array([[8, 2, 0], [1, 5, 0], [0, 0, 0]])
    figure = plot_log.draw_confusion(matrix, CLASSES, "a run", unread=2)
    axes, side = figure.axes[:2]
    np.testing.assert_allclose(axes.images[0].get_array()[:2], [[80, 20, 0], [100 / 6, 500 / 6, 0]])
    cells = {(int(t.get_position()[1]), int(t.get_position()[0])): int(t.get_text()) for t in axes.texts}
    assert cells == {(0, 0): 8, (0, 1): 2, (1, 0): 1, (1, 1): 5}
    assert [bar.get_width() for bar in side.patches] == [2, 1]
    assert next(t.get_text() for t in side.get_yticklabels()) == "opening something → closing something"
    texts = check_texts(figure)
    assert "a run: 13 of 16 videos right (81.2 %), 2 unreadable left out" in texts


@pytest.mark.parametrize("classes", [3, 30, 400])
def test_pictures_of_any_number_of_classes_are_legible(classes):
    rng = np.random.default_rng(0)
    names = [f"pretending to do something with something, number {c}" for c in range(classes)]
    matrix = rng.poisson(0.5, (classes, classes)) + 20 * np.eye(classes, dtype=int)
    check_texts(plot_log.draw_confusion(matrix, names, "run"))
    table = {c: plot_log.ClassResult(names[c], c, top1, 100.0) for c, top1 in enumerate(rng.uniform(0, 100, classes))}
    figure = plot_log.draw_classes(table, "run")
    check_texts(figure)
    ranked = sorted((result.top1 for result in table.values()), reverse=True)
    widths = [bar.get_width() for axes in figure.axes for bar in axes.patches]
    assert widths == (ranked if classes <= 40 else ranked[:20] + ranked[-20:])


def test_curves_are_the_numbers_of_the_log(tmp_path):
    folders = write_run(tmp_path / "first", 5), write_run(tmp_path / "second", 3, accuracy=True)
    figure = plot_log.draw_curves({folder.name: plot_log.read_log(folder / "log.txt") for folder in folders})
    check_texts(figure)
    titled = [axes for axes in figure.axes if axes.get_title()]
    panels = {axes.get_title(): [line for line in axes.lines if len(line.get_xdata())] for axes in titled}
    assert list(panels) == ["loss", "top-1 accuracy, %", "top-5 accuracy, %", "learning rate", "seconds an epoch"]
    first, second = panels["loss"]
    np.testing.assert_allclose(first.get_xydata(), [(e + 1, 1 / (1 + e)) for e in range(5)])
    assert len(second.get_xydata()) == 3 and first.get_color() != second.get_color()
    validation, test = panels["top-1 accuracy, %"]
    np.testing.assert_allclose(validation.get_xydata(), [(1, 0), (2, 10), (3, 20)])
    np.testing.assert_allclose(test.get_xydata(), [(3, 33)])  # of the last epoch
    assert validation.get_color() == test.get_color() == second.get_color()
    assert test.get_marker() == "o"


def test_a_log_that_was_cut_off_is_drawn_and_a_wrong_one_named(tmp_path):
    path = tmp_path / "log.txt"
    lines = [json.dumps({"epoch": epoch, "train_loss": 1.0}) for epoch in range(3)]
    path.write_text("\n".join([*lines, '{"epoch": 3, "tra']))
    assert len(plot_log.read_log(path)) == 3
    path.write_text("\n".join([lines[0], "epoch 2: fine", lines[2]]))
    with pytest.raises(RunError, match=r"log\.txt, line 2: not a line of the log"):
        plot_log.read_log(path)
    path.write_text("")
    with pytest.raises(RunError, match="none of the numbers of a run"):
        plot_log.main([str(path), "--output_dir", str(tmp_path)])
    np.testing.assert_array_equal(plot_log.curve([{"epoch": 0, "a": float("nan")}, {"epoch": 1}], "a")[0], [1])


def test_the_program_draws_what_the_folders_hold(tested, tmp_path, capsys):
    run, other = write_run(tmp_path / "a" / "run", 2), write_run(tmp_path / "b" / "run", 2)
    plot_log.main([str(tested[0]), str(run), str(other), "--output_dir", str(tmp_path / "pictures")])
    files = sorted(path.name for path in (tmp_path / "pictures").iterdir())
    assert len(files) == 3 and files[1] == "curves.png"
    assert files[0].startswith("confusion-") and files[2].startswith("per_class-") and "tested" in files[0]
    assert len(capsys.readouterr().out.splitlines()) == 3
    for name in files:
        assert min(Image.open(tmp_path / "pictures" / name).size) > 200


def test_what_cannot_be_drawn_is_named_in_a_line(tested, tmp_path):
    (tmp_path / "x.npz").write_bytes(b"no zip")
    (tmp_path / "x.csv").write_text("a,b\n1,2\n")
    (tmp_path / "x.pth").write_bytes(b"")
    (tmp_path / "x.txt").write_text('{"something": 1}\n')
    for path, message in (
        (tmp_path / "nothing", "nothing: no log.txt, test_predictions.npz or test_per_class.csv there"),
        (tmp_path / "x.npz", "x.npz: not the predictions of a test"),
        (tmp_path / "x.csv", "x.csv: not a table of classes"),
        (tmp_path / "x.pth", "x.pth: neither a log.txt"),
        (tmp_path / "x.txt", "none of the numbers of a run"),
    ):
        with pytest.raises(RunError) as ended:
            plot_log.main([str(path), "--output_dir", str(tmp_path / "pictures")])
        assert message in str(ended.value) and "\n" not in str(ended.value)
