"""Calibration and recovery, on small random models: closed forms, stages, resuming, and the command."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import timm
import torch
import transformers as hf
import yaml
from PIL import Image
from sources import GPT2, TEXT, inputs, make, run

import formix
from formix.commands.convert import _config
from formix.conversion.calibrate import calibrate
from formix.conversion.carry import as_teacher, restore
from formix.conversion.load import load_source
from formix.conversion.objectives import Distillation
from formix.conversion.pipeline import Recovery, load_recovery_data, parse_stages
from formix.conversion.pipeline import run as run_pipeline
from formix.conversion.recover import Stage, recover
from formix.conversion.report import _inputs
from formix.conversion.sentences import Sentences, load_sentences
from formix.conversion.taps import answer, tapped
from formix.data import Data
from formix.data.text import load_tokenizer
from formix.models.parts import layers, weight_in_out
from formix.models.text import positions
from formix.training import train

STUDIES = Path(__file__).resolve().parents[2] / "studies" / "conversion"
STAGES = [Stage(name="match", epochs=6, lr=3e-3, evaluations=2), Stage(name="align", epochs=4, lr=1e-3, evaluations=2)]


def sentences(count: int = 60) -> Data:
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(5, 60, (3 + i % 7,), generator=generator).tolist() for i in range(count)]
    train, held = (Sentences(part, pad=0, tokens=64, seed=0) for part in (ids[10:], ids[:10]))
    return Data(
        name="made up", task="sequence-regression", train=train, validation=held, test=held, metric="spearman",
        higher_is_better=True, chance=0.0, provenance={"source": "made up"},
    )  # fmt: skip


def pair(design: str, name: str = "bert-features") -> tuple:
    source = make(name).float()
    return formix.convert(source, "softmax"), formix.convert(source, design)


def test_batches_of_sentences_waste_little_and_lose_none() -> None:
    data = sentences()
    rows = [row for i in range(len(data.train)) for row in data.train.batches[i]]
    assert len(rows) == 50
    for i in range(len(data.train)):
        batch = data.train.__getitems__([i])
        assert batch["input_ids"].numel() <= 64
        assert batch["attention_mask"].sum(1).min() >= batch["attention_mask"].shape[1] - 2
        assert bool((batch["input_ids"][batch["attention_mask"] == 0] == 0).all())


@torch.no_grad()
@pytest.mark.parametrize("name", ["bert", "gpt2", "qwen3", "vit", "xcit", "dinov3", "relpos", "differential"])
def test_calibration_solves_the_least_squares_of_the_heads(name: str) -> None:
    source = make(name)
    teacher = as_teacher(source)
    model = formix.convert(source, "relu")
    batch = inputs(source)
    before = [weight_in_out(layer.out).clone() for layer in layers(model)]
    record = calibrate(model, teacher, [batch])
    for i, (layer, theirs) in enumerate(zip(layers(model), layers(teacher), strict=True)):
        with tapped(layers(teacher)) as flow:
            answer(teacher, batch)
        with tapped(layers(model), forced=flow.inputs) as own:
            answer(model, batch)
        row = record["layers"][i]
        error = (own.branches[i] - flow.branches[i]).square().sum()
        bias = 0 if theirs.out.bias is None else theirs.out.bias
        target = flow.branches[i] - bias
        assert row["error_after"] == pytest.approx(float(error / target.square().sum()), rel=1e-6)
        assert row["error_after"] <= row["error_before"]
        heads = before[i].unflatten(0, (layer.heads, -1))  # [H, D, C]
        mixed = own.mixed[i].unflatten(-1, (layer.heads, -1))
        parts = torch.einsum("bnhd,hdc->bnch", mixed, heads).flatten(0, 2)
        alive = parts.square().sum(0) > 0  # relu may leave nothing of a head; its gain stays 1
        best = torch.linalg.lstsq(parts[:, alive], target.flatten()[:, None]).solution[:, 0]
        left = (parts[:, alive] @ best - target.flatten()).square().sum() / target.square().sum()
        assert row["error_after"] == pytest.approx(float(left), rel=1e-3)
        assert all(row["gains"][head] == pytest.approx(1) for head in (~alive).nonzero())


def test_calibration_is_undone_on_the_way_back() -> None:
    source = make("bert")
    model = formix.convert(source, "relu")
    calibrate(model, formix.convert(source, "softmax"), [inputs(source)])
    plan = model.conversion.plan
    assert len(plan["folded"]) == 3
    assert len(plan["kept"]) + len(plan["folded"]) == len(source.state_dict())
    assert not set(plan["kept"]) & set(plan["folded"])
    back = formix.convert(model, "softmax")
    torch.testing.assert_close(run(back, inputs(source)), run(source, inputs(source)), rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "vit", "eva02", "res-post"])
def test_the_source_itself_has_nothing_to_recover(name: str) -> None:
    source = make(name).float()
    teacher, same = formix.convert(source, "softmax"), formix.convert(source, "softmax")
    given = {k: v.float() if v.is_floating_point() else v for k, v in inputs(source).items()}
    distillation = Distillation(teacher, same, sentences(), labelled=False)
    distillation.changed = [(True, True)] * len(distillation.layers)
    for loss in (distillation.match, distillation.align, distillation.task):
        assert float(loss(same, given)) == pytest.approx(0, abs=1e-4)


def test_matching_trains_every_layer_on_the_teachers_input_alone() -> None:
    teacher, model = pair("relu")
    distillation = Distillation(teacher, model, sentences(), labelled=False)
    batch = sentences().train.__getitems__([0])
    first = layers(model)[0]
    before = distillation.match(model, batch)
    with torch.no_grad():
        first.block.output.dense.weight.mul_(5.0)  # the second layer would read something else
    torch.testing.assert_close(distillation.match(model, batch), before)


@pytest.mark.parametrize("design", ["relu", "paf", "relu+skip", "sima"])
def test_recovery_brings_a_model_nearer_to_its_source(design: str) -> None:
    teacher, model = pair(design)
    records = recover(model, teacher, sentences(), STAGES)
    assert [r["stage"] for r in records] == ["match", "align"]
    for record in records:
        assert record["held_out_after"] < record["held_out_before"]
    assert [s["stage"] for s in model.conversion.stages] == ["match", "align"]


@pytest.mark.parametrize("name", ["bert-choices", "distilbert-choices"])
def test_a_model_of_multiple_choice_is_recovered_and_timed_on_single_choices(name: str) -> None:
    teacher, model = pair("relu", name)
    (record,) = recover(model, teacher, sentences(), STAGES[:1])
    assert record["held_out_after"] < record["held_out_before"]
    for _, theirs, ours in _inputs(restore(model), model):
        assert restore(model)(**theirs).logits.shape == model(**ours).logits.shape == (1, 1)


class KilledError(Exception):
    pass


@pytest.mark.parametrize("moment", ["in a stage", "behind its last checkpoint"])
def test_a_killed_recovery_goes_on(moment: str, tmp_path) -> None:
    teacher, whole = pair("relu")
    expected = recover(whole, teacher, sentences(), STAGES)

    def kill(stage: str, share: float) -> None:
        if moment == "in a stage" and stage == "align" and share > 0.6:
            raise KilledError

    def kill_at_the_end(model: torch.nn.Module) -> None:
        finished = (tmp_path / "state.json").is_file()  # match is; this is align
        if moment != "in a stage" and finished:
            raise KilledError

    _, model = pair("relu")
    with pytest.raises(KilledError):
        recover(model, teacher, sentences(), STAGES, state=tmp_path, on_progress=kill, metric=kill_at_the_end)
    _, fresh = pair("relu")
    stages: list[str] = []
    records = recover(fresh, teacher, sentences(), STAGES, state=tmp_path, on_progress=lambda s, _: stages.append(s))
    assert set(stages) == ({"align"} if moment == "in a stage" else set())
    for name, tensor in fresh.state_dict().items():
        torch.testing.assert_close(tensor, whole.state_dict()[name], rtol=1e-4, atol=1e-5)
    for record, uncut in zip(records, expected, strict=True):
        assert record["held_out"] == pytest.approx(uncut["held_out"], rel=1e-4)
        assert record["held_out_before"] == record["held_out"][0]
        assert record["held_out_after"] == min(record["held_out"])


def test_the_best_weights_and_the_time_of_a_stage_outlive_a_kill(tmp_path) -> None:
    stage = Stage(name="align", epochs=4, lr=1.0, evaluations=4, patience=9)  # it only gets worse
    teacher, model = pair("relu")
    before = {k: v.clone() for k, v in model.state_dict().items()}

    def kill(name: str, share: float) -> None:
        if share > 0.6:
            raise KilledError

    with pytest.raises(KilledError):
        recover(model, teacher, sentences(), [stage], state=tmp_path, on_progress=kill)
    record = recover(pair("relu")[1], teacher, sentences(), [stage], state=tmp_path)[0]
    assert len(record["held_out"]) == 5
    watch = json.loads(next((tmp_path / "stage0").glob("step-*/model/watch.json")).read_text())
    assert record["seconds"] > watch["seconds"]
    _, fresh = pair("relu")
    (tmp_path / "state.json").unlink()
    with torch.no_grad():
        for parameter in fresh.parameters():
            parameter.zero_()  # what the model starts from is no more looked at
    again = recover(fresh, teacher, sentences(), [stage], state=tmp_path)[0]
    assert again["held_out"] == record["held_out"]
    assert record["held_out_after"] == record["held_out_before"]
    assert all(torch.equal(v, before[k]) for k, v in fresh.state_dict().items())


@pytest.mark.parametrize("killed", ["in the first stage", "later"])
def test_another_recovery_does_not_go_on_from_a_killed_one(killed: str, tmp_path) -> None:
    def kill(stage: str, share: float) -> None:
        if stage == "align" or (killed == "in the first stage" and share > 0.6):
            raise KilledError

    first = dataclasses.replace(STAGES[0], epochs=1)
    begun = [first, dataclasses.replace(STAGES[1], epochs=1)] if killed == "later" else [STAGES[0]]
    teacher, model = pair("relu")
    with pytest.raises(KilledError):
        recover(model, teacher, sentences(), begun, state=tmp_path, on_progress=kill)
    with pytest.raises(ValueError, match=r"with design\.mixer\.kind pointwise and this one has .* sima"):
        recover(pair("sima")[1], teacher, sentences(), begun, state=tmp_path)
    with pytest.raises(ValueError, match=r"with stages\.0\.lr 0.003 and this one has .* 1.0"):
        recover(model, teacher, sentences(), [dataclasses.replace(begun[0], lr=1.0), *begun[1:]], state=tmp_path)
    with pytest.raises(ValueError, match="with calibration"):
        recover(model, teacher, sentences(), begun, state=tmp_path, settings={"calibration": 3})


def test_a_stage_without_improvement_ends_early() -> None:
    teacher, model = pair("relu")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    hopeless = Stage(name="align", epochs=20, lr=1.0, evaluations=20, patience=2)
    record = recover(model, teacher, sentences(), [hopeless])[0]
    assert record["stopped_early"]
    assert len(record["held_out"]) < 20
    if record["held_out_after"] == record["held_out_before"]:  # the best of its weights were the first
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def half_bert(tmp_path: Path) -> None:
    """A source in bfloat16, with words for `letters`."""
    words = hf.BertTokenizer(
        vocab={w: i for i, w in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefgh"])}
    )
    words.save_pretrained(tmp_path / "source")
    hf.BertModel(hf.BertConfig(**TEXT)).to(torch.bfloat16).save_pretrained(tmp_path / "source")
    lines = [" ".join("abcdefgh"[(i * j) % 8] for j in range(1, 5 + i % 3)) for i in range(60)]
    (tmp_path / "text.txt").write_text("\n".join(lines))


@pytest.mark.parametrize("stages", ["", "match:2steps:1e-2"])
def test_half_precision_recovers_in_float32(stages: str, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(
        "formix.conversion.recover.train", lambda model, *a, **k: seen.append(model.dtype) or train(model, *a, **k)
    )
    half_bert(tmp_path)
    source = load_source(tmp_path / "source")
    recovery = Recovery(data=f"text:{tmp_path / 'text.txt'}", stages=stages, calibration=1, evaluations=1, held_out=0.2)
    made = [run_pipeline(source, "relu", recovery, place=tmp_path / "source") for _ in range(2)]
    assert source.dtype == made[0].dtype == torch.bfloat16
    assert seen == [torch.float32] * len(seen)
    assert len(seen) == (2 if stages else 0)
    assert all(torch.equal(v, made[1].state_dict()[k]) for k, v in made[0].state_dict().items())  # the seed decides
    assert list(made[0].conversion.match_errors) == ["converted", "calibrated", *(["recovered"] if stages else [])]
    if not stages:
        restored = restore(made[0]).state_dict()
        assert all(torch.equal(v, restored[k]) for k, v in source.state_dict().items())
    with pytest.raises(ValueError, match=r"model\.float\(\)"):
        recover(made[0], as_teacher(source), sentences(), STAGES)


@pytest.mark.parametrize("name", ["xcit", "dinov3"])
def test_timms_model_teaches_itself(name: str) -> None:
    source = make(name).float()
    recovery = Recovery(
        data="digits", limit=60, batch_size=16, calibration=1, evaluations=2, stages="match:6steps,align:4steps"
    )
    model = run_pipeline(source, "sima", recovery, metrics={"one": lambda m: 1.0})
    assert model.conversion.match_parts == ["layer 0, mixer", "layer 1, mixer"]
    errors = model.conversion.match_errors
    assert sum(errors["recovered"]) < sum(errors["calibrated"]) < sum(errors["converted"])
    assert list(model.conversion.metrics) == ["source", "converted", "calibrated", "match", "align"]
    assert all(parameter.requires_grad for parameter in source.parameters())


def test_a_teacher_follows_its_student() -> None:
    teacher, model = pair("relu")
    Distillation(teacher, model.to("meta"), None, labelled=False)
    assert {parameter.device.type for parameter in teacher.parameters()} == {"meta"}


def test_labels_and_logits_that_nobody_has_are_refused() -> None:
    teacher, model = pair("relu")
    with pytest.raises(ValueError, match="stage task alone"):
        recover(model, teacher, sentences(), STAGES, labelled=True)
    with pytest.raises(ValueError, match="FormixBertModel has no logits"):
        recover(model, teacher, sentences(), [Stage(name="task", epochs=1)])


def test_a_model_whose_layers_are_the_sources_has_nothing_to_match() -> None:
    teacher, same = pair("softmax", "bert")
    with pytest.raises(ValueError, match="No layer is converted"):
        recover(same, teacher, sentences(), STAGES)
    recover(same, teacher, sentences(), [Stage(name="task", epochs=1, evaluations=1)])


@pytest.mark.parametrize("kind", ["score", "independent classes", "tokens"])
def test_the_stage_task_is_about_what_the_logits_mean(kind: str) -> None:
    """With the features the teacher's own, what is left of the loss is of the answers."""
    config = hf.BertConfig(**TEXT, num_labels=1 if kind == "score" else 3)
    if kind == "independent classes":
        config.problem_type = "multi_label_classification"
    head = hf.BertForTokenClassification if kind == "tokens" else hf.BertForSequenceClassification
    source = head(config).eval()
    teacher, same = as_teacher(source), formix.convert(source, "softmax")
    batch = sentences().train.__getitems__([0, 1])
    distillation = Distillation(teacher, same, None, labelled=False)
    with torch.no_grad():
        before = distillation.task(same, batch)
        same.classifier.weight += torch.randn(same.classifier.weight.shape, generator=torch.Generator().manual_seed(0))
        theirs, ours = (answer(model, batch).logits for model in (teacher, same))
        left = distillation.task(same, batch) - before
    if kind == "score":
        expected = (ours - theirs).square().mean()
    elif kind == "independent classes":
        p, q = theirs.sigmoid(), ours.sigmoid()
        expected = (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).sum(-1).mean()
    else:
        p, q = theirs.softmax(-1), ours.softmax(-1)
        seen = batch["attention_mask"].bool()
        assert not seen.all()
        expected = (p * (p / q).log()).sum(-1)[seen].mean()
    assert float(expected) > 0.01
    torch.testing.assert_close(left, expected, rtol=1e-4, atol=1e-5)


