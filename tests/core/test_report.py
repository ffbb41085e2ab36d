"""The report: one file without external resources that a browser shows without an error."""

from __future__ import annotations

import base64
import io
import json
import math
import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from medrl.core.errors import ConfigError, DataError
from medrl.core.evaluation import Evaluation, compare_rows, with_intervals
from medrl.core.metrics import OVERALL
from medrl.core.report import (
    Section,
    build_report,
    case_table,
    curves,
    dot_plot,
    gallery,
    overall_score,
    overlay_panel,
    render_page,
    result_table,
    write_page,
)
from medrl.core.report.curves import chart_of, nice_ticks
from medrl.core.report.pictures import _figure
from medrl.core.runlog import RunFolder

CHROMIUM = next((found for name in ("chromium", "chromium-browser") if (found := shutil.which(name))), None)
BAD = "<script>alert('x')</script>&\"'"


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    run = RunFolder.create(
        tmp_path / "2026-11-21_toy_fold0_a1b2",
        config_yaml=f"method: toy  # {BAD}\n",
        command=["medrl", "train", BAD],
        manifest={"method": "toy", "seed": 1, "versions": {"torch": "2.13.0"}},
    )
    for step in range(1, 61):
        run.metrics(step, loss=1 / step, lr=1e-4, weight_0=0.4, weight_1=0.6, broken=math.nan)
        if step % 20 == 0:
            run.metrics(step, val_dice=step / 100, val_loss=2 / step)
    run.event(7, "skipped_step", cases=[BAD])
    run.note(step=60, best={"name": "val_dice", "metric": 0.6, "step": 60})
    run.close("finished")
    (run.dir / "val").mkdir()
    (run.dir / "val" / "summary.json").write_text(json.dumps({"step": 60, "pooled": {"liver": 0.75}}))
    return run.dir


def evaluation(cases: int = 6) -> Evaluation:
    rng = np.random.default_rng(0)
    rows = [
        {
            "case": f"case{number}",
            "patient": f"case{number}",
            "label": label,
            "dice": float(rng.uniform(0.5, 1)),
            "hd95": float(rng.uniform(1, 9)),
            "ref_ml": 4.0,
            "pred_ml": 5.0,
        }
        for number in range(cases)
        for label in ("liver", BAD)
    ]
    rows[0] |= {"dice": math.nan, "hd95": math.nan}
    rows[2] |= {"dice": 0.0, "hd95": math.inf}
    metrics = ("dice", "hd95")
    return Evaluation(
        labels={"liver": 1, BAD: 2},
        metrics=metrics,
        rows=rows,
        summary=with_intervals(rows, metrics, resamples=200, seed=0, level=0.95),
        comparison=compare_rows(rows, rows, metrics, resamples=100),
        problems={"case9": f"damaged {BAD}"},
    )


def panel(**changes) -> str:
    image = np.random.default_rng(0).normal(size=(20, 16, 6)).astype(np.float32)
    reference = np.zeros((20, 16, 6), np.uint8)
    reference[5:12, 4:10, 2:5] = 1
    values = {
        "labels": {"reference": reference, "prediction": np.roll(reference, 2, axis=0) * 2},
        "title": f"case {BAD}",
        "affine": np.diag([0.5, 0.5, 3.0, 1.0]),
        "names": {"liver": 1, BAD: 2},
        "difference": ("reference", "prediction"),
    }
    return overlay_panel(image, **(values | changes))


def panel_data(html: str) -> dict:
    return json.loads(re.search(r'<script type="application/json">(.*?)</script>', html, re.S).group(1))


def sheet(data: dict, number: int) -> np.ndarray:
    content = base64.b64decode(data["sheets"][number].partition(",")[2])
    return np.asarray(Image.open(io.BytesIO(content)))


def tile(data: dict, number: int, k: int) -> np.ndarray:
    top, left = k // data["columns"] * data["rise"], k % data["columns"] * data["pitch"]
    return sheet(data, number)[top : top + data["h"], left : left + data["w"]]


# -- the page ---------------------------------------------------------------------------------------------


