import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys

import pytest
import timm

import formix
from formix.cli import USAGE, VERBS, main
from formix.data.glue import train_wordpiece
from formix.data.text import load_tokenizer
from formix.training.recipes import list_recipes
from formix.training.signals import Interrupted

SMALL = [
    "--designs=softmax,relu", "--seeds=1", "--epochs=1", "--limit=64", "--precision=float32", "--latency=false",
    '--model_args={"depth": 1, "embed_dim": 16, "num_heads": 2, "patch_size": 4}',
]  # fmt: skip


def test_designs_lists_every_design_with_its_formula(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "250")
    assert main(["designs"]) == 0
    printed = capsys.readouterr().out
    for name in formix.list_designs():
        assert any(line.startswith(name) and formix.design(name).describe() in line for line in printed.splitlines())


def test_designs_prints_the_json_of_a_combination(capsys):
    assert main(["designs", "relu+paf"]) == 0
    text = capsys.readouterr().out.splitlines()[1]
    assert formix.Design.from_json(text) == formix.design("relu+paf")


def test_data_and_implementations_list_what_there_is(capsys):
    assert main(["data"]) == 0
    assert "glue:DIR/TASK" in capsys.readouterr().out
    assert main(["implementations"]) == 0
    printed = capsys.readouterr().out
    assert "pointwise_attention" in printed
    assert "reference" in printed


def test_compare_prints_the_table_and_writes_the_report(tmp_path, capsys):
    out = tmp_path / "out [b]"  # which is no style of the terminal's
    assert main(["compare", "--data=digits", *SMALL, f"--out={out}"]) == 0
    printed = capsys.readouterr().out
    assert "relu" in printed
    assert f"Report: {out / 'report.html'}" in printed
    page = (out / "report.html").read_text()
    assert "relu" in page
    assert "softmax" in page


def test_studies_and_flags_are_one_configuration_and_several_studies_share_a_report(tmp_path):
    for name, designs in (("first", "softmax"), ("second", "softmax,relu")):
        (tmp_path / f"{name}.yaml").write_text(f"data: digits\ndesigns: {designs}\nseeds: 2\n")
    studies = [str(tmp_path / "first.yaml"), str(tmp_path / "second.yaml")]
    rest = [flag for flag in SMALL if not flag.startswith("--designs")]
    assert main(["compare", *studies, *rest, "--batch-size=32", f"--out={tmp_path / 'out'}"]) == 0
    results = json.loads((tmp_path / "out" / "second" / "results.json").read_text())
    assert (results["config"]["seeds"], results["config"]["batch_size"]) == (1, 32)
    assert [d["design"] for d in results["designs"]] == ["softmax", "relu"]
    assert (tmp_path / "out" / "report.html").is_file()