def test_labels_are_the_models_own_classes(tmp_path) -> None:
    lines = ["sentence\tlabel", *(f"a sentence of words {i}\t{i % 2}" for i in range(20))]
    (tmp_path / "SST-2").mkdir()
    for split in ("train", "dev"):
        (tmp_path / "SST-2" / f"{split}.tsv").write_text("\n".join(lines) + "\n")
    words = hf.BertTokenizer(vocab={w: i for i, w in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "words"])})
    words.save_pretrained(tmp_path)
    three = hf.BertForSequenceClassification(hf.BertConfig(**TEXT, num_labels=3))
    glue = Recovery(data=f"glue:{tmp_path / 'SST-2'}", labelled=True)
    for source, recovery, said in (
        (make("vit"), Recovery(data="digits", labelled=True), "The model has 7 classes and 'digits' has 10"),
        (three, glue, "The model has 3 classes and 'glue:.*' has 2"),
        (make("bert"), glue, "The model is for masked-lm, and 'glue:.*' is for sequence-classification"),
    ):
        with pytest.raises(ValueError, match=said):
            load_recovery_data(formix.convert(source, "relu"), recovery, tmp_path)


def test_stages_are_read_and_refused() -> None:
    assert parse_stages("match:240s:5e-4,align:2epochs") == [
        ("match", 240.0, "s", 5e-4),
        ("align", 2.0, "epochs", 5e-4),
    ]
    for text in ("match", "warm:3s", "match:0s", "align:3h", "match:1.2.3s", "match:3s:1e", "match:3s:-1"):
        with pytest.raises(ValueError, match="is no stage"):
            Recovery(data="x", stages=text)


