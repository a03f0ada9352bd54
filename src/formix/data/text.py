"""Language modelling: Python's standard library, text files and folders; bytes or any transformers tokenizer."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import platform
import re
import sysconfig
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from formix.data.base import SPLIT_WORDS, SPLITS, Batch, BatchDataset, Data, Request, pass_over

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")  # one of them makes a tokenizer
COMPRESSED = re.compile(
    rb"\x1f\x8b\x08|BZh[1-9]1AY&SY|\xfd7zXZ\x00|\x28\xb5\x2f\xfd|PK\x03\x04"
)  # gz, bz2, xz, zst, zip
SUFFIXES = (".txt", ".tokens", ".raw")  # what counts as text in a folder; WikiText uses the last two
ALPHAS = tuple(10.0**e for e in (-3, -2.5, -2, -1.5, -1, -0.5, 0))  # additive smoothing tried on validation
NOT_SOURCES = {"__pycache__", "site-packages", "dist-packages", "test", "tests", "idle_test"}


class WindowDataset(BatchDataset):
    """Language-modelling windows of `sequence_length` targets over one stream of tokens [N].

    Window w reads tokens wT ... wT+T; neighbours share one token, so each token but the first is a target exactly once
    (a rest shorter than a window is left out).
    """

    def __init__(self, tokens: Tensor, sequence_length: int) -> None:
        self.windows = tokens.unfold(0, sequence_length + 1, sequence_length)  # [W, T+1], a view

    def __len__(self) -> int:
        return len(self.windows)

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        windows = self.windows[list(indices)].long()  # [B, T+1]
        return {"input_ids": windows[:, :-1], "labels": windows[:, 1:]}

    @property
    def tokens(self) -> Tensor:
        """The stream [WT+1] that the windows cover: the first token, then every target in order."""
        return torch.cat([self.windows[0, :1], self.windows[:, 1:].flatten()])


def text_data(request: Request, texts: Sequence[bytes], provenance: dict[str, Any]) -> Data:
    """Data from the UTF-8 text of train, validation and test, as bytes or in the tokens of the tokenizer asked for.

    ValueError if a split is shorter than one window, or the tokenizer cannot be used.
    """
    length = request.sequence_length
    tokenizer = None if request.tokenizer is None else load_tokenizer(request.tokenizer)
    identity = None if tokenizer is None else tokenizer_identity(tokenizer)
    if request.limit is not None:
        texts = [texts[0][: _character_start(texts[0], request.limit)], *texts[1:]]
    sets, bytes_per_target = {}, {}
    for split, text in zip(SPLITS, texts, strict=True):
        tokens, end = _byte_tokens(text) if tokenizer is None else _encode(tokenizer, text, name=request.name)
        if len(tokens) <= length:
            raise ValueError(
                f"The {split} part of {request.name!r} has {len(tokens)} tokens, and one window has {length + 1} "
                f"(sequence_length={length} and the token before); give more text or a smaller sequence_length."
            )
        sets[split] = WindowDataset(tokens, length)
        targets = len(sets[split]) * length
        bytes_per_target[split] = (end(targets) - end(0)) / targets  # token 0 is the only one that is no target
    vocab_size = 256 if tokenizer is None else vocabulary_size(tokenizer)
    streams = [sets[split].tokens.numpy().astype(np.int64) for split in SPLITS]
    unigram = smoothed_bits([np.bincount(s[1:], minlength=vocab_size)[None] for s in streams])
    baselines = {}
    if tokenizer is None:
        pairs = [np.bincount(s[:-1] * 256 + s[1:], minlength=256**2).reshape(256, 256) for s in streams]
        baselines["byte bigram"] = smoothed_bits(pairs)
    return Data(
        name=request.name,
        task="causal-lm",
        train=sets["train"],
        validation=sets["validation"],
        test=sets["test"],
        metric="bits_per_byte",
        higher_is_better=False,
        chance=unigram / bytes_per_target["test"],
        vocab_size=vocab_size,
        sequence_length=length,
        tokenizer=tokenizer,
        baselines=baselines,
        bytes_per_target=bytes_per_target,
        provenance={
            **provenance,
            "counts": {split: len(sets[split]) for split in SPLITS},  # windows
            "bytes": {split: len(text) for split, text in zip(SPLITS, texts, strict=True)},
            "tokens": "bytes" if tokenizer is None else f"the tokenizer {request.tokenizer}",
            "sha256": content_hash(b"".join(texts), identity),
        },
    )


def smoothed_bits(counts: Sequence[np.ndarray]) -> float:
    """Bits per target on test of p(b|a) = (n_ab + alpha) / (n_a + alpha V), n counted on train, alpha by validation.

    `counts` are [contexts, V] of how often target b follows context a in train, validation and test.
    """
    train, validation, test = counts
    totals, vocab_size = train.sum(1), train.shape[1]

    def bits(on: np.ndarray, alpha: float) -> float:
        context, target = on.nonzero()
        p = (train[context, target] + alpha) / (totals[context] + alpha * vocab_size)
        return float(-(on[context, target] * np.log2(p)).sum() / on.sum())

    return bits(test, min(ALPHAS, key=lambda alpha: bits(validation, alpha)))


def load_stdlib(request: Request) -> Data:
    """The running Python's own sources, without its tests; whole files go to a split by a hash of their path."""
    validation, test = request.fractions()
    root = Path(sysconfig.get_paths()["stdlib"])
    parts: dict[str, list[bytes]] = {split: [] for split in SPLITS}
    for path in _sources(root):
        name = path.relative_to(root).as_posix()
        place = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4]) / 2**32  # in [0, 1)
        split = "test" if place < test else "validation" if place < test + validation else "train"
        parts[split].append(path.read_bytes())
    provenance = {
        "source": f"standard library of Python {platform.python_version()}",
        "licence": "PSF License",
        "files": {split: len(parts[split]) for split in SPLITS},
        "preprocessing": "*.py without tests, whole files to a split by the SHA-256 of their path, joined in order",
    }
    return text_data(request, [b"".join(parts[split]) for split in SPLITS], provenance)


