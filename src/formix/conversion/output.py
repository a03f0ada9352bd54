"""Where a conversion goes: whose a directory is, what is finished in it, and what is put there."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

from formix.conversion.record import Conversion
from formix.conversion.report import write_report
from formix.data.text import load_tokenizer, own_tokenizer
from formix.models.companions import companions, sentence_modules
from formix.models.recorded import FILE

_log = logging.getLogger("formix")
SEARCH, RECOVERY, REPORT = "search.json", "recovery", "report.html"


class ConversionDirectory:
    """The model with its record, report.html, search.json and, until it is saved, recovery/ with the state of a run.

    Raises:
        ValueError: the source's own directory, or one that holds something else.
    """

    def __init__(self, path: str | Path, source: str | Path) -> None:
        self.path = Path(path)
        self.recovery, self.search = self.path / RECOVERY, self.path / SEARCH
        if not self.path.exists():
            return
        if Path(source).exists() and self.path.samefile(source):
            raise ValueError(f"{self.path} is the source itself; choose another directory with --out.")
        taken = not self.path.is_dir() or any(self.path.iterdir())
        if taken and not any((self.path / name).exists() for name in (FILE, SEARCH, RECOVERY)):
            raise ValueError(f"{self.path} exists and is no conversion of formix's; choose another with --out.")

    def finished(self, request: dict[str, Any]) -> Conversion | None:
        """The record of a finished conversion, if it is this one."""
        if not (self.path / FILE).is_file():
            return None
        try:
            conversion = Conversion.read(self.path)
        except ValueError as error:
            _log.warning("%s This is done now.", error)
            return None
        return conversion if conversion.request == request else None

    def save(self, model: Any) -> None:
        """Write the model in place of an earlier one with all that was beside it, last its record, and only then
        remove what a killed run would go on from."""
        from formix import save

        searched = model.conversion.request.get("search") is not None
        beside = (*companions(self.path), *sentence_modules(self.path))
        for name in (FILE, *beside, REPORT, *(() if searched else (SEARCH,))):
            (self.path / name).unlink(missing_ok=True)
        save(model, self.path)
        shutil.rmtree(self.recovery, ignore_errors=True)

    def complete(self, conversion: Conversion, beside: Path, tokenizer: str | None) -> None:
        """Add the tokenizer or image processor of the source, what makes sentence embeddings of its outputs, and the
        report of a recovery.

        Args:
            beside: the directory that has them.
            tokenizer: the directory of another tokenizer, for a source without one.
        """
        for name in (*companions(beside), *sentence_modules(beside)):
            if not (self.path / name).exists():
                (self.path / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(beside / name, self.path / name)
        if tokenizer is not None and own_tokenizer(self.path) is None:
            load_tokenizer(tokenizer).save_pretrained(self.path)
        if conversion.speed:
            searched = json.loads(self.search.read_text()) if self.search.is_file() else None
            write_report(conversion.to_dict(), self.path / REPORT, search=searched)

    def found(self, request: dict[str, Any]) -> list[int] | None:
        """The layers that a search of the same conversion chose before it was killed."""
        if not (self.recovery.is_dir() and self.search.is_file()):
            return None
        stored = json.loads(self.search.read_text())
        return stored["chosen"] if stored["request"] == request else None
