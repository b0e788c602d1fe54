"""What exports were timed at stays with the run, an entry an export, and stands in the report's cost panel."""

from dataclasses import replace
from pathlib import Path

import pytest
from fake_runs import fake_run, finish, story, tell

from moeify.export.speeds import Speed, Speeds
from pipelines.kept_speeds import keep_speed, path_of, read_speeds
from pipelines.report.page import build
from pipelines.runs import RunFolder

ROW = Speed("decode", 1, "python", 1_200.0, 1_800.0, 1.5, 2.0, "bytes")
SPEEDS = Speeds((ROW, replace(ROW, batch=32, export=2_345.0)), "token", "float32", 2, 128)


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    folder = fake_run(tmp_path)
    tell(folder, story())
    finish(folder)
    return folder


def test_what_was_timed_comes_back_and_the_same_export_timed_again_takes_its_place(folder: RunFolder) -> None:
    assert read_speeds(folder) == ()
    keep_speed(folder, "python-only", "dense", SPEEDS)
    keep_speed(folder, "split", "split", SPEEDS)
    keep_speed(folder, "python-only", "dense", replace(SPEEDS, dtype="bfloat16"))
    keep_speed(folder, "python-only", "dense", replace(SPEEDS, rows=(replace(ROW, export=2_400.0),)))
    kept = read_speeds(folder)
    assert [(each.export, each.speeds.dtype) for each in kept] == [
        ("split", "float32"),
        ("python-only", "bfloat16"),
        ("python-only", "float32"),
    ]
    assert [row.export for row in kept[-1].speeds.rows] == [2_400.0]
    assert kept[0].speeds.rows[0].of_limit == ROW.of_limit


def test_the_cost_panel_has_a_row_for_all_that_was_timed(folder: RunFolder) -> None:
    asked = f"moeify export {folder.id} --split --speed"
    assert asked in build(folder)
    keep_speed(folder, "python-only", "dense", SPEEDS)
    keep_speed(folder, "rows-only", "onnx", replace(SPEEDS, unit="row", threads=1, rows=(ROW,)))
    page = build(folder)
    assert asked not in page
    panel = page[page.index('<table class="speeds">') :]
    panel = panel[: panel.index("</table>")]
    assert panel.count("<tr") == 1 + 2 + 1
    assert panel.count("python-only") == 1
    for cell in ("dense, float32, 2 threads", "1,800 tokens/s", "2,345 tokens/s", "1.50", "75.0%"):
        assert f"<td>{cell}</td>" in panel
    assert "<td>onnx, float32, 1 thread</td>" in panel
    assert "<td>1,800 rows/s</td>" in panel


def test_a_damaged_file_costs_the_report_that_part_and_is_not_written_over(folder: RunFolder) -> None:
    path_of(folder).write_text("[{}]")
    page = build(folder)
    assert "speeds.json of" in page
    assert "time exports anew" in page
    with pytest.raises(ValueError, match=r"speeds\.json of .* is damaged \(Field required\); remove it"):
        keep_speed(folder, "split", "split", SPEEDS)
    assert path_of(folder).read_text() == "[{}]"