def _sources(root: Path) -> list[Path]:
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in NOT_SOURCES]  # os.walk goes into those that stay
        found += [Path(folder, name) for name in names if name.endswith(".py")]
    return sorted(path for path in found if not path.name.startswith("_sysconfigdata"))  # that one is generated


def load_text(request: Request) -> Data:
    """`text:PATH`, a file, a folder of text files, or several files with commas between.

    Files whose names say train and test (and valid, else held out of train) keep these splits, and of train and valid
    alone the latter is the test split; files beside them whose names say none, or several, are passed over with a
    warning. Other text is joined and divided into contiguous parts, train first. ValueError for a path that does not
    exist or holds no text.
    """
    files = text_files(request.argument)
    named = _named_splits(files)
    if named is None:
        texts, how = divide_text(request, {"train": _read(files)})
    else:
        texts, how = divide_text(request, {split: _read(named[split]) for split in SPLITS if named[split]})
        how = f"splits by the names of the files; {how}"
        read = [path for split in SPLITS for path in named[split]]
        pass_over(request.argument, [path for path in files if path not in read], "files whose names say no one split")
        files = read
    provenance = {"source": [str(path) for path in files], "licence": "the user's own files", "preprocessing": how}
    return text_data(request, texts, provenance)


def divide_text(request: Request, given: dict[str, bytes]) -> tuple[list[bytes], str]:
    """Text of train, validation and test, those not `given` cut off the end of train, and how in words."""
    validation, test = request.fractions()
    train, cuts = given["train"], dict(given)
    how: list[str] = []
    for split, fraction in (("test", test), ("validation", validation)):
        if split not in given:
            kept = _character_start(train, len(train) - int(len(given["train"]) * fraction))
            train, cuts[split] = train[:kept], train[kept:]
            how.append(f"{split} is the last {fraction:g} of " + ("the text" if not how else "it before that"))
    return [train, cuts["validation"], cuts["test"]], "; ".join(how) or "all three given"


def text_files(argument: str) -> list[Path]:
    """The files that `text:ARGUMENT` names; of a folder, those that end in one of SUFFIXES, at any depth, sorted.

    ValueError for a path that does not exist, a folder without text, or a file that is compressed or named twice.
    """
    whole = Path(argument)
    files: list[Path] = []
    for path in [whole] if whole.exists() else [Path(part) for part in argument.split(",")]:
        if not path.exists():
            raise ValueError(f"{str(path)!r} does not exist; give a text file, several with commas, or a folder.")
        files += sorted(f for f in path.rglob("*") if f.suffix in SUFFIXES and f.is_file()) if path.is_dir() else [path]
    if not files:
        raise ValueError(f"{argument!r} holds no text: a folder needs files that end in {', '.join(SUFFIXES)}.")
    seen = set()
    for path in files:
        if path.resolve() in seen:
            raise ValueError(
                f"{str(path)!r} is read twice in {argument!r}, so that a model may be tested on what it has "
                "been trained on; name it once."
            )
        seen.add(path.resolve())
        with path.open("rb") as file:
            if COMPRESSED.match(file.read(16)):
                raise ValueError(f"{str(path)!r} is compressed, so that its bytes are no text; unpack it first.")
    return files