def test_data_that_do_not_fit_are_refused(tmp_path) -> None:
    words = hf.BertTokenizer(
        vocab={w: i for i, w in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *map(str, range(90))])}
    )
    words.save_pretrained(tmp_path)
    (tmp_path / "text.txt").write_text("\n".join(f"{i} 2 3 {i + 1} ." for i in range(12)))
    text = f"text:{tmp_path / 'text.txt'}"
    with pytest.raises(ValueError, match=r"The model knows 60 tokens and 'text:.*' has 95"):
        load_recovery_data(formix.convert(make("bert"), "relu"), Recovery(data=text), tmp_path)
    with pytest.raises(ValueError, match="32 x 32"):
        load_recovery_data(formix.convert(make("vit"), "relu"), Recovery(data="digits", img_size=64))
    with pytest.raises(ValueError, match="multiple"):
        load_recovery_data(formix.convert(make("hf-dinov2"), "relu"), Recovery(data="digits", img_size=30))
    picture = tmp_path / "pictures" / "any" / "grey.png"
    picture.parent.mkdir(parents=True)
    for i in range(10):
        Image.new("RGB", (32, 32), (i, i, i)).save(picture.with_stem(f"{i}"))
    grey = timm.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=48, depth=1, num_heads=3, in_chans=1)
    with pytest.raises(ValueError, match=r"takes images of 1 x 32 x 32, and those of 'folder:.*' are 3 x 32 x 32"):
        load_recovery_data(formix.convert(grey, "relu"), Recovery(data=f"folder:{tmp_path / 'pictures'}"))
    for name, data, kind in (("gpt2", "digits", "text"), ("bert", "digits", "text"), ("vit", "stdlib", "images")):
        with pytest.raises(ValueError, match=f"The model reads {kind}, which '{data}' is not"):
            load_recovery_data(formix.convert(make(name), "relu"), Recovery(data=data), tmp_path)


