"""Data that a model cannot read."""

import dataclasses

import pytest

import formix
from formix.cli import main
from formix.conversion.pipeline import Recovery, load_recovery_data
from formix.data import SOURCES, Data, Request, load_data
from formix.data.byte_tokenizer import byte_tokenizer


@pytest.mark.parametrize("kind", ["text", "images"])
def test_what_the_hub_s_data_are_is_seen_when_they_are_loaded(kind, tmp_path, monkeypatch, capsys):
    """Their name does not say whether they are images or text."""

    def load(request: Request) -> Data:
        given = {"limit": 2000, "sequence_length": 16} if kind == "images" else {}
        return dataclasses.replace(load_data("stdlib" if kind == "images" else "digits", **given), name=request.name)

    monkeypatch.setitem(SOURCES, "hf:NAME", (load, ""))
    if kind == "text":
        model = formix.create_model("gpt2-nano", vocab_size=256, n_layer=1, n_embd=16, n_head=2)
        byte_tokenizer().save_pretrained(tmp_path)
    else:
        model = formix.create_model(
            "vit_tiny_patch16_224", img_size=16, patch_size=4, embed_dim=16, depth=1, num_heads=2
        )
    formix.save(model, tmp_path)
    for verb in ("analyze", "eval"):
        assert main([verb, str(tmp_path), "--data=hf:some/name"]) == 2
        assert f"reads {kind}, which 'hf:some/name' is not" in capsys.readouterr().err
    with pytest.raises(ValueError, match=f"The model reads {kind}, which 'hf:some/name' is not"):
        load_recovery_data(model, Recovery(data="hf:some/name"), tmp_path)
