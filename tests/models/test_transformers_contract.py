"""What users of transformers expect of any model, for every family and task in the registry."""

from __future__ import annotations

import copy

import pytest
import torch
from text_families import DECODERS, SMALL, VOCABULARY, small, tokens
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    Trainer,
    TrainingArguments,
    pipeline,
)

import formix
from formix.models.text import FAMILIES

DESIGNS = ("softmax", "relu+skip", "paf", "relu(gate=silu,qk_norm=true)+parallel")
TASKS = [(family, task) for family, (_, classes) in FAMILIES.items() for task in classes]
family_ = pytest.mark.parametrize("family", FAMILIES)
design_ = pytest.mark.parametrize("design", DESIGNS)
task_ = pytest.mark.parametrize(("family", "task"), TASKS)


def inputs(task: str) -> dict[str, torch.Tensor]:
    ids = tokens(2, 3, 7) if task == "multiple-choice" else tokens(2, 7)
    mask = torch.ones_like(ids)
    mask[..., 0, 5:] = 0
    ids = ids.masked_fill(mask == 0, 1)
    return {"input_ids": ids, "attention_mask": mask}


def labels(task: str) -> dict[str, torch.Tensor]:
    if task == "question-answering":
        return {"start_positions": torch.tensor([1, 2]), "end_positions": torch.tensor([3, 4])}
    classes = {"sequence-classification": (2,), "multiple-choice": (2,), "token-classification": (2, 7)}
    if task in classes:
        return {"labels": torch.ones(classes[task], dtype=torch.long)}
    return {"labels": tokens(2, 7)} if task != "features" else {}


def first(output) -> torch.Tensor:
    return output.logits if "logits" in output else output["start_logits" if "start_logits" in output else 0]


# -------------------------------------------------------------------------------------------------- save, load, dtypes


