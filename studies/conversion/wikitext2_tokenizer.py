"""A byte-level BPE tokenizer of 4,096 tokens, trained on WikiText-2's training split; the same every time.

    python studies/conversion/wikitext2_tokenizer.py wikitext-2/wiki.train.tokens runs/wikitext2-tokenizer

The directory is a transformers tokenizer, for `--tokenizer`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tokenizers import ByteLevelBPETokenizer
from transformers import PreTrainedTokenizerFast

VOCAB_SIZE = 4096
END_OF_TEXT = "<|endoftext|>"  # GPT-2's


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path, help="the training split")
    parser.add_argument("out", type=Path, help="the directory to write")
    arguments = parser.parse_args()
    if not arguments.text.is_file():
        sys.exit(f"{arguments.text} does not exist; give WikiText-2's wiki.train.tokens.")
    trainer = ByteLevelBPETokenizer()
    trainer.train([str(arguments.text)], vocab_size=VOCAB_SIZE, special_tokens=[END_OF_TEXT], show_progress=False)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=trainer._tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, unk_token=END_OF_TEXT
    )
    tokenizer.save_pretrained(arguments.out)
    text = arguments.text.read_text(encoding="utf-8")
    tokens = len(trainer.encode(text).ids)
    print(f"{arguments.out}: {len(tokenizer)} tokens; {tokens:,} for {len(text.encode()):,} bytes of training text")


if __name__ == "__main__":
    main()
