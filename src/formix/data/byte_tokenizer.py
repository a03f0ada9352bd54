"""The tokenizer of models that read bytes: text becomes its UTF-8 bytes, and the ids are the bytes themselves."""

from __future__ import annotations

from typing import TYPE_CHECKING

from formix.data.masking import BYTE_MASK, BYTE_PAD

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def byte_tokenizer(*, masked: bool = False) -> PreTrainedTokenizerFast:
    """A tokenizer of transformers' with the ids that formix's data give where no tokenizer is named.

    Args:
        masked: with [MASK] and [PAD] behind the 256 bytes, as masked language models have them.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    tokenizer = Tokenizer(models.BPE(vocab={symbol: byte for byte, symbol in bytes_to_unicode().items()}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    if masked:
        tokenizer.add_special_tokens(["[MASK]", "[PAD]"])
        assert (tokenizer.token_to_id("[MASK]"), tokenizer.token_to_id("[PAD]")) == (BYTE_MASK, BYTE_PAD)
    special = {"mask_token": "[MASK]", "pad_token": "[PAD]"} if masked else {}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **special)