@task_
def test_save_and_load_give_the_same_logits(family: str, task: str, tmp_path) -> None:
    model = small(family, "relu+paf+skip", task)
    model.save_pretrained(tmp_path)
    expected = first(model(**inputs(task)))
    for loaded in (formix.load(tmp_path), type(model).from_pretrained(tmp_path)):
        assert type(loaded) is type(model)
        assert not loaded.training
        torch.testing.assert_close(first(loaded(**inputs(task))), expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(first(formix.load(tmp_path)(**inputs(task))), expected)  # weights in aligned memory, as these
    body = AutoModel.from_pretrained(tmp_path)
    assert body.config.design == model.config.design
    ours, theirs = model.base_model.state_dict(), body.state_dict()
    assert all(torch.equal(theirs[key], ours[key]) for key in ours)


@family_
def test_auto_classes_know_the_family(family: str, tmp_path) -> None:
    model = small(family, "relu")
    model.save_pretrained(tmp_path)
    auto = AutoModelForCausalLM if family in DECODERS else AutoModelForMaskedLM
    assert type(auto.from_pretrained(tmp_path)) is type(model)
    assert formix.design(AutoConfig.from_pretrained(tmp_path).design) == formix.design("relu")


@family_
def test_a_config_without_a_design_is_refused(family: str) -> None:
    config_class, classes = FAMILIES[family]
    with pytest.raises(ValueError, match="no design"):
        next(iter(classes.values()))(config_class(**SMALL[family][1]))


@family_
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(family: str, dtype: torch.dtype, tmp_path) -> None:
    model, ids = small(family, "relu+skip", initializer_range=0.02), tokens(2, 9)
    model.save_pretrained(tmp_path)
    half = type(model).from_pretrained(tmp_path, dtype=dtype, device_map="cpu")
    assert {p.dtype for p in half.parameters()} == {dtype}
    given = half(ids).logits
    assert given.dtype == dtype
    torch.testing.assert_close(given.float(), model(ids).logits, rtol=0.1, atol=0.02)


@family_
def test_device_map_of_one_device(family: str, tmp_path) -> None:
    model = small(family, "relu+skip")
    model.save_pretrained(tmp_path)
    for device_map in ("cpu", {"": "cpu"}):
        loaded = type(model).from_pretrained(tmp_path, device_map=device_map)
        torch.testing.assert_close(loaded(tokens(1, 7)).logits, model(tokens(1, 7)).logits, rtol=1e-6, atol=1e-6)
        assert not any(t.is_meta for t in (*loaded.parameters(), *loaded.buffers()))


@family_
def test_weights_are_initialised_once_and_as_the_config_says(family: str) -> None:
    model = small(family, "relu+skip", initializer_range=0.02, hidden_size=64)
    matrices = [p for k, p in model.named_parameters() if p.dim() == 2 and p.shape[0] > 16]
    assert all(0.003 < p.std() < 0.025 for p in matrices)
    embedding = model.get_input_embeddings()
    if embedding.padding_idx is not None:
        assert (embedding.weight[embedding.padding_idx] == 0).all()


# --------------------------------------------------------------------------------------------------------- embeddings


@family_
def test_output_projection_is_tied(family: str, tmp_path) -> None:
    model = small(family, "relu", tie_word_embeddings=True)
    projection, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    assert projection.weight is embedding.weight
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    untied = small(family, "relu", tie_word_embeddings=False)
    assert untied.get_output_embeddings().weight is not untied.get_input_embeddings().weight


@family_
def test_resize_token_embeddings(family: str, tmp_path) -> None:
    model, ids = small(family, "relu+skip"), tokens(1, 7)
    before = model(ids).logits
    model.resize_token_embeddings(VOCABULARY + 5)
    after = model(ids).logits
    assert after.shape[-1] == VOCABULARY + 5 == model.config.vocab_size
    torch.testing.assert_close(after[..., :VOCABULARY], before, rtol=1e-5, atol=1e-5)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(formix.load(tmp_path)(ids).logits, after, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("family", "task"), [(f, t) for f, t in TASKS if t != "multiple-choice"])
def test_embeddings_as_input(family: str, task: str) -> None:
    model, given = small(family, "relu+skip", task, pad_token_id=1), inputs(task)
    ids = tokens(1, 7)
    embedded = model.get_input_embeddings()(ids)
    torch.testing.assert_close(first(model(inputs_embeds=embedded)), first(model(ids)))
    with pytest.raises(ValueError, match=r"input_ids|inputs_embeds"):
        model(**given, inputs_embeds=embedded)


# -------------------------------------------------------------------------------------------------- outputs and losses


@family_
@design_
def test_hidden_states(family: str, design: str) -> None:
    model, ids = small(family, design, "features"), tokens(2, 7)
    output = model(ids, output_hidden_states=True)
    assert len(output.hidden_states) == 5
    assert torch.equal(output.hidden_states[-1], output.last_hidden_state)
    layers = model.layers if family == "llama" else model.h if family == "gpt2" else model.encoder.layer
    seen = []
    layers[1].register_forward_hook(lambda m, a, y: seen.append(y[0] if isinstance(y, tuple) else y))
    again = model(ids, output_hidden_states=True)
    assert torch.equal(again.hidden_states[2], seen[0])
    assert all(torch.equal(a, b) for a, b in zip(output.hidden_states, again.hidden_states, strict=True))
    as_tuple = model(ids, return_dict=False)
    assert torch.equal(as_tuple[0], output.last_hidden_state)


@family_
def test_attention_weights_and_cross_attention_are_refused_not_left_out(family: str) -> None:
    with pytest.raises(ValueError, match="output_attentions"):
        small(family, "softmax")(tokens(1, 5), output_attentions=True)
    asked = small(family, "softmax", output_attentions=True)
    for unsaid in ({}, {"output_attentions": None}):
        with pytest.raises(ValueError, match="output_attentions"):
            asked(tokens(1, 5), **unsaid)
    assert "attentions" not in asked(tokens(1, 5), output_attentions=False)
    with pytest.raises(ValueError, match="encoder_hidden_states"):
        small(family, "softmax")(tokens(1, 5), encoder_hidden_states=torch.zeros(1, 3, 32))


@task_
def test_labels_give_a_loss_with_gradients(family: str, task: str) -> None:
    model = small(family, "relu+paf+skip", task)
    output = model.train()(**inputs(task), **labels(task))
    loss = output.loss if task != "features" else output[0].square().mean()
    loss.backward()
    unused = {"pooler"} if task == "features" else set()
    without = [k for k, p in model.named_parameters() if p.grad is None and not any(u in k for u in unused)]
    assert without == []


@family_
def test_regression(family: str) -> None:
    model = small(family, "relu", "sequence-classification", num_labels=1)
    target = torch.tensor([0.3, -1.2])
    output = model(**inputs(""), labels=target)
    torch.testing.assert_close(output.loss, torch.nn.functional.mse_loss(output.logits[:, 0], target))


@pytest.mark.parametrize("family", DECODERS)
def test_trainer_shifts_the_labels_that_it_smooths(family: str, tmp_path) -> None:
    model = small(family, "relu")
    settings = TrainingArguments(str(tmp_path), label_smoothing_factor=1e-9, use_cpu=True, report_to=[])
    inputs = {"input_ids": tokens(2, 7), "labels": tokens(2, 7)}
    expected = model(**inputs).loss
    torch.testing.assert_close(Trainer(model, settings).compute_loss(model, inputs), expected)


@family_
@design_
def test_gradient_checkpointing_gives_equal_gradients(family: str, design: str) -> None:
    plain = small(family, design, attention_dropout=0.0) if family == "llama" else small(family, design)
    checkpointed = copy.deepcopy(plain)
    checkpointed.gradient_checkpointing_enable()
    given = {**inputs(""), **labels("causal-lm")}
    losses = []
    for model in (plain, checkpointed):
        model.train()
        torch.manual_seed(5)  # dropout draws the same numbers again when recomputing
        losses.append(model(**given).loss)
        losses[-1].backward()
    assert torch.equal(*losses)
    for (name, a), b in zip(plain.named_parameters(), checkpointed.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")


# --------------------------------------------------------------------------------------------------------------- masks


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in DECODERS])
@pytest.mark.parametrize("design", [*DESIGNS, "sima", "sima+paf", "relu(length=keys)"])
def test_masks_of_encoders(family: str, design: str) -> None:
    """A row with padding equals the row alone, and differs from the row with its padding seen."""
    model, ids = small(family, design).double(), tokens(1, 6)
    padded = torch.cat([ids, tokens(1, 3, seed=9)], 1)  # padding of any tokens: the mask alone hides it
    mask = torch.tensor([[1] * 6 + [0] * 3])
    alone, hidden, seen = model(ids).logits, model(padded, attention_mask=mask).logits[:, :6], model(padded).logits
    if "keys" not in design:  # this length counts hidden keys too, as it says
        torch.testing.assert_close(hidden, alone, rtol=0, atol=1e-10)
    assert (seen[:, :6] - hidden).abs().max() > 1e-3
    same = model(padded, attention_mask=mask.bool()[:, None, None, :]).logits[:, :6]
    torch.testing.assert_close(same, hidden, rtol=0, atol=1e-12)
    for bad in (mask[:, None], torch.zeros(1, 1, 9, 9, dtype=torch.float64)):
        with pytest.raises(ValueError, match="attention_mask"):
            model(padded, attention_mask=bad)


