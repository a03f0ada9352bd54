"""PAF: keys, counts, a straight-line layer in float64, and checkpoints in both directions."""

from __future__ import annotations

import json
import logging
import math

import pytest
import torch
from text_families import VOCABULARY, small, tokens
from torch import Tensor, nn
from transformers import AutoModelForMaskedLM, BertConfig, BertForMaskedLM, RobertaConfig, RobertaForMaskedLM

import formix
from formix.models.text import FAMILIES

OFFICIAL_PAF = formix.design("paf", official=True)
FAMILY = pytest.mark.parametrize("family", ["bert", "roberta"])
CONFIG = {
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "pad_token_id": 1,
    "initializer_range": 0.2,
}


def stock(family: str):
    torch.manual_seed(0)
    if family == "bert":
        return BertForMaskedLM(BertConfig(**CONFIG)).eval()
    return RobertaForMaskedLM(RobertaConfig(**CONFIG, type_vocab_size=1, layer_norm_eps=1e-5)).eval()


# --------------------------------------------------------------------------------------------------- keys and counts


def keys_of_layer(prefix: str, dim: int, ffn: int, *, first_norm: bool) -> dict[str, tuple[int, ...]]:
    keys: dict[str, tuple[int, ...]] = {}
    for name, rows, columns in (
        ("attention.self.query", dim, dim),
        ("attention.self.key", dim, dim),
        ("attention.self.value", dim, dim),
        ("attention.output.dense", dim, dim),
        ("intermediate.dense", ffn, dim),
        ("output.dense", dim, ffn),
    ):
        keys |= {f"{prefix}{name}.weight": (rows, columns), f"{prefix}{name}.bias": (rows,)}
    for name in ("attention.output.LayerNorm", "output.LayerNorm")[0 if first_norm else 1 :]:
        keys |= {f"{prefix}{name}.weight": (dim,), f"{prefix}{name}.bias": (dim,)}
    return keys


def keys_of_masked_lm(
    family: str, *, dim: int, ffn: int, depth: int, vocabulary: int, positions: int, types: int, first_norm: bool
) -> dict[str, tuple[int, ...]]:
    embeddings = f"{family}.embeddings."
    keys: dict[str, tuple[int, ...]] = {
        f"{embeddings}word_embeddings.weight": (vocabulary, dim),
        f"{embeddings}position_embeddings.weight": (positions, dim),
        f"{embeddings}token_type_embeddings.weight": (types, dim),
        f"{embeddings}LayerNorm.weight": (dim,),
        f"{embeddings}LayerNorm.bias": (dim,),
    }
    for i in range(depth):
        keys |= keys_of_layer(f"{family}.encoder.layer.{i}.", dim, ffn, first_norm=first_norm)
    if family == "roberta":
        dense, norm, decoder, bias = "lm_head.dense", "lm_head.layer_norm", "lm_head.decoder", "lm_head.bias"
    else:
        dense, norm = "cls.predictions.transform.dense", "cls.predictions.transform.LayerNorm"
        decoder, bias = "cls.predictions.decoder", "cls.predictions.bias"
    return keys | {
        f"{dense}.weight": (dim, dim),
        f"{dense}.bias": (dim,),
        f"{norm}.weight": (dim,),
        f"{norm}.bias": (dim,),
        f"{decoder}.weight": (vocabulary, dim),
        f"{decoder}.bias": (vocabulary,),
        bias: (vocabulary,),
    }


@pytest.mark.parametrize(
    ("name", "family", "sizes"),
    [
        ("roberta-base", "roberta", (768, 3072, 12, 50265, 514, 1)),
        ("roberta-large", "roberta", (1024, 4096, 24, 50265, 514, 1)),
        ("bert-base-uncased", "bert", (768, 3072, 12, 30522, 512, 2)),
        ("bert-large-uncased", "bert", (1024, 4096, 24, 30522, 512, 2)),
    ],
)
@pytest.mark.parametrize("official", [True, False])
def test_keys_and_shapes(name: str, family: str, sizes: tuple[int, ...], official: bool) -> None:
    words = dict(zip(("dim", "ffn", "depth", "vocabulary", "positions", "types"), sizes, strict=True))
    expected = keys_of_masked_lm(family, **words, first_norm=official)
    with torch.device("meta"):
        model = formix.create_model(name, design=formix.design("paf", official=official))
    assert {k: tuple(v.shape) for k, v in model.state_dict().items()} == expected


def test_parameters_of_roberta_large() -> None:
    with torch.device("meta"):
        model = formix.create_model("roberta-large", design=OFFICIAL_PAF).roberta
        clean = formix.create_model("roberta-large", design="paf").roberta
    count, dead = (sum(p.numel() for p in m.parameters()) for m in (model, clean))
    assert count == 354_310_144
    assert count - dead == 49_152
    assert sum(p.numel() for k, p in model.named_parameters() if "attention.output.LayerNorm" in k) == 49_152


