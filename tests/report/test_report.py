import json
import re
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest
from fake_run import SUMMARY, write_fake_run, write_metrics
from PIL import Image

from mim.report import write_report
from mim.report.advice import advice
from mim.report.charts import POINTS, chart, nice_ticks, thin
from mim.report.markup import Html, duration, number, tag
from mim.report.record import read_run
from mim.report.style import STYLE

VOID = {"meta", "img", "input"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return write_fake_run(tmp_path_factory.mktemp("runs") / "001-mae-photos")


@pytest.fixture
def run(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / finished.name)


def page_of(folder):
    return write_report(folder).read_text()


class Balance(HTMLParser):
    """Remembers what is open, and every attribute that would make the browser fetch something."""

    def __init__(self):
        super().__init__()
        self.open, self.fetched = [], []

    def handle_starttag(self, name, attributes):
        loads = ("src",) if name == "a" else ("src", "href")  # a link is followed by a person, not by the browser
        self.fetched += [value for key, value in attributes if key in loads and not value.startswith("data:")]
        self.open += [] if name in VOID else [name]

    def handle_endtag(self, name):
        assert self.open.pop() == name


def test_the_page_is_whole_and_fetches_nothing(run):
    page, parser = page_of(run), Balance()
    parser.feed(page)
    assert parser.open == []
    assert parser.fetched == []
    assert "<script" not in page
    assert "url(" not in page


def test_the_page_tells_the_story_in_order(run):
    titles = re.findall(r"<h[12]>(.*?)</h[12]>", page_of(run))
    assert titles == [
        "mae on vit_tiny_patch16_224",
        "What it is worth",
        "What it sees",
        "How it went",
        "Semantic segmentation",
        "Model",
        "Data",
        "Settings",
        "Environment",
        "Use it",
    ]


def test_accuracies_stand_beside_those_of_the_untrained_encoder(run):
    page = page_of(run)
    assert '<dd>61.7\u202f%</dd><dd class="note">mean of patch tokens, untrained 34.4\u202f%</dd>' in page
    assert "+27.3 points" in page
    assert page.count("<circle") >= 12  # every seed of two probes, trained and untrained


def test_the_untrained_level_is_dotted_for_accuracies_alone(run):
    assert page_of(run).count('<line x1="46" x2="470"') > 0
    assert len(re.findall(r'<line [^>]*class="untrained"', page_of(run))) == 2


def test_pictures_over_time_leave_out_what_never_changes(run):
    captions = re.findall(r"<figcaption>(\w+)</figcaption>", page_of(run))
    assert captions[:3] == ["reconstruction", "attention", "features"]


def test_changed_settings_stand_beside_their_defaults(run):
    assert '<th scope="row">masking.ratio</th><td><strong>0.6</strong></td><td>0.75</td>' in page_of(run)


def test_signs_of_health_stand_open_under_readable_names(tmp_path):
    (tmp_path / "metrics.csv").write_text("step,epoch,health/class_entropy,train/class\n1,1,0.8,3\n2,2,0.7,2\n")
    page = page_of(tmp_path)
    assert page.index("<h3>Health of the method</h3>") < page.index("Class entropy") < page.index("<details>")
    assert page.index("<details>") < page.index("train/class")


def test_an_empty_folder_gives_a_page(tmp_path):
    assert "<h1>" in page_of(tmp_path)


def test_a_run_that_has_just_begun_shows_its_newest_numbers(tmp_path):
    (tmp_path / "metrics.csv").write_text(
        "step,epoch,train/loss,val/knn_top1\n0,0,,0.1\n5,0,0.93,\n10,0,0.871,\n10,0,,0.25\n11,0,0.8"
    )
    page = page_of(tmp_path)
    assert "<dd>0.8</dd>" in page
    assert "<dd>25.0\u202f%</dd>" in page
    assert ">step</text>" in page  # no whole epoch yet


@pytest.mark.parametrize("name", ["summary.json", "images/epoch_100.png", "evaluation/segmentation/metrics.json"])
def test_a_half_written_file_is_named_and_the_rest_is_shown(run, name):
    whole = (run / name).read_bytes()
    (run / name).write_bytes(whole[: len(whole) // 2])
    page = page_of(run)
    assert "Not shown" in page
    assert f"<li>{name.split('/')[-1]}: " in page
    assert "How it went" in page


def test_foreign_text_is_escaped_wherever_it_comes_from(run):
    evil = "<script>alert('x')</script>\"&"
    (run / "bad_files.txt").write_text(f"{evil}.jpg\n")
    (run / "config.yaml").write_text(f"data: {evil}\n")
    (run / "metrics.csv").write_text(f"step,epoch,{evil}\n1,0,2\n2,1,3\n")
    values = {key: evil if isinstance(value, str) else value for key, value in SUMMARY.items()}
    (run / "summary.json").write_text(json.dumps(values | {"changed": {evil: [evil, evil]}, "versions": {evil: evil}}))
    result = {"title": evil, "protocol": evil, "metrics": {evil: {evil: evil}}}
    (run / "evaluation" / "segmentation" / "metrics.json").write_text(json.dumps(result))
    page = page_of(run)
    assert "<script" not in page
    assert page.count("&lt;script&gt;") >= 12


def test_braces_in_foreign_text_stay(run):
    (run / "config.yaml").write_text("kwargs: {depth: 4}\n")
    assert "kwargs: {depth: 4}" in page_of(run)


def test_pictures_shrink_until_the_page_is_small(run, monkeypatch):
    noise = np.random.default_rng(0).integers(0, 256, (300, 300, 3), dtype=np.uint8)
    for i in range(6):
        Image.fromarray(noise).save(run / "evaluation" / "segmentation" / f"{i}.png", compress_level=1)
    (run / "images" / "epoch_000.png").write_bytes(b"half a file")
    usual = write_report(run).stat().st_size
    monkeypatch.setattr("mim.report.page.PAGE_BYTES", usual - 1)
    path = write_report(run)
    assert path.stat().st_size < usual
    assert path.read_text().count("<li>epoch_000.png") == 1
    assert path.read_text().count("<img") == 11  # 2 blocks of the newest strip, 3 over time, 6 overlays


def test_a_hundred_thousand_steps_make_a_small_page(tmp_path):
    rows = "".join(f"{step},{step // 1000},{1 / (1 + step):.4f}\n" for step in range(100_000))
    (tmp_path / "metrics.csv").write_text("step,epoch,train/loss\n" + rows)
    assert write_report(tmp_path).stat().st_size < 100_000


def test_the_old_page_stays_if_writing_fails(run, monkeypatch):
    before = page_of(run)
    (run / "summary.json").write_text("{}")
    monkeypatch.setattr("os.replace", lambda *paths: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_report(run)
    assert (run / "report.html").read_text() == before


def test_whole_epochs_in_the_file_still_place_steps_between_them(tmp_path):
    write_metrics(tmp_path, steps=400, epochs=10)
    assert read_run(tmp_path).epochs_per_step == pytest.approx(10 / 400)


def test_thinning_keeps_extremes_and_mean():
    values = np.sin(np.arange(100_000.0))
    values[31_337] = 50.0
    thinned = thin(np.stack([np.arange(100_000.0), values], 1))
    assert len(thinned) == POINTS
    assert thinned[:, 3].max() == 50.0
    assert thinned[:, 1].mean() == pytest.approx(values.mean(), abs=1e-9)


def test_two_points_are_two_dots_and_a_line():
    drawn = chart("Loss", {"loss": np.array([[0.0, 1.0], [10.0, 0.5]])}, None)
    assert drawn.count("<circle") == 2
    assert drawn.count("<polyline") == 1


def test_a_value_that_is_not_finite_leaves_a_gap():
    values = np.array([[0, 1.0], [1, 0.9], [2, np.nan], [3, np.inf], [4, 0.7], [5, 0.6]])
    drawn = chart("Loss", {"loss": values}, None)
    lines = [line for line in re.findall(r'<polyline points="([^"]*)"', drawn) if line]
    assert len(lines) == 2
    assert "nan" not in "".join(lines)


def test_a_chart_without_finite_values_is_left_out():
    assert chart("Loss", {"loss": np.array([[0, np.nan]])}, None) == ""


def test_a_constant_line_and_a_single_point_can_be_drawn():
    assert "nan" not in chart("lr", {"lr": np.array([[0, 1e-4], [9, 1e-4]])}, None, from_zero=True)
    assert "nan" not in chart("lr", {"lr": np.array([[0, 0.0]])}, None, from_zero=True)


@pytest.mark.parametrize(("low", "high"), [(0.21, 0.97), (-3, 1e5), (1e-8, 6e-4), (0, 0), (5, 5)])
def test_ticks_are_few_and_enclose_the_values(low, high):
    ticks = nice_ticks(low, high)
    assert ticks[0] <= low
    assert ticks[-1] >= high
    assert 2 <= len(ticks) <= 7


def test_markup_escapes_text_and_attributes_but_not_markup():
    assert tag("b", "<", Html("<i></i>"), title='"') == '<b title="&quot;">&lt;<i></i></b>'


@pytest.mark.parametrize(
    ("seconds", "text"), [(4.2, "4 s"), (72, "1 min 12 s"), (7351, "2 h 2 min"), (200_000, "2 d 7 h")]
)
def test_durations_have_two_units(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.41234, "0.4123"), (21_665_664, "21\u202f665\u202f664"), (float("nan"), "nan"), (True, "True"), ("a", "a")],
)
def test_numbers_are_short(value, text):
    assert number(value) == text


def test_an_evaluation_stands_beside_the_untrained_encoder(run):
    result = {"title": "k-NN", "metrics": {"top-1": [0.5], "top-1, untrained": [0.3, 0.5], "images": 7}}
    (run / "evaluation" / "segmentation" / "metrics.json").write_text(json.dumps(result))
    page = write_report(run).read_text()
    assert '<th scope="row">top-1</th><td>50.0 %</td><td>40.0 ± 14.1 %</td>' in page
    assert '<th scope="row">images</th><td>7</td>' in page


def started(run, trained, start):
    summary = json.loads((run / "summary.json").read_text())
    summary["start"] = "vit_small_patch16_dinov3.lvd1689m"
    summary["probe"]["knn"] |= {"trained": trained, "start": start}
    (run / "summary.json").write_text(json.dumps(summary))
    write_report(run)
    return (run / "report.html").read_text()


def test_a_start_that_was_better_is_said_to_be(tmp_path):
    run = write_fake_run(tmp_path / "run")
    page = started(run, [0.6, 0.6, 0.6], [0.7, 0.7, 0.7])
    assert "The start was better: k-NN by 10.0 points." in page
    assert "-10.0 points" in page
    page = started(run, [0.8, 0.8, 0.8], [0.7, 0.7, 0.7])
    assert "The start was better" not in page
    assert "+10.0 points" in page
    assert "gain over the start" in page


def test_the_headline_table_has_chance_pixels_untrained_best_epoch_and_result_with_spreads(run):
    rows = dict(re.findall(r'<tr><th scope="row">(?:<strong>)?([^<]+)(?:</strong>)?</th><td>(.*?)</td>', page_of(run)))
    assert rows["chance: the commonest class"] == "8.3\u202f%"
    assert rows["raw pixels: 8 x 8 thumbnails"] == "20.9 ± 0.2 %"
    assert rows["untrained"] == "34.4 ± 0.6 %"
    assert rows["best while learning, one split"] == "61.8\u202f%, epoch 100"
    assert rows["pretrained"] == "<strong>61.7 ± 0.8 %</strong>"
    assert rows["gain over untrained"] == "+27.3 points"


def test_every_evaluation_is_a_row_and_the_best_is_bold(run):
    table = page_of(run).partition("Every evaluation")[2].partition("</table>")[0]
    assert table.count("<tr>") == 1 + 5
    assert table.count("<strong>") == 4  # of each kind, at the last of five evaluations
    assert table.index('<th scope="row">before</th>') < table.index('<th scope="row">epoch 25</th>')


def test_model_and_data_are_described_as_they_were_built(run):
    page = page_of(run)
    assert "VisionTransformer, 128 wide, 4 blocks, 4 heads" in page
    assert "RandomMasking(ratio=0.6) hides 38 of 64 patches" in page
    assert '<th scope="row">decoder</th><td>Decoder</td><td>70\u202f000</td><td>70\u202f000</td>' in page
    assert "0 to 255, 249 to 256 different ones in a channel" in page
    assert '<th scope="row">nodata</th><td>12.5\u202f%</td>' in page
    assert 'aria-label="Histogram of the numbers in the files, 3 channels"' in page


def test_the_next_commands_name_the_pool_that_was_measured(run):
    commands = page_of(run).partition("as it was measured here")[2].partition("</pre>")[0]
    assert commands.count("--pool mean") == 2


def measured(folder, name, *values):
    (folder / "metrics.csv").write_text(
        f"step,epoch,{name}\n" + "".join(f"{i},{i},{v}\n" for i, v in enumerate(values))
    )
    return " ".join(advice(read_run(folder)))


@pytest.mark.parametrize(
    ("name", "values", "words"),
    [
        ("val/knn_top1", (0.5, 0.7, 0.6), "k-NN accuracy has fallen since epoch 1"),
        ("val/knn_top1", (0.5, 0.3, 0.4), "k-NN accuracy is below that of the untrained encoder"),
        ("val/linear_top1", (0.5, 0.7, 0.6), "Linear accuracy has fallen"),
        ("val/rankme", (30, 60, 20), "RankMe has fallen from 60 (epoch 1) to 20"),
        ("val/feature_std", (0.5, 0.05), "have collapsed"),
        ("val/knn_top1", (0.5, 0.7, 0.69), ""),
        ("val/knn_top1", (0.5,), ""),
        ("val/knn_top1", (0.5, float("nan")), ""),
        ("val/rankme", (30, 60, 55), ""),
        ("val/feature_std", (0.5, 0.4), ""),
    ],
)
def test_a_sentence_says_what_fell_and_nothing_else(tmp_path, name, values, words):
    said = measured(tmp_path, name, *values)
    assert words in said if words else said == ""


def colours(theme):
    """The custom properties of the page: of the plain rule, of dark screens, of paper."""
    light = dict(re.findall(r"--(\w+): (#\w{6})", STYLE.partition("@media")[0]))
    part = {"light": "", "dark": "prefers-color-scheme: dark", "print": "@media print"}[theme]
    return light | (
        dict(re.findall(r"--(\w+): (#\w{6})", STYLE.partition(part)[2].partition("} }")[0])) if part else {}
    )


def luminance(colour):
    """Relative luminance of ``#rrggbb`` (WCAG 2.2)."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one, other):
    lighter, darker = sorted((luminance(one), luminance(other)), reverse=True)
    return (lighter + 0.05) / (darker + 0.05)


@pytest.mark.parametrize("theme", ["light", "dark", "print"])
def test_text_and_lines_can_be_told_from_the_page(theme):
    of = colours(theme)
    for ground in ("paper", "well"):
        assert contrast(of["ink"], of[ground]) >= 7
        assert contrast(of["soft"], of[ground]) >= 4.5
    for line in ("s1", "s2", "s3", "s4", "s5", "s6", "c1", "c2", "c3"):
        assert contrast(of[line], of["paper"]) >= 4.5  # links and states are text in these colours


def test_what_is_seen_has_words_for_those_who_do_not_see_it(run):
    page = page_of(run)
    assert '<html lang="en">' in page
    assert all(re.search(r' alt="[^"]+"', image) for image in re.findall("<img[^>]*>", page))
    drawings = re.findall("<svg[^>]*>", page)
    assert drawings
    assert all(re.search(r' role="img" aria-label="[^"]+"', drawing) for drawing in drawings)
    assert all('aria-label="' in box for box in re.findall("<input[^>]*>", page))
    assert re.findall(r"<h(\d)", page)[0] == "1"
    assert re.findall(r"<th(?! scope)[ >]", page) == []


@pytest.mark.parametrize(("images", "told"), [(2_000, True), (20_000_000, False)])
def test_a_short_run_says_what_it_can_show_and_a_long_one_does_not(run, images, told):
    summary = json.loads((run / "summary.json").read_text()) | {"images": images, "epochs": 2.0}
    (run / "summary.json").write_text(json.dumps(summary))
    page = write_report(run).read_text()
    assert ("A short run: 4,000 images seen" in page, "A short run" in page) == (told, told)