def test_few_sentences_are_refused_or_divided(tmp_path) -> None:
    vocabulary = {w: i for i, w in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *map(str, range(20))])}
    words, text = hf.BertTokenizer(vocab=vocabulary), tmp_path / "text.txt"
    text.write_text("\n".join(f"{i} 2 3 {i + 1} ." for i in range(12)))
    size = {"tokens": 8, "longest": 8, "seed": 0}
    with pytest.raises(ValueError, match=r"has 9 sentences; recovery needs 10 or more"):
        load_sentences(f"text:{text}", words, held_out=0.1, limit=9, **size)
    data = load_sentences(f"text:{text}", words, held_out=0.99, **size)
    assert (len(data.train), len(data.validation)) == (1, 11)
    text.write_bytes("ein sch\xf6ner Tag ist das\n".encode("latin-1"))
    for place, said in ((f"text:{text}", r"text\.txt' is not UTF-8 text"), ("text:", "'text:' has no sentences")):
        with pytest.raises(ValueError, match=said):
            load_sentences(place, words, held_out=0.1, **size)
    (tmp_path / "texts" / "deep").mkdir(parents=True)
    (tmp_path / "texts" / "deep" / "a.txt").write_text("\n".join(f"{i} 2 3 {i + 1} ." for i in range(12)))
    assert len(load_sentences(f"text:{tmp_path / 'texts'}", words, held_out=0.99, **size).validation) == 11
    (tmp_path / "SST-2").mkdir()
    table, rows = tmp_path / "SST-2" / "train.tsv", "".join(f"{i} 2 3\t?\n" for i in range(12))
    table.write_text("\ufeffsentence\tlabel\n" + rows, encoding="utf-8")  # labels are not read
    assert len(load_sentences(f"glue:{table.parent}", words, held_out=0.99, **size).validation) == 11
    table.write_text("sentence\tlabel\n" + rows + "1 2\t3\t0\n")
    with pytest.raises(ValueError, match=r"Line 14 .* has 3 columns where 2 are needed"):
        load_sentences(f"glue:{table.parent}", words, held_out=0.1, **size)
    for name in ("sequence_length", "limit", "img_size", "batch_tokens"):
        with pytest.raises(ValueError, match=f"{name} is 0; it must be 1 or more"):
            Recovery(data="x", **{name: 0})


