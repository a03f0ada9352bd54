"""`formix train` and `formix eval`."""

import csv
import json
import logging
import os
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import formix
from formix.cli import main
from formix.data.glue import train_wordpiece
from formix.data.text import load_tokenizer
from formix.records import UNFINISHED
from formix.training import Point, Step, job
from formix.training.job import DiagnosticsFile, MetricsFile, OutputDirectory
from formix.training.trackers import Trackers

SMALL = [
    "--data=digits", "--design=relu", "--epochs=3", "--limit=128", "--batch-size=32", "--precision=float32",
    '--model_args={"depth": 1, "embed_dim": 16, "num_heads": 2, "patch_size": 4}', "--log-steps=1", "--evaluations=3",
    "--threads=1",  # sums in another number of parts would round differently
]  # fmt: skip


def rows(out: Path) -> list[dict[str, str]]:
    """metrics.csv without the times."""
    with (out / "metrics.csv").open() as file:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("trained") / "out"
    assert main(["train", *SMALL, f"--out={out}"]) == 0
    return out


def test_it_writes_model_metrics_and_checkpoints_and_eval_finds_the_same(trained, capsys):
    result = json.loads((trained / "result.json").read_text())
    assert [row["step"] for row in rows(trained)] == [str(step) for step in range(1, 13)]
    validations = [float(row["validation"]) for row in rows(trained) if row["validation"]]
    assert len(validations) == 3
    assert validations[-1] == result["validation"]
    assert len(list((trained / "checkpoints").iterdir())) == 3
    capsys.readouterr()
    assert main(["eval", str(trained), "--json=true"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "metric": "accuracy", "split": "test", "value": result["test"], "samples": 359, "skipped": {},
    }  # fmt: skip
    assert main(["eval", str(trained / "model"), "--data=digits", "--limit=128", "--split=validation"]) == 0
    assert f"{result['validation']:.4f}" in capsys.readouterr().out


def test_a_run_s_directory_is_a_source_of_conversion(trained, tmp_path):
    assert main(["convert", str(trained), "--design=paf", f"--out={tmp_path / 'paf'}"]) == 0
    ours, theirs = formix.convert(tmp_path / "paf", "relu").state_dict(), load_file(trained / "model/model.safetensors")
    assert formix.load(tmp_path / "paf").design == formix.design("paf")
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


def test_a_yaml_file_and_flags_are_one_configuration(tmp_path, capsys):
    text = "data: digits\nlimit: 64\nepochs: 1\nlr: 0.005\naugmentation: {flip: 0.5}\nmodel_args: {depth: 1}\n"
    (tmp_path / "run.yaml").write_text(text)
    assert main(["train", str(tmp_path / "run.yaml"), "--lr=0.002", f"--out={tmp_path / 'out'}"]) == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["lr"], config["limit"], config["augmentation"]["flip"]) == (0.002, 64, 0.5)


@pytest.mark.parametrize(
    ("data", "flags"),
    [
        ("text", ["--sequence-length=16", "--model=gpt2-nano"]),
        ("text", ["--sequence-length=16", "--task=masked-lm", "--model=bert-tiny"]),
        ("glue", ["--model=bert-tiny", "--parallel=fsdp"]),
    ],
    ids=["causal-lm", "masked-lm", "regression"],
)
def test_the_other_tasks(tmp_path, data, flags, capsys):
    (tmp_path / "a.txt").write_text("the quick brown fox jumps over the lazy dog. " * 60)
    lines = ["sentence1\tsentence2\tscore", *(f"a cat {i}\ta dog {i}\t{i % 5}" for i in range(40))]
    (tmp_path / "STS-B").mkdir()
    for split in ("train", "dev"):
        (tmp_path / "STS-B" / f"{split}.tsv").write_text("\n".join(lines) + "\n")
    name = f"text:{tmp_path / 'a.txt'}" if data == "text" else f"glue:{tmp_path / 'STS-B'}"
    sizes = {"n_layer": 1, "n_embd": 16, "n_head": 2} if "--model=gpt2-nano" in flags else {"num_hidden_layers": 1}
    flags = [*flags, f"--data={name}", f"--model_args={json.dumps(sizes)}", "--epochs=1", f"--out={tmp_path / 'out'}"]
    assert main(["train", *flags, "--evaluations=1"]) == 0
    assert "Writing" not in capsys.readouterr().err  # transformers' bar
    assert main(["eval", str(tmp_path / "out"), "--json=true"]) == 0
    test = json.loads((tmp_path / "out" / "result.json").read_text())["test"]
    assert json.loads(capsys.readouterr().out)["value"] == pytest.approx(test)