def test_report_is_one_file_that_names_no_external_resource(run_dir):
    path = build_report(run_dir, evaluation=evaluation(), extra_sections=[Section("Look", panel())])
    html = path.read_text()
    assert path == run_dir / "report.html"
    for match in re.finditer(r"""(?:src|href)\s*=\s*["']([^"']*)""", html):
        assert match.group(1).startswith(("data:", "#")), match.group(0)
    assert "http://" not in html
    assert "https://" not in html
    assert "@import" not in html
    assert "url(" not in re.sub(r"url\(#clip\d+\)", "", html)
    assert "default-src 'none'" in html


def test_report_tells_status_curves_scores_problems_and_how_to_repeat(run_dir):
    html = build_report(run_dir, evaluation=evaluation()).read_text()
    for text in (
        "The run is finished.",
        "val_dice 0.6 at step 60",
        "How training went",
        "Validation during training",
        "0.75",
        "How good the segmentations are",
        "1 case could not be evaluated",
        "Compared with another method",
        "Case by case",
        "skipped_step",
        "config.yaml",
        "2.13.0",
    ):
        assert text in html


def test_text_of_others_is_shown_and_never_run(run_dir):
    html = build_report(
        run_dir,
        evaluation=evaluation(),
        extra_sections=[Section(BAD, result_table([BAD], [(BAD, BAD, [1.0])])), Section("Look", panel())],
    ).read_text()
    assert "<script>alert" not in html
    assert "&lt;script&gt;alert" in html


def test_report_of_a_run_that_has_just_begun_is_written_too(tmp_path):
    RunFolder.create(tmp_path / "run", config_yaml="method: toy\n", command=["medrl"]).close("failed")
    html = build_report(tmp_path / "run").read_text()
    assert "The run failed" in html
    assert "How training went" not in html


def test_an_evaluation_in_the_run_folder_is_found(run_dir):
    assert "Case by case" not in build_report(run_dir).read_text()
    evaluation().write(run_dir)
    assert "Case by case" in build_report(run_dir).read_text()


def test_pictures_that_the_method_drew_are_in_the_page(run_dir):
    from PIL import Image

    (run_dir / "drawn").mkdir()
    Image.new("RGB", (4, 3), (10, 20, 30)).save(run_dir / "drawn" / "case.png")
    (run_dir / "drawn" / "note.png").write_text("no picture")
    Image.new("RGB", (4, 3)).save(run_dir.parent / "outside.png")
    entries = [
        {"title": "case <one>", "path": "drawn/case.png", "caption": "epoch 3"},
        {"title": "gone case", "path": "drawn/gone.png"},
        {"title": "torn case", "path": "drawn/note.png"},
        {"title": "foreign case", "path": "../outside.png"},
        "no entry",
    ]
    (run_dir / "pictures.json").write_text(json.dumps(entries))
    text = build_report(run_dir).read_text()
    assert text.count("data:image/png;base64,") == 1
    assert "case &lt;one&gt;" in text
    assert "epoch 3" in text
    assert not any(word in text for word in ("gone case", "torn case", "foreign case"))
    (run_dir / "pictures.json").write_text("{")
    assert "data:image/png" not in build_report(run_dir).read_text()


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="no run"):
        build_report(tmp_path)


def test_a_page_needs_no_run_folder(tmp_path):
    path = write_page(tmp_path / "x" / "demo.html", "Demo", [Section("A", "<p>b</p>", "c")], facts={"d": 1})
    assert path.read_text().count("<section") == 1


# -- curves -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "chart"),
    [
        ("loss", "loss"),
        ("val_loss", "loss"),
        ("train/loss", "loss"),
        ("weight_0", "weight"),
        ("teacher/weight", "teacher"),
        ("val_dice", "dice"),
        ("hd95", "hd"),
    ],
)
def test_related_numbers_share_a_chart(key, chart):
    assert chart_of(key) == chart