def test_a_tokenizer_is_the_models_own(tmp_path, capsys) -> None:
    from formix.cli import main

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    for place, words in {"own": range(50), "part": range(20), "other": range(20, 40)}.items():
        vocabulary = {word: i for i, word in enumerate([*special, *map(str, words)])}
        hf.BertTokenizer(vocab=vocabulary).save_pretrained(tmp_path / place)
    make("bert").float().save_pretrained(tmp_path / "own")
    make("bert").float().save_pretrained(tmp_path / "none")
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"{i} 2 3 {i + 1} ." for i in range(30)))
    model = formix.convert(tmp_path / "own", "relu")
    for asked, source in ((None, "own"), ("own", "own"), ("part", "own"), ("other", "none")):
        tokenizer = asked and str(tmp_path / asked)
        load_recovery_data(model, Recovery(data=f"text:{text}", tokenizer=tokenizer), tmp_path / source)
    digests = []
    for _ in range(2):
        data, _ = load_recovery_data(model, Recovery(data=f"text:{text}"), tmp_path / "own")
        digests.append(data.provenance["sha256"])
        tokenizer = load_tokenizer(str(tmp_path / "own"))
        tokenizer.add_tokens(["2 3"])  # which changes the ids and none of the words
        tokenizer.save_pretrained(tmp_path / "own")
    assert digests[0] != digests[1]
    with pytest.raises(ValueError, match="tokenizer is missing"):
        load_recovery_data(model, Recovery(data=f"text:{text}"), tmp_path / "none")
    recovery = {"stages": "", "tokenizer": str(tmp_path / "other"), "held_out": 0.1}
    command = ["convert", str(tmp_path / "none"), "--design=relu", f"--out={tmp_path / 'without'}"]
    assert main([*command, f"--recover=text:{text}", f"--recovery={json.dumps(recovery)}"]) == 0
    assert load_tokenizer(str(tmp_path / "without")).get_vocab()["20"] == 5
    command = ["convert", str(tmp_path / "own"), "--design=relu", f"--out={tmp_path / 'out'}"]
    for flag in (f"--recover=text:{text}", f"--sts={tmp_path / 'dev.tsv'}"):
        assert main([*command, flag, f'--recovery={{"tokenizer": "{tmp_path / "other"}"}}']) == 2
        assert "in which '20' is token 5; in the model's own, in" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "room"), [("bert", 64), ("roberta", 62), ("distilbert", 64), ("gpt2", 64)])
