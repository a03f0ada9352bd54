"""The demo's report names every design, and its figures are what the demo promises."""

import sys
from pathlib import Path

from formix.comparison import read_results
from formix.comparison.statistics import summarise

directory = Path(sys.argv[1])
page = (directory / "report.html").read_text()
images = read_results(directory / "demo-images" / "results.json")
text = read_results(directory / "demo-text" / "results.json")

for record in (*images.designs, *text.designs):
    assert record.design in page, f"the report does not name {record.design}"
for row in summarise(images):
    assert row.design == "activator" or row.mean >= 0.93, f"{row.design} reached {row.mean} on digits"
bigram = text.task.baselines["byte bigram"]
for row in summarise(text):
    assert row.refused or row.mean < bigram, f"{row.design} has {row.mean} bits per byte, the bigram model {bigram}"
print(f"The report names all {len(images.designs)} designs; digits and bits per byte are as promised.")
