"""The table over records of conversions says what the records say."""

import json
import shutil
from pathlib import Path

from formix.conversion.summary import page

RECORDS = Path(__file__).resolve().parents[2] / "docs" / "results" / "conversion"


def test_the_table_in_the_repository_is_that_of_its_records():
    assert (RECORDS / "README.md").read_text() == page(RECORDS), "run `make readme`"


def test_another_figure_in_a_record_is_another_table(tmp_path):
    place = shutil.copytree(RECORDS, tmp_path / "records")
    record = json.loads((place / "dinov2-sima.json").read_text())
    stage = [s["stage"] for s in record["stages"] if s["trained"]][-1]
    source, name = record["metrics"]["source"], "probe tiny_imagenet20"
    source[name], record["metrics"][stage][name] = 0.75, 0.5
    (place / "dinov2-sima.json").write_text(json.dumps(record))
    (row,) = [line for line in page(place).splitlines() if line.startswith(f"| dinov2 | sima | {name} |")]
    assert row.startswith(f"| dinov2 | sima | {name} | 0.7500 |")
    assert "| 0.5000 | -0.2500 |" in row
    assert page(place) != page(RECORDS)