def test_text_longer_than_the_models_positions_is_refused_at_the_start(name: str, room: int, tmp_path, capsys) -> None:
    from formix.cli import main

    make(name).float().save_pretrained(tmp_path / "source")
    command = ["convert", str(tmp_path / "source"), "--design=relu", f"--out={tmp_path / 'out'}"]
    given = [("--recover=text:long.txt", {"stages": "match:3steps"})]
    given += [("--perplexity=text:long.txt", {})] if name == "gpt2" else []
    for data, stages in given:
        recovery = json.dumps({**stages, "sequence_length": 128})
        assert main([*command, data, f"--recovery={recovery}"]) == 2
        error = capsys.readouterr().err
        assert "sequence_length is 128; this " in error
        assert f"has {room} positions: give {room} or less." in error
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match=f"has {room} positions"):
        load_recovery_data(formix.convert(make(name), "relu"), Recovery(data="text:x", sequence_length=room + 1), "x")


@pytest.mark.parametrize("name", ["llama-dynamic", "qwen2", "mistral"])
def test_models_with_rotary_positions_take_any_length(name: str) -> None:
    source = make(name)
    assert positions(source.config) is positions(formix.convert(source, "relu").config) is None


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_the_command_recovers(kind: str, tmp_path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    from formix.cli import main

    def kill(*args: object, **kwargs: object) -> None:
        raise KilledError

    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"the number {i} comes after {i - 1} . it is not {i + 1} at all ." for i in range(200)))
    names = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        "the",
        "number",
        "comes",
        "after",
        "it",
        "is",
        "not",
        "at",
        "all",
        ".",
    ]
    words = hf.BertTokenizer(vocab={w: i for i, w in enumerate(dict.fromkeys(names))})
    encoder = kind == "encoder"
    source = hf.BertModel(hf.BertConfig(**TEXT)) if encoder else hf.GPT2LMHeadModel(hf.GPT2Config(**GPT2))
    source.save_pretrained(tmp_path / "source")
    words.save_pretrained(tmp_path / "source")
    recovery = {"stages": "match:3steps,align:3steps" + ("" if encoder else ",task:3steps"), "batch_tokens": 256,
                "sequence_length": 16, "calibration": 1, "evaluations": 1}  # fmt: skip
    flags = [f"--recovery={json.dumps(recovery)}", f"--recover=text:{text}", f"--out={tmp_path / 'out'}"]
    flags += ["--search=2"] if encoder else []
    flags += [] if encoder else [f"--perplexity=text:{text}", f"--record={tmp_path / 'records'}"]
    command = ["convert", str(tmp_path / "source"), "--design=relu+parallel", *flags]
    if encoder:
        fast = [*command, "--max-milliseconds=1e6", f"--out={tmp_path / 'fast'}"]
        assert main(fast) == 2
        assert "no layer need be converted for max_milliseconds=1e+06" in capsys.readouterr().err
        # killed while it saves: nothing that was recovered is lost
        with monkeypatch.context() as patch:
            patch.setattr(formix, "save", kill)
            with pytest.raises(KilledError):
                main(command)
        with monkeypatch.context() as patch:
            patch.setattr("formix.conversion.search.search", kill)
            patch.setattr("formix.conversion.recover.train", kill)
            assert main(command) == 0
    else:
        assert main(command) == 0
    record = json.loads((tmp_path / "out" / "conversion.json").read_text())
    assert [s["stage"] for s in record["stages"]] == ["calibrate", "match", "align"] + ([] if encoder else ["task"])
    assert record["data"][0]["sha256"]
    assert [len(v) for v in record["match_errors"].values()] == [len(record["match_parts"])] * 3
    page = (tmp_path / "out" / "report.html").read_text()
    assert "<script" not in page
    for values in record["match_errors"].values():
        assert all(f"{value:.4f}" in page for value in values)
    window = source.config.max_position_embeddings
    assert [row["input"] for row in record["speed"]] == ["32 tokens", f"{window} tokens"]
    assert f"{record['speed'][0]['before_ms'] / record['speed'][0]['after_ms']:.2f}" in page
    assert not (tmp_path / "out" / "recovery").exists()
    if not encoder:
        assert list(record["metrics"]) == ["source", "converted", "calibrated", "match", "align", "task"]
        values = [record["metrics"][step]["perplexity"] for step in ("source", "converted", "calibrated", "task")]
        table = (tmp_path / "records" / "README.md").read_text()
        assert " | ".join(f"{v:.4f}" for v in values) in table
        assert f"{values[-1] - values[0]:+.4f}" in table
    design = formix.design(formix.load(tmp_path / "out").config.design)
    parallel = [design.layer(i, 3).layout.parallel for i in range(3)]
    if encoder:
        found = json.loads((tmp_path / "out" / "search.json").read_text())
        assert [i for i in range(3) if parallel[i]] == found["chosen"] == found["curve"][2]["layers"]
    else:
        assert all(parallel)