def test_studies_whose_directories_are_relative_and_absolute_share_a_report(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for name, out in (("first", "runs"), ("second", tmp_path / "there")):
        (tmp_path / f"{name}.yaml").write_text(f"data: digits\nout: {out}\n")
    studies = [str(tmp_path / f"{name}.yaml") for name in ("first", "second")]
    assert main(["compare", *studies, *SMALL, "--designs=softmax"]) == 0
    assert (tmp_path / "report.html").is_file()


def test_flags_may_be_apart_from_their_values(tmp_path):
    (tmp_path / "study.yaml").write_text("data: digits\nseeds: 3\n")
    flags = [part for flag in SMALL if not flag.startswith("--data") for part in flag.split("=", 1)]
    flags[flags.index("false")] = "False"
    assert main(["compare", "--config", str(tmp_path / "study.yaml"), *flags, "--out", str(tmp_path / "out")]) == 0
    assert json.loads((tmp_path / "out" / "results.json").read_text())["config"]["data"] == "digits"


def test_the_model_may_stand_first_or_last(capsys):
    from formix.commands.arguments import split_one
    from formix.commands.export import ExportConfig

    flags = ["--out", "x.onnx", "--cache", "--opset=20"]
    for arguments in (
        ["my-gpt2", *flags],
        [*flags, "my-gpt2"],
        ["--cache", "my-gpt2", "--out", "x.onnx", "--opset=20"],
    ):
        named, rest = split_one("export", arguments, ExportConfig)
        assert named == "my-gpt2"
        assert sorted(rest) == ["--cache", "--opset=20", "--out=x.onnx"]
    for verb in ("export", "eval", "analyze", "convert", "train"):
        assert main([verb, "one", "--seed=1", "two"]) == 2
        assert f"'one', 'two' stand without a flag, and formix {verb} takes one" in capsys.readouterr().err


def test_report_makes_the_page_and_the_table_again(tmp_path, capsys):
    assert main(["compare", "--data=digits", *SMALL, f"--out={tmp_path / 'out'}"]) == 0
    results = str(tmp_path / "out" / "results.json")
    assert main(["report", "--out", str(tmp_path / "again.html"), results]) == 0
    assert (tmp_path / "again.html").read_text() == (tmp_path / "out" / "report.html").read_text()
    capsys.readouterr()
    assert main(["report", str(tmp_path / "out"), "--markdown"]) == 0
    rows = capsys.readouterr().out.splitlines()
    assert sum("relu" in row.split("|")[1] for row in rows if row.startswith("| ")) == 1
    assert main(["report", results, results, "--joint"]) == 0
    assert "| Design | digits, accuracy ↑ | digits, accuracy ↑ |" in capsys.readouterr().out


def test_analyze_prints_a_row_for_every_layer(tmp_path, capsys):
    model = formix.create_model(
        "vit_tiny_patch16_224", design="paf", img_size=8, patch_size=4, in_chans=1, depth=3, embed_dim=16, num_heads=2
    )
    formix.save(model, tmp_path / "model")
    arguments = ["analyze", f"--model={tmp_path / 'model'}", "--data=digits", "--batches=1"]
    assert main([*arguments, "--json=true"]) == 0
    assert len(json.loads(capsys.readouterr().out)["layers"]) == 3
    assert main(arguments) == 0
    table = capsys.readouterr().out
    assert "160 tokens" in table  # 32 images of 4 patches and a class token
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "config.json").write_text('{"data": "digits"}')
    assert main(["analyze", str(tmp_path), "--data=digits", "--batches=1"]) == 0
    assert capsys.readouterr().out == table  # of a training run: the model that it made


def test_analyze_reads_data_as_the_model_does(tmp_path, capsys):
    """Its tokenizer, and its images' size and statistics."""
    own, elsewhere, text = tmp_path / "bert", tmp_path / "words", tmp_path / "a.txt"
    text.write_text("the cat sat on the mat. " * 400)
    train_wordpiece([text.read_text()]).save_pretrained(elsewhere)
    words = len(load_tokenizer(str(elsewhere)))
    model = formix.create_model(
        "bert-tiny", "relu", task="features", vocab_size=words, hidden_size=16, num_hidden_layers=1,
        num_attention_heads=2, intermediate_size=16,
    )  # fmt: skip
    formix.save(model, own)
    command = ["analyze", str(own), f"--data=text:{text}", "--sequence-length=16", "--batches=1", "--json"]
    assert main(command) == 2
    assert "read the text with the tokenizer that it was trained with" in capsys.readouterr().err
    assert main([*command, f"--tokenizer={elsewhere}"]) == 0
    named = capsys.readouterr().out
    shutil.copytree(elsewhere, own, dirs_exist_ok=True)
    assert main(command) == 0
    assert capsys.readouterr().out == named
    train_wordpiece([text.read_text()[::-1]]).save_pretrained(tmp_path / "other")
    for wrong in (command, ["predict", str(own), "--text=the cat"]):
        assert main([*wrong, f"--tokenizer={tmp_path / 'other'}"]) == 2
        assert f"in the model's own, in '{own}', it is" in capsys.readouterr().err
    source = timm.create_model("vit_tiny_patch16_224", img_size=32, **TINY)
    formix.save(formix.convert(source, "relu"), tmp_path / "vit")
    assert main(["analyze", str(tmp_path / "vit"), "--data=digits", "--batches=1"]) == 0
    for directory, data, kind in ((own, "digits", "text"), (tmp_path / "vit", "stdlib", "images")):
        assert main(["analyze", str(directory), f"--data={data}"]) == 2
        assert f"reads {kind}, which {data!r} is not" in capsys.readouterr().err