def test_curves_hold_every_finite_number_and_leave_out_the_rest():
    records = [
        {"step": k, "loss": 1.0 / k, "dice": k / 9, "dice_liver": 0.5, "name": "x"} for k in range(1, 9)
    ]
    records += [{"step": 9, "loss": None}, {"step": 9, "event": "skip", "loss": 5.0}, {"loss": 3.0}]
    html = curves(records)
    charts = [json.loads(text.replace("&quot;", '"')) for text in re.findall(r'data-chart="(.*?)"', html)]
    found = {series["name"]: series for data in charts for series in data["series"]}
    assert set(found) == {"loss", "dice", "dice_liver"}
    assert len(charts) == 2
    assert found["loss"]["x"] == list(range(1, 9))
    assert found["loss"]["y"] == pytest.approx([1.0 / k for k in range(1, 9)], rel=1e-5)
    assert {s["name"] for d in charts for s in d["series"] if d is not charts[0]} == {"loss"}


def test_curves_choose_keys_and_are_empty_without_numbers():
    records = [{"step": k, "a": 1.0, "b": 2.0} for k in range(3)]
    assert "b" not in re.findall(r"<b>(.*?)</b>", curves(records, ["a"]))
    assert curves([]) == curves([{"step": 1, "a": 1.0}]) == ""


def test_a_long_curve_is_thinned_out_and_keeps_its_mean():
    values = np.random.default_rng(0).normal(size=6000)
    html = curves([{"step": k, "loss": float(v)} for k, v in enumerate(values)])
    (series,) = json.loads(re.search(r'data-chart="(.*?)"', html).group(1).replace("&quot;", '"'))["series"]
    assert len(series["x"]) == 300
    assert np.mean(series["y"]) == pytest.approx(values.mean(), abs=1e-6)


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (0.013, 0.017), (-3.0, 8000.0), (5.0, 5.0)])
def test_ticks_are_few_rising_and_enclose_the_range(low, high):
    ticks = nice_ticks(low, high)
    assert ticks == sorted(set(ticks))
    assert 2 <= len(ticks) <= 7
    assert ticks[0] <= low
    assert high <= ticks[-1]


# -- tables -----------------------------------------------------------------------------------------------


def test_case_table_holds_every_row_and_marks_what_is_not_a_number():
    found = evaluation()
    html = case_table(found.rows, found.metrics)
    assert html.count("<tr data-label=") == 12
    assert 'data-v="" title="neither side' in html
    assert 'data-v="Infinity" title="only one side' in html
    assert 'data-v="4">4.000<' in html


def test_result_table_sets_the_method_in_bold():
    html = result_table(["Dice"], [("ensemble", "baseline", [0.8]), ("ours", "method", [0.83])])
    assert re.search(r"<tr class=method><td[^>]*>ours", html)
    assert html.count("class=method") == 1


def test_dot_plot_has_a_dot_for_each_finite_value():
    found = evaluation()
    assert dot_plot(found, "hd95").count("<circle") == 10
    assert dot_plot(found, "dice").count("<circle") == 11


def test_overall_score_is_the_mean_of_the_summary():
    found = evaluation()
    assert overall_score(found, "dice") == found.summary[OVERALL]["dice"].mean
    with pytest.raises(ConfigError, match="nsd"):
        overall_score(found, "nsd")


# -- panels -----------------------------------------------------------------------------------------------


def test_panel_turns_slices_as_radiologists_look_at_them():
    labels = np.zeros((6, 5, 3), np.uint8)
    labels[5, 4, 1] = 7  # the patient's right, front
    data = panel_data(overlay_panel(labels.astype(float), {"a": labels}, affine=np.diag([1.0, 1, 4, 1])))
    assert (data["w"], data["h"], data["n"]) == (6, 5, 3)
    found = tile(data, data["views"][1]["labels"], 1)
    assert found[0, 0] == 7  # top left: front, the patient's right
    assert found.sum() == 7
    assert data["voxels"] == [0, 1, 0]