CONVERSIONS = [path for path in sorted(STUDIES.glob("*.yaml")) if "source" in yaml.safe_load(path.read_text())]


@pytest.mark.parametrize("study", CONVERSIONS, ids=lambda path: path.stem)
def test_the_studies_of_conversion_are_understood(study: Path) -> None:
    name, config = _config([str(study), "--source=elsewhere"])
    assert (name, config.source) == (study.stem, "elsewhere")
    assert parse_stages(Recovery(data=str(config.recover), **config.recovery).stages)
    for design in config.design.split(","):
        formix.design(design)


def test_a_study_runs_all_its_designs(tmp_path, capsys) -> None:
    from formix.cli import main

    words = hf.BertTokenizer(
        vocab={w: i for i, w in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefgh"])}
    )
    hf.BertModel(hf.BertConfig(**TEXT)).save_pretrained(tmp_path / "source")
    words.save_pretrained(tmp_path / "source")
    letters = "abcdefgh"
    rows = [
        f"{' '.join(letters[i % 3 : i % 5 + 3])}\t{' '.join(letters[i % 2 : i % 7 + 2])}\t{i % 6}" for i in range(40)
    ]
    (tmp_path / "STS-B").mkdir()
    for split in ("train", "dev"):
        (tmp_path / "STS-B" / f"{split}.tsv").write_text("\n".join(["sentence1\tsentence2\tscore", *rows]) + "\n")
    recovery = {"stages": "match:1steps,align:1steps", "calibration": 1, "evaluations": 1, "held_out": 0.2}
    flags = [
        f"--source={tmp_path / 'source'}", f"--recover=glue:{tmp_path / 'STS-B'}*3", f"--out={tmp_path / 'out'}",
        f"--sts={tmp_path / 'STS-B' / 'dev.tsv'}", f"--record={tmp_path / 'records'}", "--threads=1",
        f"--recovery={json.dumps(recovery)}",
    ]  # fmt: skip
    assert main(["convert", str(STUDIES / "minilm.yaml"), *flags]) == 0
    counts = json.loads((tmp_path / "out" / "relu" / "conversion.json").read_text())["data"][0]["counts"]
    assert counts["train"] == 3 * counts["different"]
    table = (tmp_path / "records" / "README.md").read_text()
    for design in ("relu", "paf", "sima", "relu+paf"):
        assert f"| minilm | {design} | sts_spearman |" in table
        assert "request" not in json.loads(next((tmp_path / "records").glob("*.json")).read_text())
        assert (tmp_path / "out" / design / "conversion.json").is_file()
    capsys.readouterr()
    assert main(["convert", str(STUDIES / "minilm.yaml"), *flags]) == 0  # nothing is left to do
    assert capsys.readouterr().out.count("holds this conversion already") == 4
    assert (
        main(["convert", *(f for f in flags if "rec" not in f[:6]), "--design=paf", f"--out={tmp_path / 'plain'}"]) == 0
    )
    metrics = json.loads((tmp_path / "plain" / "conversion.json").read_text())["metrics"]
    assert list(metrics) == ["source", "converted"]
    assert all(list(values) == ["sts_spearman"] for values in metrics.values())