def test_analyze_of_multiple_choice_and_of_cvt(tmp_path, capsys):
    """Each text is a choice of its own; CvT's channels are checked though its images have any size."""
    text, size = tmp_path / "a.txt", {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16}
    text.write_text("the cat sat on the mat. " * 400)
    formix.save(formix.create_model("bert-tiny", "paf", task="multiple-choice", vocab_size=256, **size), tmp_path / "a")
    command = ["analyze", f"{tmp_path / 'a'}", f"--data=text:{text}", "--sequence-length=16", "--batches=1"]
    assert main([*command, "--batch-size=3"]) == 0
    assert "3 sequences, 48 tokens" in capsys.readouterr().out
    cvt = {"depth": [1, 1, 1], "embed_dim": [16, 16, 16], "num_heads": [1, 1, 1]}
    for directory, channels, code in (("colour", 3, 2), ("grey", 1, 0)):
        formix.save(formix.create_model("cvt-13", "sima", in_chans=channels, **cvt), tmp_path / directory)
        assert main(["analyze", str(tmp_path / directory), "--data=digits", "--img-size=32", "--batches=1"]) == code
    assert "takes images of 3 x 32 x 32" in capsys.readouterr().err


TINY = {"depth": 1, "embed_dim": 16, "num_heads": 2}
WRONG = {
    "analysis of nothing": (["analyze", "--model={tmp}/none", "--data=digits"], "none is no model directory"),
    "report of nothing": (["report"], "results are missing"),
    "report of two kinds": (["report", "{tmp}", "--markdown", "--joint"], "both asked for"),
    "report over its results": (["report", "{tmp}", "--out={tmp}/results.json"], "results.json'; it must end in .html"),
    "report of a missing file": (["report", "{tmp}/none.json"], "none.json"),
    "report of a broken file": (["report", "{tmp}/broken.yaml"], "broken.yaml"),
    "verb": (["dance"], "'dance' is no verb"),
    "design": (["compare", "--designs=softmax,nope"], "'nope' is no design"),
    "combination": (["compare", "--designs=relu+sima"], "both choose the mixer"),
    "design option": (["compare", "--designs=relu(power=2)"], "'power' is no option"),
    "activation": (["compare", "--designs=relu(activation=tanh)"], "activation is 'tanh'"),
    "negative exponent": (["compare", "--designs=relu(length_exponent=-1)"], "length_exponent is -1"),
    "skip distance": (["compare", "--data=digits", "--designs=skip(source=distance(9))"], "distance must be 1 to 3"),
    "data": (["compare", "--data=mnist3d"], "Unknown data 'mnist3d'"),
    "missing folder": (["compare", "--data=folder:{tmp}/none"], "none"),
    "empty folder": (["compare", "--data=folder:{tmp}/empty"], "empty"),
    "unreadable image": (["compare", "--data=folder:{tmp}/pictures"], "0.png"),
    "short text": (["compare", "--data=text:{tmp}/short.txt"], "short.txt"),
    "missing text": (["compare", "--data=text:{tmp}/none.txt"], "none.txt"),
    "missing task": (["compare", "--data=glue:{tmp}/SST-2"], "SST-2"),
    "negative epochs": (["compare", "--epochs=-3"], "epochs is -3"),
    "absurd rate": (["compare", "--lrs=1e9"], "lrs has 1000000000"),
    "word for a number": (["compare", "--seeds=many"], "seeds"),
    "no seeds": (["compare", "--seeds=0"], "seeds is 0"),
    "huge batch of none": (["compare", "--batch_size=0"], "batch_size is 0"),
    "unknown flag": (["compare", "--colour=red"], "colour"),
    "broken YAML": (["compare", "{tmp}/broken.yaml"], "broken.yaml"),
    "unknown key in YAML": (["compare", "{tmp}/unknown.yaml"], "/unknown.yaml: colour is no setting of formix compare"),
    "missing YAML": (["compare", "{tmp}/none.yaml"], "none.yaml is no file"),
    "no YAML": (["compare", "digits"], "digits is no file; give a study's YAML"),
    "design beside a study": (
        ["compare", "{tmp}/study.yaml", "--designs=nope"],
        "formix: designs: 'nope' is",
    ),
    "rate beside a study": (["compare", "{tmp}/study.yaml", "--lrs=0"], "formix: lrs has 0.0; it must be above 0"),
    "unknown model": (["compare", "--data=digits", "--model=vit_nope"], "vit_nope"),
    "model of another kind": (["compare", "--data=digits", "--model=resnet18"], "ResNet"),
    "model argument": (["compare", "--data=digits", '--model_args={"colour": 1}'], "colour"),
    "heads that do not divide": (["compare", "--data=digits", '--model_args={"num_heads": 5}'], "num_heads"),
    "directory of something else": (["compare", "--data=digits", "--out={tmp}/empty/.."], "no comparison"),
    "name for data and a task": (["compare", "--data=glue:{tmp}/MNLI"], "MNLI"),
    "absurd budget": (["compare", "--epochs=1e300"], "epochs is 1e+300"),
    "number of no size": (["compare", "--epochs=nan"], "epochs is nan; it must be a finite number"),
    "choice": (["compare", "--precision=fp8"], "precision is fp8; it must be one of 'auto'"),
    "key twice in YAML": (["compare", "{tmp}/twice.yaml"], "'seeds' is there twice, in line 3"),
    "null for a number": (["compare", "{tmp}/null.yaml"], "seeds is null; it must be a whole number"),
    "list for a mapping": (["compare", "{tmp}/list.yaml"], "holds no settings"),
    "YAML in another encoding": (["compare", "{tmp}/latin.yaml"], "no UTF-8 text"),
    "flag without its file": (["compare", "--config"], "--config: expected one argument"),
    "code in YAML": (["compare", "{tmp}/code.yaml"], "code.yaml"),
    "option given twice": (["compare", "--designs=relu(length=3,length=4)"], "given twice"),
    "layer of a hybrid": (["compare", '--designs=relu(layers={"0": "skip"})'], "layers has 0: 'skip'"),
    "classes of the data": (["compare", "--data=digits", '--model_args={"num_classes": 3}'], "'data' decides"),
    "no layers": (["compare", "--data=digits", '--model_args={"depth": 0}'], "depth is 0"),
    "patch over the image": (["compare", "--data=digits", '--model_args={"patch_size": 99}'], "at least one patch"),
    "fraction": (["compare", "--data=digits", "--test-fraction=2"], "test_fraction=2.0"),
    "tokenizer of images": (["compare", "--data=digits", "--tokenizer={tmp}"], "is for text"),
    "image size of text": (["compare", "--data=text:{tmp}/short.txt", "--img-size=8"], "is for images"),
    "one class": (["compare", "--data=folder:{tmp}/pictures/a/.."], "0.png"),
    "file for a directory": (["compare", "--data=digits", "--out={tmp}/short.txt"], "no comparison"),
    "directory below a file": (["compare", "--data=digits", "--out={tmp}/short.txt/x"], "Not a directory"),
    "results of another version": (["report", "{tmp}/other.json"], "schema is 'formix.results/9'"),
    "results that are a list": (["report", "{tmp}/list.json"], "expected an object"),
    "damaged weights": (["analyze", "--model={tmp}/model", "--data=digits"], "model.safetensors is damaged"),
    "damaged model config": (["analyze", "--model={tmp}/config", "--data=digits"], "config.json is damaged"),
    "argument of a list": (["data", "digits"], "takes no arguments"),
    "damaged run": (["compare", "--data=digits", *SMALL, "--out={tmp}/finished"], "runs"),
    "damaged configuration": (["compare", "--data=digits", *SMALL, "--out={tmp}/claimed"], "config.json is damaged"),
}