def _named_splits(files: Sequence[Path]) -> dict[str, list[Path]] | None:
    """Files per split by the words train, valid, test in their names; None if they do not name train and another one.

    A name with words of several splits says none. Where no file is for test, those for validation are the test split.
    """
    said = {}
    for path in files:
        words = set(re.split(r"[^a-z]+", path.name.lower()))
        said[path] = [split for split in SPLITS if not words.isdisjoint(SPLIT_WORDS[split])]
    named = {split: [path for path in files if said[path] == [split]] for split in SPLITS}
    if not named["test"]:
        named["test"], named["validation"] = named["validation"], []
    return named if named["train"] and named["test"] else None


def _read(files: Sequence[Path]) -> bytes:
    return b"".join(path.read_bytes() for path in files)


def _character_start(text: bytes, position: int) -> int:
    """`position`, moved behind the UTF-8 character that it would divide."""
    while position < len(text) and text[position] & 0xC0 == 0x80:
        position += 1
    return position


def own_tokenizer(directory: Path) -> str | None:
    """The directory, if a tokenizer lies in it: without a vocabulary transformers makes one that knows no word."""
    return str(directory) if any((directory / file).is_file() for file in VOCABULARIES) else None


def load_tokenizer(directory: str) -> PreTrainedTokenizerFast:
    """The fast tokenizer saved in a transformers directory; ValueError if there is none. Never uses the network."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if not Path(directory).is_dir():
        raise ValueError(f"tokenizer={directory!r} is no directory; give one a transformers tokenizer was saved to.")
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except Exception as error:  # transformers raises many kinds for a directory that holds something else
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"tokenizer={directory!r} could not be loaded by transformers ({reason}).") from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ValueError(f"tokenizer={directory!r} has no fast version (tokenizer.json), which the byte counts need.")
    return tokenizer


def vocabulary_size(tokenizer: Any) -> int:
    """How many tokens a model for this tokenizer must know: one more than the largest id."""
    return 1 + max(tokenizer.get_vocab().values())


def tokenizer_identity(tokenizer: PreTrainedTokenizerFast) -> bytes:
    """What decides the ids of its tokens: not the truncation and padding that its last use left in it."""
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    backend = copy.deepcopy(tokenizer.backend_tokenizer)
    backend.no_truncation()
    backend.no_padding()
    return json.dumps([backend.to_str(), special], sort_keys=True).encode()


def content_hash(texts: bytes, tokenizer: bytes | None) -> str:
    """SHA-256 of the texts and, where a directory's tokenizer reads them, of its identity: other ids are other data."""
    digest = hashlib.sha256(texts)
    if tokenizer is not None:
        digest.update(hashlib.sha256(tokenizer).digest())
    return digest.hexdigest()


def _byte_tokens(text: bytes) -> tuple[Tensor, Callable[[int], int]]:
    """Tokens uint8 [N] of `text`, and a function from a token's index to the byte where it ends."""
    return torch.from_numpy(np.frombuffer(text, dtype=np.uint8).copy()), lambda index: index + 1


def _encode(tokenizer: PreTrainedTokenizerFast, text: bytes, *, name: str) -> tuple[Tensor, Callable[[int], int]]:
    """The same with the tokens int32 [N] of a tokenizer, which reads 64 KiB and the rest of the line at a time."""
    try:
        decoded = text.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{name!r} is not UTF-8 text ({error}); a tokenizer needs that, bytes do not.") from error
    chunks, start = [], 0
    while start < len(decoded):
        stop = decoded.find("\n", start + 2**16) + 1 or len(decoded)
        chunks.append(decoded[start:stop])
        start = stop
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    encodings = backend.encode_batch(chunks, add_special_tokens=False)
    tokens = torch.cat([torch.tensor(e.ids, dtype=torch.int32) for e in encodings]) if chunks else torch.empty(0)
    token_ends = np.cumsum([len(e.ids) for e in encodings])

    def end(index: int) -> int:
        chunk = int(np.searchsorted(token_ends, index, side="right"))
        inside = index - int(token_ends[chunk - 1]) if chunk else index
        characters = encodings[chunk].offsets[inside][1]
        return sum(len(c.encode()) for c in chunks[:chunk]) + len(chunks[chunk][:characters].encode())

    return tokens, end
