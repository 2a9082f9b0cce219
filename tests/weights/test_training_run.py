"""The shared loop reports, saves and looks when it should, and goes on where it was stopped."""

import json

import pytest

from training.cli import make_clock
from training.curves import read_journal
from training.run import Run
from training.settings import Cadence
from training.train_model import Alignment


class Number:
    """A part of a run: one value."""

    def __init__(self):
        self.value = 0

    def state_dict(self):
        return {"value": self.value}

    def load_state_dict(self, state):
        self.value = state["value"]


class Counting(Run):
    """Adds one a step; breaks at ``fails_at``."""

    def __init__(self, folder, steps, *, fails_at=None, look_every_s=4.0):
        cadence = Cadence(report_every=2, save_every_s=3.0, look_every_s=look_every_s)
        super().__init__(folder, "counting", make_clock(0, steps), cadence)
        self.number, self._fails_at = Number(), fails_at
        self.keep(number=self.number)

    def train_step(self):
        if self.step == self._fails_at:
            raise KeyboardInterrupt
        self.number.value += 1
        self.step += 1
        return {"loss": 1.0 / self.step}

    def look(self):
        return {"seen": self.number.value}


def journal(folder, event):
    lines = [json.loads(line) for line in (folder / "counting.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == event]


def test_a_run_reports_means_and_looks_now_and_at_the_end(tmp_path):
    Counting(tmp_path, 6).run()
    steps = journal(tmp_path, "step")
    assert [line["step"] for line in steps] == [2, 4, 6]
    assert steps[0]["loss"] == pytest.approx((1 + 1 / 2) / 2)
    assert [line["seen"] for line in journal(tmp_path, "look")] == [4, 6]


def test_a_run_that_never_looks_writes_no_looks(tmp_path):
    Counting(tmp_path, 6, look_every_s=0.0).run()
    assert journal(tmp_path, "look") == []


def test_a_stopped_run_goes_on_from_its_last_checkpoint(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        Counting(tmp_path, 10, fails_at=5).run()
    resumed = Counting(tmp_path, 10)
    assert (resumed.step, resumed.number.value) == (3, 3)
    resumed.run()
    assert (resumed.step, resumed.number.value, resumed.clock.fraction) == (10, 10, 1.0)


def test_curves_drop_what_a_resumed_run_did_again(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        Counting(tmp_path, 10, fails_at=5).run()
    Counting(tmp_path, 10).run()
    minutes = [line["minutes"] for line in read_journal(tmp_path / "counting.jsonl")]
    assert minutes == sorted(minutes)
    steps = [line["step"] for line in read_journal(tmp_path / "counting.jsonl")]
    assert steps == sorted(steps)


def test_alignment_begins_anew_once_when_larger_grids_come():
    aligned = Alignment()
    assert [aligned.update(step, sees_large=False) for step in (0, 5)] == [0, 5]
    assert [aligned.update(step, sees_large=True) for step in (8, 9)] == [0, 1]
    again = Alignment()
    again.load_state_dict(aligned.state_dict())
    assert again.update(10, sees_large=True) == 2