@pytest.fixture(scope="module")
def wrong_files(tmp_path_factory):
    tmp = tmp_path_factory.mktemp("wrong")
    (tmp / "empty").mkdir()
    for label in ("a", "b"):
        (tmp / "pictures" / label).mkdir(parents=True)
        for i in range(20):
            (tmp / "pictures" / label / f"{i}.png").write_bytes(b"not a picture")
    (tmp / "short.txt").write_text("too short")
    (tmp / "broken.yaml").write_text("data: [digits\n  designs: {")
    (tmp / "unknown.yaml").write_text("data: digits\ncolour: red\n")
    (tmp / "study.yaml").write_text("data: digits\nlrs: 1e-3\n")
    (tmp / "twice.yaml").write_text("data: digits\nseeds: 1\nseeds: 2\n")
    (tmp / "null.yaml").write_text("data: digits\nseeds: null\n")
    (tmp / "list.yaml").write_text("- digits\n- softmax\n")
    (tmp / "latin.yaml").write_bytes("data: é\n".encode("latin-1"))
    (tmp / "code.yaml").write_text('data: !!python/object/apply:os.system ["touch made"]\n')
    (tmp / "other.json").write_text('{"schema": "formix.results/9"}')
    (tmp / "list.json").write_text("[]")
    model = formix.create_model("vit_tiny_patch16_224", "relu", img_size=8, patch_size=4, in_chans=1, **TINY)
    for name in ("model", "config"):
        formix.save(model, tmp / name)
    (tmp / "model" / "model.safetensors").write_bytes(b"no weights")
    (tmp / "config" / "config.json").write_text("{")
    assert main(["compare", "--data=digits", *SMALL, f"--out={tmp / 'finished'}"]) == 0
    for path in (tmp / "finished" / "runs").iterdir():
        path.write_text(path.read_text()[:50])
    (tmp / "claimed").mkdir()
    (tmp / "claimed" / "config.json").write_text("{")
    return tmp


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_ends_in_one_sentence_and_nothing_is_overwritten(case, wrong_files, capsys):
    arguments, named = WRONG[case]
    before = {p: p.read_bytes() for p in wrong_files.rglob("*") if p.is_file()}
    arguments = [a.replace("{tmp}", str(wrong_files)) for a in arguments]
    if arguments[0] == "compare" and not any(a.startswith("--out") for a in arguments):
        arguments.append(f"--out={wrong_files / 'new' / case.replace(' ', '-')}")
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert named in error
    assert len(error.strip().splitlines()) == 1
    assert error.startswith("formix: ")
    assert "Traceback" not in error
    assert {p: p.read_bytes() for p in wrong_files.rglob("*") if p.is_file()} == before