# ------------------------------------------------------------------------------- the layer once more, straight-line


def norm(x: Tensor, w: Tensor, b: Tensor, eps: float) -> Tensor:
    mean = x.mean(-1, keepdim=True)
    return (x - mean) / ((x - mean).square().mean(-1, keepdim=True) + eps).sqrt() * w + b


def encoder(p: dict[str, Tensor], x: Tensor, mask: Tensor, *, depth: int, eps: float, form: str) -> Tensor:
    """[N, C] -> [N, C] of one sequence, with 4 heads; mask [N], True = attend. form: paf, saf or parallel."""
    c = x.shape[1]
    d = c // 4
    for i in range(depth):

        def linear(y: Tensor, name: str, i=i) -> Tensor:
            return y @ p[f"encoder.layer.{i}.{name}.weight"].T + p[f"encoder.layer.{i}.{name}.bias"]

        def layer_norm(y: Tensor, name: str, i=i) -> Tensor:
            return norm(y, p[f"encoder.layer.{i}.{name}.weight"], p[f"encoder.layer.{i}.{name}.bias"], eps)

        def attention(y: Tensor, linear=linear) -> Tensor:
            q, k, v = (linear(y, f"attention.self.{name}") for name in ("query", "key", "value"))
            heads = []
            for j in range(4):
                at = slice(j * d, (j + 1) * d)
                scores = q[:, at] @ k[:, at].T / math.sqrt(d) + torch.where(mask, 0.0, -math.inf)
                heads.append(torch.softmax(scores, -1) @ v[:, at])
            return linear(torch.cat(heads, dim=1), "attention.output.dense")

        def ffn(y: Tensor, linear=linear) -> Tensor:
            hidden = linear(y, "intermediate.dense")
            return linear(hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2))), "output.dense")

        if form == "paf":
            x = layer_norm(x + attention(x) + ffn(x), "output.LayerNorm")
        elif form == "saf":
            a = layer_norm(x + attention(x), "attention.output.LayerNorm")
            x = layer_norm(a + ffn(a), "output.LayerNorm")
        else:
            h = layer_norm(x, "attention.output.LayerNorm")
            x = x + attention(h) + ffn(h)
    return x


@FAMILY
@pytest.mark.parametrize("form", ["paf", "paf-official", "saf", "parallel"])
def test_logits_and_gradients_equal_the_straight_line_implementation(family: str, form: str) -> None:
    design = {"saf": formix.design("softmax"), "paf-official": OFFICIAL_PAF}.get(form) or formix.design(form)
    model = small(family, design, "features", num_hidden_layers=2).double()
    ids, mask = tokens(2, 9), torch.ones(2, 9, dtype=torch.long)
    mask[1, 6:] = 0
    given = model(ids, attention_mask=mask).last_hidden_state
    parameters = {k: p for k, p in model.named_parameters() if "pooler" not in k}
    x = model.embeddings(ids)
    eps = 1e-12 if family == "bert" else 1e-5
    expected = torch.stack(
        [
            encoder(parameters, x[row], mask[row].bool(), depth=2, eps=eps, form=form.removesuffix("-official"))
            for row in range(2)
        ]
    )
    torch.testing.assert_close(given, expected, rtol=1e-10, atol=1e-10)

    direction = torch.randn(given.shape, dtype=given.dtype, generator=torch.Generator().manual_seed(2))
    ours = torch.autograd.grad((given * direction).sum(), list(parameters.values()), allow_unused=True)
    theirs = torch.autograd.grad((expected * direction).sum(), list(parameters.values()), allow_unused=True)
    for name, a, b in zip(parameters, ours, theirs, strict=True):
        dead = form == "paf-official" and "attention.output.LayerNorm" in name
        assert (a is None) == dead
        assert (b is None) == dead
        if not dead:
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}")


def test_paf_and_parallel_are_different_designs() -> None:
    paf, parallel = small("roberta", OFFICIAL_PAF), small("roberta", formix.design("parallel", official=True))
    parallel.load_state_dict(paf.state_dict(), strict=True)
    assert not torch.allclose(paf(tokens(1, 8)).logits, parallel(tokens(1, 8)).logits, atol=1e-2)


@FAMILY
@pytest.mark.parametrize("design", ["softmax", "paf", "parallel"])
def test_the_ffn_in_chunks_is_the_same(family: str, design: str) -> None:
    whole, chunked = small(family, design), small(family, design, chunk_size_feed_forward=3)
    chunked.load_state_dict(whole.state_dict())
    calls = []
    chunked.base_model.encoder.layer[0].intermediate.register_forward_hook(lambda m, a, y: calls.append(y.shape[1]))
    torch.testing.assert_close(chunked(tokens(2, 12)).logits, whole(tokens(2, 12)).logits, rtol=1e-5, atol=1e-5)
    assert calls == [3, 3, 3, 3]


