import re

import numpy as np
import pytest
from fake_run import write_fake_run

from mim.report.record import read_run
from mim.run.comparison import Entry, curves, minutes


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = write_fake_run(tmp_path_factory.mktemp("runs") / "001-mae-photos")
    rows = "".join(f"{step},1,{speed}\n" for step, speed in ((1600, 64.0), (3200, 128.0)))
    (folder / "timing.csv").write_text("step,epoch,images_per_second\n" + rows)
    return folder


def test_minutes_are_those_of_the_steps_at_the_speed_of_their_time(run):
    # 1600 steps of 64 images at 64 images per second, then as many at twice the speed
    assert minutes(read_run(run), np.array([0.0, 800, 1600, 3200])).tolist() == pytest.approx(
        [0, 800 / 60, 1600 / 60, 40]
    )


def test_runs_are_drawn_over_images_and_over_time(run):
    drawn = curves([Entry("mae", [run]), Entry("other", [run]), Entry("untrained", [])])
    titles = [re.findall("<figcaption>(.*?)<small>", chart)[0] for chart in drawn]
    assert titles == [
        f"{kind} over {across}"
        for kind in ("k-NN", "Linear", "RankMe")
        for across in ("images seen", "minutes of training")
    ]
    assert all("<b>mae</b>" in chart and "<b>other</b>" in chart for chart in drawn)
    assert "204" in drawn[0]  # 3200 steps of 64 images


def test_a_run_without_speeds_is_left_out_of_time_alone(run, tmp_path):
    old = write_fake_run(tmp_path / "002-mae-photos")
    titles = [re.findall("<figcaption>(.*?)<small>", chart)[0] for chart in curves([Entry("old", [old])])]
    assert titles == ["k-NN over images seen", "Linear over images seen", "RankMe over images seen"]