def test_at_least_twenty_kinds_of_wrong_input_are_tried():
    assert len(WRONG) >= 20
    assert len({named for _, named in WRONG.values()}) >= 20  # no two are the same complaint


def test_a_wrong_command_ends_with_a_non_zero_status():
    """In a process of its own, as a shell sees it."""
    process = subprocess.run([sys.executable, "-m", "formix.cli", "designs", "nope"], capture_output=True, text=True)
    assert (process.returncode, process.stdout) == (2, "")
    assert process.stderr.startswith("formix: 'nope' is no design")
    assert len(process.stderr.splitlines()) == 1


def test_a_reader_that_ends_early_is_no_error():
    """`formix data | head` on a pipe that nobody reads."""
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "formix.cli", "data"]
    process = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert (process.returncode, process.stderr) == (1, "")


@pytest.mark.parametrize("verb", ["compare", "convert"])
def test_what_is_one_process_is_refused_to_several(verb, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main([verb, "--design=relu"]) == 2
    assert f"formix {verb} is one process, and WORLD_SIZE is 2" in capsys.readouterr().err


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"formix {formix.__version__}\n"


def test_help_lists_the_verbs(capsys):
    assert main(["--help"]) == 0
    assert "compare" in capsys.readouterr().out
    assert main([]) == 2


@pytest.mark.parametrize("verb", USAGE)
def test_help_says_what_a_verb_takes_without_a_flag(verb, capsys):
    with contextlib.suppress(SystemExit):
        main([verb, "--help"])
    assert capsys.readouterr().out.startswith(f"usage: formix {verb} {USAGE[verb]}".rstrip())


def test_help_of_train_has_the_recipes():
    assert set(list_recipes()) == set(USAGE["train"].strip("[]").split(" | ")) - {"RUN.yaml"}


@pytest.mark.parametrize(("verb", "missing"), [("eval", "model is"), ("convert", "source and design are")])
def test_what_is_missing_is_named_with_the_usage(verb, missing, capsys):
    assert main([verb]) == 2
    assert f"formix: {missing} missing; usage: formix {verb} {USAGE[verb]} [" in capsys.readouterr().err


HELPFUL = [
    "compare", "convert", "train", "eval", "export", "predict", "analyze",
    *(f"bench {name}" for name in ("attention", "block", "model", "converted", "targets")),
]  # fmt: skip


@pytest.mark.parametrize("verb", HELPFUL)
def test_help_explains_every_flag(verb, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")  # a line for each
    with pytest.raises(SystemExit, match="0"):
        main([*verb.split(), "--help"])
    entries = [e.split("(type: ")[0] for e in capsys.readouterr().out.split("\n  --") if "(type: " in e]
    assert len(entries) >= 2
    silent = [entry for entry in entries if not re.sub(r"^\S+ \S+(, --\S+ \S+)*", "", entry).strip()]
    assert silent == []


@pytest.mark.parametrize(("process", "saying"), [("0", 1), ("1", 0)])
def test_of_the_processes_that_a_signal_ends_the_first_says_what_is_saved(monkeypatch, capsys, process, saying):
    def ended(arguments):
        raise Interrupted(signal.SIGTERM, "step 5 is saved")

    monkeypatch.setenv("RANK", process)
    monkeypatch.setitem(VERBS, "train", ended)
    assert main(["train"]) == 128 + signal.SIGTERM
    assert capsys.readouterr().err.count("ended by SIGTERM; step 5 is saved") == saying