def test_the_two_dropouts_are_independent() -> None:
    """With p = 1/2 on branches that are the same constant, the sum is 0, 2c or 4c in the shares 1/4, 1/2, 1/4."""
    layer = small("bert", "paf", hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.0).bert.encoder.layer[0]
    for dense in (layer.attention.output.dense, layer.output.dense):
        nn.init.zeros_(dense.weight)
        nn.init.ones_(dense.bias)
    layer.output.LayerNorm = nn.Identity()
    torch.manual_seed(0)
    y = layer.train()(torch.zeros(4, 500, 32), None, None, False, None)
    shares = [(y == value).double().mean().item() for value in (0, 2, 4)]
    assert shares == pytest.approx([0.25, 0.5, 0.25], abs=0.01)


# -------------------------------------------------------------------------------------------------------- checkpoints


@FAMILY
def test_series_checkpoints_go_into_paf_and_back_without_loss(family: str, tmp_path) -> None:
    saf = stock(family)
    saf.save_pretrained(tmp_path / "saf")
    paf = formix.create_model(tmp_path / "saf", design=OFFICIAL_PAF).eval()
    assert {k: v.shape for k, v in paf.state_dict().items()} == {k: v.shape for k, v in saf.state_dict().items()}
    assert all(torch.equal(v, saf.state_dict()[k]) for k, v in paf.state_dict().items())
    assert not torch.allclose(paf(tokens(1, 8)).logits, saf(tokens(1, 8)).logits, atol=1e-2)

    formix.save(paf, tmp_path / "paf")
    back = formix.create_model(tmp_path / "paf", design="softmax").eval()
    torch.testing.assert_close(back(tokens(1, 8)).logits, saf(tokens(1, 8)).logits, rtol=1e-5, atol=1e-5)
    type(saf)(saf.config).load_state_dict(paf.state_dict(), strict=True)


@FAMILY
def test_what_has_no_place_is_announced(family: str, tmp_path, caplog) -> None:
    stock(family).save_pretrained(tmp_path / "saf")
    with caplog.at_level(logging.WARNING, logger="formix"):
        paf = formix.create_model(tmp_path / "saf", design="paf")
    assert "encoder.layer.0.attention.output.LayerNorm.bias" in caplog.text
    formix.save(paf, tmp_path / "paf")
    with pytest.raises(ValueError, match=r"no weights for 4 parameters"):
        formix.create_model(tmp_path / "paf", design="softmax")


@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.safetensors"])
def test_a_paf_checkpoint_in_stock_layout(file: str, tmp_path) -> None:
    """As published: RoBERTa's own layout, with the buffers of its time, and nothing that marks it as PAF."""
    original = small("roberta", OFFICIAL_PAF, num_hidden_layers=2)
    state = {k: v.clone() for k, v in original.state_dict().items()}
    state["roberta.embeddings.position_ids"] = torch.arange(64)[None]
    if file == "pytorch_model.bin":
        torch.save(state, tmp_path / file)
    else:
        from safetensors.torch import save_file

        save_file(state, tmp_path / file, metadata={"format": "pt"})
    config = {
        "architectures": ["RobertaForMaskedLM"],
        "model_type": "roberta",
        "layer_norm_eps": 1e-5,
        "type_vocab_size": 1,
        "torch_dtype": "float32",
        **{k: v for k, v in CONFIG.items() if k != "initializer_range"},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = formix.create_model(tmp_path, design=OFFICIAL_PAF).eval()
    torch.testing.assert_close(loaded(tokens(2, 9)).logits, original(tokens(2, 9)).logits, rtol=1e-6, atol=1e-6)
    as_series = AutoModelForMaskedLM.from_pretrained(tmp_path).eval()
    assert not torch.allclose(as_series(tokens(2, 9)).logits, loaded(tokens(2, 9)).logits, atol=1e-2)
    with pytest.raises(ValueError, match=r"design|model\.safetensors"):
        formix.load(tmp_path)


@FAMILY
def test_softmax_is_transformers_model(family: str) -> None:
    theirs, ours = stock(family), small(family, num_hidden_layers=2)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    ids, mask = tokens(2, 9), torch.ones(2, 9, dtype=torch.long)
    ids[1, 6:], mask[1, 6:] = 1, 0
    given, expected = ours(ids, attention_mask=mask).logits, theirs(ids, attention_mask=mask).logits
    torch.testing.assert_close(given, expected, rtol=1e-5, atol=1e-5)


@FAMILY
def test_heads_are_transformers_heads(family: str) -> None:
    """Every head's own weights are named as in the stock class, for the stock class to load."""
    import transformers

    for task, ours in FAMILIES[family][1].items():
        theirs = getattr(transformers, ours.__name__.removeprefix("Formix"))
        model = small(family, OFFICIAL_PAF, task, num_hidden_layers=2)
        fields = {k: v for k, v in model.config.to_dict().items() if k not in ("model_type", "design", "pruned_kv")}
        theirs(theirs.config_class(**fields)).load_state_dict(model.state_dict(), strict=True)