@pytest.fixture
def run_of(tmp_path):
    """A run's directory, as far as `formix eval` reads it."""

    def make(model: str, config: dict, **arguments) -> Path:
        out = tmp_path / "run"
        formix.save(formix.create_model(model, "relu", **arguments), out / "model")
        (out / "checkpoints").mkdir()
        (out / "config.json").write_text(json.dumps(config))
        return out

    return make


def test_other_classes_than_the_model_s(tmp_path, capsys, caplog):
    model = formix.create_model("vit_tiny_patch16_224", depth=1, embed_dim=8, num_heads=1, img_size=32, num_classes=2)
    model.pretrained_cfg = {**model.pretrained_cfg, "label_names": ["ant", "bee"]}
    formix.save(model, tmp_path / "model")
    for classes, status in ((("ant", "bee"), 0), (("bee", "cat"), 2), (("cat", "dog"), 0)):
        root = tmp_path / "-".join(classes)
        for split in ("train", "val"):
            for name in classes:
                (root / split / name).mkdir(parents=True)
                for i in range(2):
                    Image.new("RGB", (32, 32), (i, 0, 0)).save(root / split / name / f"{i}.png")
        caplog.clear()
        assert main(["eval", str(tmp_path / "model"), f"--data=folder:{root}"]) == status
        error = capsys.readouterr().err
        assert ("has 'ant' as class 0, and" in error) == (classes[0] == "bee")
        assert ("taken for the same" in caplog.text) == (classes[0] == "cat")


