"""The results file: round trip, atomic writing, and one clear sentence for every broken file."""

import csv
import dataclasses
import json
import math

import pytest

from formix.comparison.results import (
    RunRecord,
    latency_settings,
    read_results,
    read_run,
    write_csv,
    write_results,
    write_run,
)
from formix.records import write_atomically


@pytest.mark.parametrize("name", ["images", "text"])
def test_round_trip(name, request, tmp_path):
    results = request.getfixturevalue(name)
    write_results(results, tmp_path / "results.json")
    assert read_results(tmp_path / "results.json") == results


def test_run_round_trip(images, tmp_path):
    for run in images.runs:
        write_run(run, tmp_path / "run.json")
        assert read_run(tmp_path / "run.json") == run


def test_numbers_that_are_not_finite_become_null(images, tmp_path):
    run = dataclasses.replace(
        images.runs[0],
        validation=math.nan,
        curve=(dataclasses.replace(images.runs[0].curve[0], train_loss=math.inf),),
    )
    assert run.validation is None
    assert run.notes[-1] == f"softmax with seed {run.seed} and learning rate {run.lr:g}: validation came out as nan"
    write_run(run, tmp_path / "run.json")
    assert "NaN" not in (tmp_path / "run.json").read_text()
    assert read_run(tmp_path / "run.json").curve[0].train_loss is None


def test_csv_has_one_row_per_run(images, tmp_path):
    write_csv(images, tmp_path / "results.csv")
    with open(tmp_path / "results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(images.runs)
    first, run = rows[0], images.runs[0]
    assert (first["design"], int(first["seed"]), float(first["lr"])) == (run.design, run.seed, run.lr)
    assert float(first["latency_ms_bfloat16_batch32"]) == run.latency_ms["bfloat16"]["32"]
    assert [row["status"] for row in rows].count("diverged") == 1


def test_latency_settings_are_ordered_and_skip_what_was_not_measured(images):
    runs = tuple(dataclasses.replace(run, latency_ms=run.latency_ms | {"float16": {"1": None}}) for run in images.runs)
    results = dataclasses.replace(images, runs=runs)
    expected = [("float32", "1"), ("float32", "32"), ("bfloat16", "1"), ("bfloat16", "32")]
    assert latency_settings(results) == expected


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    write_atomically(path, "old")
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["results.json"]


def set_at(path, value):
    """An edit that puts `value` at a path of keys."""

    def edit(document):
        target = document
        for key in path[:-1]:
            target = target[key]
        target[path[-1]] = value

    return edit


def drop_at(*path):
    def edit(document):
        for key in path[:-1]:
            document = document[key]
        del document[path[-1]]

    return edit


BROKEN = {
    "other schema": (set_at(["schema"], "formix.results/9"), "schema is 'formix.results/9'"),
    "no schema": (drop_at("schema"), "schema is missing"),
    "missing field": (drop_at("runs", 3, "lr"), "runs[3].lr is missing"),
    "unknown field": (set_at(["runs", 0, "sed"], 1), "runs[0].sed is not a field"),
    "text for a number": (set_at(["runs", 2, "lr"], "fast"), 'runs[2].lr is "fast", expected a finite number'),
    "NaN": (set_at(["runs", 2, "test"], math.nan), "runs[2].test is NaN, expected a finite number"),
    "bool for a number": (set_at(["runs", 2, "seed"], True), "runs[2].seed is true, expected a whole number"),
    "negative seed": (set_at(["runs", 2, "seed"], -1), "runs[2].seed is -1, expected a whole number, 0 or more"),
    "negative rate": (set_at(["runs", 2, "lr"], -0.1), "runs[2].lr is -0.1, expected a positive number"),
    "null where required": (set_at(["task", "metric"], None), "task.metric is null, expected one of 'accuracy'"),
    "unknown metric": (set_at(["task", "metric"], "loss"), 'task.metric is "loss", expected one of'),
    "unhashable metric": (set_at(["task", "metric"], []), "task.metric is [], expected one of"),
    "list for an object": (set_at(["environment"], []), "environment is [], expected an object"),
    "object for a list": (set_at(["runs"], {}), "runs is {}, expected a list"),
    "nested curve": (set_at(["runs", 0, "curve", 1, "step"], 1.5), "runs[0].curve[1].step is 1.5"),
    "latency": (set_at(["runs", 0, "latency_ms", "float32", "1"], "x"), "runs[0].latency_ms.float32.1 is"),
    "batch size": (set_at(["runs", 0, "latency_ms", "float32", "one"], 1.0), "expected batch sizes"),
    "diverged without message": (set_at(["runs", 0, "status"], "diverged"), "runs[0].message is empty"),
    "run of no design": (set_at(["runs", 0, "design"], "mamba"), "runs[0].design is 'mamba'"),
    "run of a refused design": (set_at(["designs", 0, "refused"], "no"), "designs lists as refused"),
    "design twice": (set_at(["designs", 1, "design"], "softmax"), "designs lists 'softmax' twice"),
    "run twice": (lambda d: d["runs"].append(d["runs"][0]), "twice, expected once"),
    "two chosen rates": (set_at(["runs", 0, "selected"], True), "selects two learning rates for 'softmax'"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_field(name, images, tmp_path):
    edit, expected = BROKEN[name]
    path = tmp_path / "results.json"
    write_results(images, path)
    document = json.loads(path.read_text())
    edit(document)
    path.write_text(json.dumps(document))
    with pytest.raises(ValueError, match=r"results\.json") as caught:
        read_results(path)
    message = str(caught.value)
    assert expected in message
    assert str(path) in message
    assert "run formix compare again" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "is not JSON"),
        (b'{"schema": "formix.res', "is not JSON"),
        (b"\xff\xfe\x00", "cannot be read"),
        (b"[]", "the file is [], expected an object"),
        (b"{}", "schema is missing"),
    ],
    ids=["empty", "cut off", "binary", "list", "empty object"],
)
def test_broken_file(content, expected, tmp_path):
    path = tmp_path / "results.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"results\.json") as caught:
        read_results(path)
    assert expected in str(caught.value)


def test_absent_file(tmp_path):
    with pytest.raises(ValueError, match="does not exist; give the path"):
        read_results(tmp_path / "results.json")


def test_records_check_themselves():
    with pytest.raises(ValueError, match="lr is 0"):
        RunRecord(design="relu", seed=0, lr=0.0, status="ok")