def test_panel_shows_the_same_anatomy_whatever_the_order_of_voxels():
    labels = np.random.default_rng(0).integers(0, 3, (6, 5, 4)).astype(np.uint8)
    affine = np.diag([1.0, 1.0, 3.0, 1.0])
    turn = np.array([[0, -1.0, 0, 5], [1.0, 0, 0, 0], [0, 0, 1.0, 0], [0, 0, 0, 1.0]])
    data = panel_data(overlay_panel(labels.astype(float), {"a": labels}, affine=affine))
    # First axis of `other` is the second of `labels`; its second axis is the first, from the other end.
    other = labels.transpose(1, 0, 2)[:, ::-1]
    again = panel_data(overlay_panel(other.astype(float), {"a": other}, affine=affine @ turn))
    for k in range(4):
        assert np.array_equal(tile(data, 1, k), tile(again, 1, k))


def test_panel_scrolls_along_the_thickest_slices_and_keeps_proportions():
    image = np.zeros((4, 30, 20))
    html = overlay_panel(image, spacing=(5.0, 1.0, 2.0))
    assert panel_data(html)["n"] == 4
    width, height = map(int, re.search(r'<canvas width="(\d+)" height="(\d+)" role', html).groups())
    assert width / height == pytest.approx(30 * 1.0 / (20 * 2.0), rel=0.01)


def test_panel_of_many_slices_shows_those_with_labels():
    labels = np.zeros((8, 8, 200), np.uint8)
    labels[3:5, 3:5, 120:130] = 1
    data = panel_data(overlay_panel(labels.astype(float), {"a": labels}, axis=2))
    assert data["numbers"] == list(range(118, 134))
    assert data["total"] == 200


def test_panel_of_a_large_slice_is_thinned_out():
    data = panel_data(overlay_panel(np.random.default_rng(0).normal(size=(600, 300, 2)), axis=2))
    assert (data["w"], data["h"]) == (200, 150)


def test_panel_refuses_maps_that_do_not_fit():
    with pytest.raises(DataError, match="one shape"):
        overlay_panel(np.zeros((4, 4, 4)), {"a": np.zeros((4, 4, 5), np.uint8)})
    with pytest.raises(DataError, match="reference"):
        panel(difference=("reference", "nothing"))


def test_gallery_offers_each_case():
    html = gallery({"a": panel(), "b": panel()})
    assert html.count("<option>") == 2
    assert gallery({"a": "x"}) == "x"


# -- in a browser -----------------------------------------------------------------------------------------

PROBE = """
<script>
addEventListener("error", event => console.error("uncaught: " + event.message));
const wait = () => document.documentElement.dataset.ready ? probe() : setTimeout(wait, 20);
function probe() {
  const scratch = document.createElement("canvas");
  const pen = scratch.getContext("2d", {willReadFrequently: true});
  const found = {}, pixels = canvas => {
    scratch.width = canvas.width; scratch.height = canvas.height; pen.drawImage(canvas, 0, 0);
    const data = pen.getImageData(0, 0, canvas.width, canvas.height).data;
    let sum = 0; for (let i = 0; i < data.length; i++) sum = (sum * 31 + data[i]) % 1000000007; return sum;
  };
  const root = document.querySelector(".panel"), slider = root.querySelector("input.slices");
  const views = Array.from(root.querySelectorAll(".frame canvas"));
  const first = views.map(pixels);
  slider.value = 1; slider.dispatchEvent(new Event("input"));
  found.scrolled = views.map(pixels).every((sum, at) => sum !== first[at]);
  found.slice = root.querySelector("output").textContent;
  slider.value = 4; slider.dispatchEvent(new Event("input"));
  const style = root.querySelector("select.style"), by = {};
  for (const name of ["outline", "fill", "none"]) {
    style.value = name; style.dispatchEvent(new Event("change")); by[name] = pixels(views[1]);
  }
  found.styles = new Set(Object.values(by)).size;
  found.plain = by.none === pixels(views[0]);
  const table = document.querySelector("table.sortable"), head = table.tHead.rows[0].cells[2];
  const column = () => Array.from(table.tBodies[0].rows).map(row => row.cells[2].dataset.v);
  head.click(); found.up = column(); head.click(); found.down = column();
  const filter = document.querySelector("select[data-for]");
  filter.value = "liver"; filter.dispatchEvent(new Event("change"));
  found.shown = Array.from(table.tBodies[0].rows).filter(row => !row.hidden).length;
  const gallery = document.querySelector("select.cases");
  const items = document.querySelectorAll(".gallery .panel");
  gallery.selectedIndex = 1; gallery.dispatchEvent(new Event("change"));
  found.gallery = Array.from(items).map(item => item.hidden);
  const svg = document.querySelector(".chart svg"), box = svg.getBoundingClientRect();
  svg.dispatchEvent(new MouseEvent("mousemove", {clientX: box.left + box.width / 2, clientY: box.top + 40}));
  found.tip = document.querySelector(".chart .tip").textContent;
  const answer = document.createElement("pre");
  answer.id = "probe"; answer.textContent = JSON.stringify(found); document.body.append(answer);
}
wait();
</script>
"""