@pytest.mark.parametrize("family", DECODERS)
def test_what_is_no_mask_of_a_decoder_is_refused(family: str) -> None:
    """Biases of scores, and masks of which nobody knows whether a dimension is of heads or of rows."""
    for bad in (torch.full((1, 1, 5, 5), -0.5), torch.ones(1, 5, 5).tril()):
        with pytest.raises(ValueError, match="attention_mask has"):
            small(family, "relu")(tokens(1, 5), attention_mask=bad)


@pytest.mark.parametrize("family", DECODERS)
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_attention_implementations_agree(family: str, implementation: str) -> None:
    model = small(family, "relu+skip")
    expected = model(**inputs("")).logits
    model.set_attn_implementation(implementation)
    torch.testing.assert_close(model(**inputs("")).logits, expected)


# ----------------------------------------------------------------------------------------------------------- pipelines


@pytest.fixture(scope="module")
def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<s>", "<pad>", "</s>", "<mask>", "<unk>", *"abcdefghijklmnopqrstuvwxyz", "the", "cat", "sat"]
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "mask_token": "<mask>"}
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", **special)


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in DECODERS])
def test_fill_mask_pipeline(family: str, tokenizer) -> None:
    fill = pipeline("fill-mask", model=small(family, "relu+paf"), tokenizer=tokenizer, device="cpu")
    assert len(fill("the cat <mask> a b", top_k=3)) == 3


@pytest.mark.parametrize("family", DECODERS)
def test_text_generation_pipeline(family: str, tokenizer) -> None:
    model = small(family, "relu+skip", bos_token_id=0, eos_token_id=2, pad_token_id=1)
    tokenizer.padding_side = "left"
    write = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu", batch_size=2)
    options = {"max_new_tokens": 4, "do_sample": False, "return_full_text": False, "min_new_tokens": 4}
    together = write(["the cat", "a b c d the cat sat"], **options)
    alone = [write(text, **options) for text in ("the cat", "a b c d the cat sat")]
    assert together == alone


@family_
def test_text_classification_pipeline(family: str, tokenizer) -> None:
    model = small(family, "relu+skip", "sequence-classification", num_labels=3)
    classify = pipeline("text-classification", model=model, tokenizer=tokenizer, device="cpu")
    result = classify(["the cat sat", "a b"], top_k=None)
    assert [sorted(r["label"] for r in row) for row in result] == [["LABEL_0", "LABEL_1", "LABEL_2"]] * 2


@family_
def test_pipelines_take_a_directory(family: str, tokenizer, tmp_path) -> None:
    model = small(family, "relu+skip", "token-classification", num_labels=3)
    formix.save(model, tmp_path)
    tokenizer.save_pretrained(tmp_path)
    tag = pipeline("token-classification", model=str(tmp_path), device="cpu")
    assert type(tag.model) is type(model)
    assert [r["word"] for r in tag("the cat sat")] == ["the", "cat", "sat"]


# ------------------------------------------------------------------------------------------------- compile and export


@family_
def test_export(family: str) -> None:
    model = small(family, "relu+skip", **({"use_cache": False} if family in DECODERS else {}))
    given = inputs("")
    program = torch.export.export(model, (), given)
    exported = program.module()(**given)
    torch.testing.assert_close(exported.logits, model(**given).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@family_
def test_compile(family: str) -> None:
    model, given = small(family, "relu+skip"), inputs("")
    compiled = torch.compile(model, dynamic=False)
    torch.testing.assert_close(compiled(**given).logits, model(**given).logits, rtol=1e-4, atol=1e-4)


@family_
def test_compiles_as_one_graph_for_texts_of_any_length(family: str) -> None:
    model = small(family, "relu+skip")
    compiled = torch.compile(model, dynamic=True, fullgraph=True, backend="eager")
    for shape in ((2, 7), (3, 9)):
        ids = tokens(*shape)
        torch.testing.assert_close(compiled(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)
