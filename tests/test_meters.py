"""Averages over steps and epochs, bad steps, log.txt."""

import json
import time

import numpy as np
import pytest
import torch

from meters import MAX_NON_FINITE, RunLog, StepMeter
from utils import RunError

CPU = torch.device("cpu")


def meter_of(folder, steps=100, interval=10, **options):
    return StepMeter(RunLog(str(folder), ""), CPU, 0, 2, steps, interval, **options)


def feed(meter, step, loss, bad=0.0):
    values = {"loss": torch.tensor(float(loss)), "grad_norm": torch.tensor(2.0), "bad": torch.tensor(bad)}
    meter.update(step, values, [f"/videos/{step}.mp4"])


def test_skipped_steps_are_not_in_the_mean_and_are_named(tmp_path, caplog):
    meter = meter_of(tmp_path, steps=12, interval=5)
    with caplog.at_level("INFO", "smile"):
        for step in range(12):
            feed(meter, step, float("nan") if step in (3, 7) else step, bad=float(step in (3, 7)))
    good = [step for step in range(12) if step not in (3, 7)]
    assert meter.averages() == {"train_loss": np.mean(good), "train_grad_norm": 2.0, "skipped_steps": 2}
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert [text.split(": ")[-1] for text in warnings] == ["/videos/3.mp4", "/videos/7.mp4"]
    lines = [record.getMessage() for record in caplog.records if record.levelname == "INFO"]
    assert [line.split("]")[0] for line in lines] == [f"epoch 0 [{done}/12" for done in (5, 10, 12)]
    assert all(word in lines[0] for word in ("loss 1.75", "grad_norm 2", "data_time", "step_time", "eta"))


def test_ten_bad_steps_in_a_row_stop_the_run(tmp_path):
    assert MAX_NON_FINITE == 10
    meter = meter_of(tmp_path, interval=1)
    for step in range(9):
        feed(meter, step, float("nan"), 1.0)
    feed(meter, 9, 1.0)  # one good step in between: the count starts anew
    for step in range(10, 19):
        feed(meter, step, float("nan"), 1.0)
    with pytest.raises(RunError, match="10 steps in a row.*--lr.*--clip_grad"):
        feed(meter, 19, float("nan"), 1.0)
    meter = meter_of(tmp_path, interval=10)  # good steps of the same line do not hide them
    with pytest.raises(RunError, match="15 steps in a row"):
        for step in range(20):
            feed(meter, step, 1.0, float(3 <= step < 18))


def test_bad_steps_are_counted_through_epochs(tmp_path):
    state = None
    with pytest.raises(RunError, match="12 steps in a row"):
        for epoch in range(3):  # noqa: B007 (looked at below)
            meter = meter_of(tmp_path, steps=4, state=state)
            for step in range(4):
                feed(meter, step, float("nan"), 1.0)
            state = meter.state(ended=True)
            assert meter.averages() == {"skipped_steps": 4}
    assert epoch == 2


def test_a_log_on_a_full_disk_does_not_end_the_run(tmp_path, caplog):
    (tmp_path / "log.txt").symlink_to("/dev/full")
    log = RunLog("", "")
    log.file = tmp_path / "log.txt"
    log.epoch({"epoch": 0})
    assert "could not write to" in caplog.text and "No space left" in caplog.text


def test_the_meter_goes_on_from_its_state(tmp_path):
    whole, first = meter_of(tmp_path, steps=20), meter_of(tmp_path, steps=20)
    for step in range(20):
        feed(whole, step, step, bad=float(step == 6))
    for step in range(13):
        feed(first, step, step, bad=float(step == 6))
    first.flush(12)
    second = meter_of(tmp_path, steps=20, state=json.loads(json.dumps(first.state())))
    for step in range(13, 20):
        feed(second, step, step)
    assert second.averages() == whole.averages()


def test_waiting_for_data_is_measured(tmp_path, caplog):
    def slow():
        for number in range(4):
            time.sleep(0.05)
            yield number

    meter = meter_of(tmp_path, steps=4, interval=4)
    with caplog.at_level("INFO", "smile"):
        for step, _ in enumerate(meter.timed(slow())):
            feed(meter, step, 1.0)
    shown = dict(pair.split(" ") for pair in caplog.records[-1].getMessage().split("  ")[1:] if pair.count(" ") == 1)
    assert 0.045 < float(shown["data_time"]) <= float(shown["step_time"])


def test_the_log_is_a_json_line_an_epoch_and_drops_what_was_cut_off(tmp_path):
    log = RunLog(str(tmp_path), "")
    for epoch in range(5):
        log.epoch({"epoch": epoch, "train_loss": epoch / 3})
    for resume_at in (3, 3, 1):
        log = RunLog(str(tmp_path), "", start_epoch=resume_at)
        lines = [json.loads(line) for line in (tmp_path / "log.txt").read_text().splitlines()]
        assert lines == [{"epoch": epoch, "train_loss": epoch / 3} for epoch in range(resume_at)]
    log.epoch({"epoch": 1})
    with open(tmp_path / "log.txt", "a") as file:
        file.write('{"epoch": 2, "train_l')  # as a kill or a full disk leaves it
    RunLog(str(tmp_path), "", start_epoch=2).epoch({"epoch": 2})
    lines = [json.loads(line) for line in (tmp_path / "log.txt").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [0, 1, 2]