def test_a_metric_that_is_no_number_is_null_in_json(tmp_path, capsys):
    sizes = {"img_size": 8, "patch_size": 4, "in_chans": 1, "embed_dim": 8, "depth": 1, "num_heads": 1}
    model = formix.create_model("vit_tiny_patch16_224", "relu", num_classes=10, **sizes)
    with torch.no_grad():
        model.head.bias[3] = torch.nan
    formix.save(model, tmp_path)
    assert main(["eval", str(tmp_path), "--data=digits", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["value"] is None


BERT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}


def test_other_text_is_read_as_the_training_s_was(run_of, tmp_path, capsys):
    """The tokenizer, the task and the window are the model's, not the data's."""
    text, tokenizer = "the cat sat on the mat. " * 400, str(tmp_path / "words")
    (tmp_path / "a.txt").write_text(text)
    train_wordpiece([text]).save_pretrained(tokenizer)
    recorded = {"data": "stdlib", "task": "masked-lm", "mask_probability": 0.3, "tokenizer": tokenizer, "limit": 9}
    out = run_of("bert-tiny", {**recorded, "sequence_length": 16}, task="masked-lm", vocab_size=300, **BERT)
    other = f"--data=text:{tmp_path / 'a.txt'}"
    assert main(["eval", str(out), other, "--json"]) == 0
    ours = json.loads(capsys.readouterr().out)
    assert ours["metric"] == "perplexity"
    flags = [f"--tokenizer={tokenizer}", "--mask-probability=0.3", "--sequence-length=16"]
    assert main(["eval", str(out / "model"), other, "--json", *flags]) == 0  # masked-lm is in the model's class
    assert json.loads(capsys.readouterr().out) == ours
    assert main(["eval", str(out / "model"), other]) == 2  # bytes, which are not its tokens
    assert "read the text with the tokenizer that it was trained with" in capsys.readouterr().err
    load_tokenizer(tokenizer).save_pretrained(out / "model")
    assert main(["eval", str(out / "model"), other, "--json", *flags[1:]]) == 0  # those that lie beside it
    assert json.loads(capsys.readouterr().out) == ours
    assert main(["eval", str(out), other, "--sequence-length=1000"]) == 2
    assert "sequence_length is 1000" in capsys.readouterr().err
    formix.save(formix.create_model("gpt2-nano", "relu", vocab_size=300, n_positions=64), tmp_path / "short")
    assert main(["eval", str(tmp_path / "short"), other, f"--tokenizer={tokenizer}"]) == 2
    assert "sequence_length is 128; this" in capsys.readouterr().err


def test_a_vocabulary_made_of_sentences_is_not_made_of_others(run_of, tmp_path, capsys):
    (tmp_path / "RTE").mkdir()
    for split in ("train", "dev"):
        rows = [f"a {split} {i}\tno {i}\t{'entailment' if i % 2 else 'not_entailment'}" for i in range(40)]
        (tmp_path / "RTE" / f"{split}.tsv").write_text("\n".join(["sentence1\tsentence2\tlabel", *rows]) + "\n")
    recorded = {"data": "glue:elsewhere/SST-2", "tokenizer": None, "limit": None, "validation_fraction": None}
    out = run_of("bert-tiny", recorded, num_labels=2, vocab_size=8000, **BERT)
    assert main(["eval", str(out), f"--data=glue:{tmp_path / 'RTE'}"]) == 2
    assert "a vocabulary of the sentences of 'glue:elsewhere/SST-2'" in capsys.readouterr().err
    train_wordpiece(["a train dev no entailment"]).save_pretrained(out / "model")
    assert main(["eval", str(out), f"--data=glue:{tmp_path / 'RTE'}", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["samples"] == 40


def test_other_pictures_are_scaled_to_the_model_s_size(trained, capsys):
    model = formix.create_model(
        "vit_tiny_patch16_224", "relu", img_size=12, patch_size=4, in_chans=1, num_classes=10, depth=1
    )
    formix.save(model, trained.parent / "twelve")
    assert main(["eval", str(trained.parent / "twelve"), "--data=digits", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["samples"] == 359


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_ended_by_a_signal_and_started_again_it_ends_as_if_undisturbed(trained, tmp_path, monkeypatch, capsys, number):
    add = MetricsFile.add

    def add_and_kill(self, step):
        add(self, step)
        if step.step == 5:
            os.kill(os.getpid(), number)

    command = ["train", *SMALL, f"--out={tmp_path / 'out'}"]
    finished = []
    monkeypatch.setattr(Trackers, "finish", lambda self: finished.append(self.names))
    monkeypatch.setattr(MetricsFile, "add", add_and_kill)
    assert main(command) == 128 + number
    assert len(finished) == 1
    said = capsys.readouterr().err
    assert f"ended by {number.name}" in said
    assert "goes on from here" in said
    assert not (tmp_path / "out" / "model").exists()
    monkeypatch.undo()
    assert main(command) == 0
    assert rows(tmp_path / "out") == rows(trained)
    one, other = (load_file(out / "model" / "model.safetensors") for out in (trained, tmp_path / "out"))
    assert all(one[name].equal(other[name]) for name in one)


def test_a_run_does_not_go_on_with_a_tokenizer_that_was_changed_in_place(tmp_path, capsys):
    text, tokenizer = "The cat sat on the mat. " * 300, str(tmp_path / "words")
    (tmp_path / "a.txt").write_text(text)
    words = train_wordpiece([text])
    words.save_pretrained(tokenizer)
    command = ["train", f"--data=text:{tmp_path / 'a.txt'}", f"--tokenizer={tokenizer}", f"--out={tmp_path / 'out'}"]
    command += ["--sequence-length=16", "--epochs=1", '--model_args={"n_layer": 1, "n_embd": 16, "n_head": 2}']
    assert main(command) == main(command) == main(["eval", str(tmp_path / "out")]) == 0
    words.add_tokens(["The"])
    words.save_pretrained(tokenizer)
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    capsys.readouterr()
    assert main(command) == 2
    said = capsys.readouterr().err.strip()
    assert "is of a run with sha256 of the data and tokenizer" in said
    assert len(said.splitlines()) == 1
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()} == before
    assert main(["eval", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err.strip()
    assert f"is not the one in {tmp_path / 'out' / 'model'}, which the model was trained with" in said
    assert main(["eval", str(tmp_path / "out"), f"--tokenizer={tmp_path / 'out' / 'model'}"]) == 0


def test_a_plan_is_printed_and_nothing_is_started(tmp_path, capsys):
    assert main(["train", *SMALL, "--plan", f"--out={tmp_path / 'out'}"]) == 0
    printed = capsys.readouterr().out
    for line in ("parameters", "operations", "memory", "speed", "time"):
        assert any(row.startswith(line) for row in printed.splitlines())
    assert not (tmp_path / "out").exists()


def test_a_plan_is_measured_where_the_run_will_be(monkeypatch, capsys):
    monkeypatch.setattr("formix.training.parallel.start", lambda: SimpleNamespace(device="the GPU"))
    monkeypatch.setattr("formix.training.plan.plan", lambda model, data, config, device: f"measured on {device}")
    assert main(["train", *SMALL, "--plan"]) == 0
    assert capsys.readouterr().out == "measured on the GPU\n"


@pytest.mark.parametrize("verb", ["plan", "eval"])
def test_of_several_processes_the_first_alone_prints(verb, trained, monkeypatch, capsys):
    command = ["train", *SMALL, "--plan"] if verb == "plan" else ["eval", str(trained)]
    for process in (1, 0):
        monkeypatch.setattr("formix.training.parallel.process_count", lambda process=process: (process, 2))
        capsys.readouterr()
        assert main(command) == 0
        assert bool(capsys.readouterr().out) is (process == 0)


def test_of_several_processes_the_first_alone_warns(monkeypatch):
    settings = {}
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "0")
    monkeypatch.setattr("logging.basicConfig", lambda **given: settings.update(given))
    for process, level in (("1", logging.ERROR), ("0", logging.WARNING)):
        monkeypatch.setenv("RANK", process)
        assert main(["designs"]) == 0
        assert settings["level"] == level


def test_diagnostics_have_every_layer_at_every_evaluation_and_change_nothing(trained, tmp_path):
    out = tmp_path / "out"
    assert main(["train", *SMALL, "--diagnostics", "--trackers=tensorboard", f"--out={out}"]) == 0
    assert rows(out) == rows(trained)
    with (out / "diagnostics.csv").open() as file:
        figures = list(csv.DictReader(file))
    evaluated = [row["step"] for row in rows(out) if row["validation"]]
    assert sorted({row["step"] for row in figures}, key=int) == evaluated
    for step in evaluated:
        assert {row["figure"] for row in figures if row["step"] == step} == {"rms", "spread", "active"}
    assert list((out / "tensorboard").glob("events*"))


def test_a_start_that_was_killed_while_it_wrote_its_settings_leaves_nothing_that_the_next_one_minds(tmp_path):
    (tmp_path / f".config.json.4321{UNFINISHED}").write_text('{"data"')  # as `write_atomically` has it
    OutputDirectory(tmp_path)
    (tmp_path / "thesis.txt").write_text("important")
    with pytest.raises(ValueError, match="no training run of formix's"):
        OutputDirectory(tmp_path)


def test_a_second_start_leaves_the_first_alone(tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    first = OutputDirectory(out)
    first.claim({})
    (out / "checkpoints" / ".partial-000000003").mkdir(parents=True)  # which the first is writing
    monkeypatch.setattr(job, "PATIENCE", 0.1)
    command = ["train", *SMALL, "--epochs=1", f"--out={out}"]
    assert main(command) == 2
    assert capsys.readouterr().err.strip().endswith("another formix train is under way there; wait for it, or choose "
        "another --out.")  # fmt: skip
    assert (out / "checkpoints" / ".partial-000000003").is_dir()
    first.release()
    assert main(command) == 0


def test_a_run_that_returns_to_a_checkpoint_leaves_no_rows_of_what_it_left(tmp_path):
    def step(number: int, loss: float, point: bool = False) -> Step:
        point = Point(step=number, epoch=0.0, seconds=0.0, train_loss=loss, validation=loss) if point else None
        return Step(step=number, epoch=0.0, progress=0.0, loss=loss, lr=0.0, seconds=0.0, samples=0, point=point)

    metrics, diagnostics = MetricsFile(tmp_path / "metrics.csv", 2), DiagnosticsFile(tmp_path / "diagnostics.csv")
    for done in [step(n, 1.0, point=n == 4) for n in (1, 2, 3, 4, 5, 6)] + [step(n, 2.0) for n in (3, 4)]:
        metrics.add(done)
        diagnostics.reach(done.step)
        if done.point:
            diagnostics.add(done.step, {"rms/0": done.loss})
    assert [(row["step"], row["loss"]) for row in rows(tmp_path)] == [("2", "1.0"), ("4", "2.0")]
    assert (tmp_path / "diagnostics.csv").read_text().splitlines() == ["step,figure,layer,value"]
    assert b"\r" not in (tmp_path / "metrics.csv").read_bytes()  # all lines end alike, before and after


@pytest.mark.parametrize("policy", ["stop", "rewind"])
def test_a_run_that_diverged_is_advised_what_it_did_not_try(policy, tmp_path, capsys):
    wild = ["--optimizer=sgd", "--lr=10", "--clip=0", "--warmup=0", "--weight-decay=1e6", f"--on-divergence={policy}"]
    assert main(["train", *SMALL, *wild, "--save-steps=1", f"--out={tmp_path / 'out'}"]) == 2
    said = capsys.readouterr().err
    assert "The run diverged: " in said
    assert ("or use --on-divergence=rewind" in said) == (policy == "stop")


@pytest.mark.parametrize("name", ["metrics.csv", "diagnostics.csv"])
def test_a_damaged_table_of_a_run_that_goes_on_is_named(name, trained, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(trained, out)
    shutil.rmtree(max((out / "checkpoints").glob("step-*")))
    (out / name).write_bytes(b"step,loss\n1,\xb3\n")
    command = ["train", *SMALL, f"--out={out}"]
    assert main(command) == 2
    assert f"{out / name} is damaged" in capsys.readouterr().err
    (out / name).unlink()
    assert main(command) == 0


@pytest.mark.parametrize("damaged", ["{", "[1]", "{}"])
def test_damaged_settings_of_a_run_are_named(damaged, trained, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(trained, out)
    (out / "config.json").write_text(damaged)
    assert main(["eval", str(out)]) == 2
    assert f"{out / 'config.json'} is damaged" in capsys.readouterr().err
    assert main(["eval", str(out / "model"), "--data=digits", "--limit=128"]) == 0


WRONG = {
    "recipe": (["train", "deti"], "'deti' is no recipe"),
    "missing file": (["train", "none.yaml"], "none.yaml is no file"),
    "unknown setting": (["train", "--colour=red"], "--colour is no setting of formix train; "),
    "misspelt setting": (["train", "--batch-sizes=3"], "did you mean batch_size"),
    "misspelt key": (
        ["train", "{tmp}/rate.yaml"],
        "/rate.yaml: learning_rate is no setting of formix train; did you mean lr? formix train --help",
    ),
    "misspelt key of a group": (
        ["train", "{tmp}/group.yaml"],
        "/group.yaml: augmentation.mixpu is no setting of formix train; did you mean augmentation.mixup",
    ),
    "unknown key of a group": (
        ["train", '--augmentation={"zz": 1}'],
        "known are augmentation.crop, augmentation.shift",
    ),
    "value in a file": (["train", "{tmp}/value.yaml"], "/value.yaml: lr is 0.0; it must be"),
    "value in a flag": (["train", "{tmp}/value.yaml", "--lr=1", "--epochs=0"], "formix: epochs is 0.0; it must be"),
    "log steps": (["train", "--log-steps=0"], "log_steps is 0"),
    "augmented text": (
        ["train", "--data=text:{tmp}/a.txt", "--augmentation.flip=0.5", "--out={tmp}/new"],
        "augmentation is for images",
    ),
    "loss of text": (
        ["train", "--data=text:{tmp}/a.txt", "--task=masked-lm", "--loss=sigmoid", "--out={tmp}/new"],
        "loss is 'sigmoid', which is for classes",
    ),
    "masked images": (["train", "--task=masked-lm"], "masked-lm needs text"),
    "taken directory": (["train", "--out={tmp}/thesis"], "no training run of formix's"),
    "a model's directory": (["train", "--out={tmp}/model"], "model exists and is no training run of formix's"),
    "another rate": (["train", *SMALL, "--lr=0.5", "--out={trained}"], "with lr 0.001 and this one has lr 0.5"),
    "another design": (["train", *SMALL, "--design=paf", "--out={trained}"], "with design relu and this one has"),
    "a tracker": (["train", "--trackers=diary", "--out={tmp}/out"], "'diary' is no tracker"),
    "a tracker twice": (["train", "--trackers=tensorboard,tensorboard", "--out={tmp}/out"], "something is named twice"),
    "evaluation of nothing": (["eval", "{tmp}/none", "--data=digits"], "none is no model directory"),
    "evaluation without data": (["eval", "{trained}/model"], "give --data"),
    "evaluation of other classes": (["eval", "{trained}/model", "--data=text:{tmp}/a.txt"], "reads images, which"),
    "evaluation of other channels": (
        ["eval", "{trained}", "--data=folder:{tmp}/pictures"],
        "takes images of 1 x 8",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_said_in_one_sentence(case, trained, tmp_path, capsys):
    arguments, named = WRONG[case]
    (tmp_path / "a.txt").write_text("the cat sat on the mat. " * 400)
    for place in ("train/a/0", "train/a/1", "train/a/2", "train/b/0", "train/b/1", "train/b/2", "val/a/0", "val/b/0"):
        path = tmp_path / "pictures" / f"{place}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 16)).save(path)
    for name, content in (("rate", "learning_rate: 3"), ("group", "augmentation: {mixpu: 1}"), ("value", "lr: 0")):
        (tmp_path / f"{name}.yaml").write_text(f"data: digits\n{content}\n")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.txt").write_text("important")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "bert"}')
    before = {p: p.stat().st_mtime_ns for p in trained.rglob("*")}
    assert main([a.format(tmp=tmp_path, trained=trained) if "{t" in a else a for a in arguments]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1, said
    assert named in said[0]
    assert {p: p.stat().st_mtime_ns for p in trained.rglob("*") if p.is_file()}.items() <= before.items()
    assert not (tmp_path / "new").exists()