def browse(path: Path, folder: Path) -> tuple[str, list[str]]:
    """Open a page in headless Chromium; return the page after its scripts and what the console says."""
    done = subprocess.run(
        [
            str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
            f"--user-data-dir={folder}", "--virtual-time-budget=8000", "--enable-logging=stderr",
            "--dump-dom", path.as_uri(),
        ],
        capture_output=True, text=True, timeout=240, check=False, env={**os.environ, "HOME": str(folder)},
    )  # fmt: skip
    if done.returncode != 0 or not done.stdout:
        raise RuntimeError(f"Chromium could not open the page: {done.stderr[-800:]}")
    return done.stdout, re.findall(r"CONSOLE[^\]]*\] (.*)", done.stderr)


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine (Debian: apt install chromium)")
def test_a_browser_shows_the_report_without_a_console_error_and_answers_the_mouse(run_dir, tmp_path):
    look = Section("Look", gallery({"a": panel(), "b": panel(title="second")}))
    buffer = io.BytesIO()
    Image.new("L", (4, 4)).save(buffer, "PNG")
    still = Section("Still", _figure(buffer.getvalue(), "a picture that does not move", ""))
    path = build_report(run_dir, evaluation=evaluation(), extra_sections=[look, still])
    page = tmp_path / "probed.html"
    page.write_text(path.read_text().replace("</body>", PROBE + "</body>"))
    dom, console = browse(page, tmp_path / "profile")
    assert console == []
    assert 'data-ready="1"' in dom.partition("<head")[0]
    found = json.loads(re.search(r'<pre id="probe">(.*?)</pre>', dom, re.S).group(1))
    assert found["scrolled"]
    assert found["slice"] == "slice 1 of 6"
    assert found["styles"] == 3
    assert found["plain"]
    up = [float(value) for value in found["up"] if value]
    assert up == sorted(up)
    assert len(up) == 11
    assert found["up"][-1] == found["down"][-1] == ""
    assert [float(value) for value in found["down"] if value] == up[::-1]
    assert found["shown"] == 6
    assert found["gallery"] == [True, False]
    assert re.match(r"step \d+val_dice: 0\.\d", found["tip"])


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine (Debian: apt install chromium)")
def test_the_browser_test_would_see_an_error(tmp_path):
    page = tmp_path / "broken.html"
    page.write_text(
        render_page("x", [Section("a", "")]).replace("</body>", "<script>nothing()</script></body>")
    )
    _, console = browse(page, tmp_path / "profile")
    assert any("nothing is not defined" in line for line in console)


def test_stages_and_the_table_of_the_test_are_shown(run_dir):
    stage = run_dir / "stages" / "01_source"
    stage.mkdir(parents=True)
    lines = [json.dumps({"step": step, "loss": 1.0 / step}) for step in range(1, 9)]
    (stage / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    content = {"final": "iteration_1", "summary": {"source": {"dice": 0.5}, "iteration_1": {"dice": 0.75}}}
    (run_dir / "test.json").write_text(json.dumps(content))
    page = build_report(run_dir).read_text()
    assert "On the test images" in page
    assert "The result of this run is iteration_1." in page
    assert "<td>0.5</td>" in page
    assert "Stage by stage" in page
    assert "01_source" in page
    (run_dir / "test.json").write_text("{")
    assert "On the test images" not in build_report(run_dir).read_text()
