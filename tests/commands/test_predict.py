"""`formix predict`: a training run's directory is all it takes, and what it says is what `formix eval` counts."""

import csv
import io
import json
import shlex
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import resolve_model_data_config
from transformers import AutoTokenizer, pipeline

import formix
from formix.cli import main
from formix.data import load_data
from formix.data.byte_tokenizer import byte_tokenizer
from formix.data.glue import train_wordpiece

COLOURS = {"blue": (40, 60, 200), "green": (50, 190, 60), "red": (200, 40, 50)}
QUICK = ["--epochs=2", "--batch-size=16", "--precision=float32"]
SMALL_TEXT = '{"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}'


def lines(capsys) -> list[dict]:
    return [json.loads(line) for line in capsys.readouterr().out.split("\n") if line]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """Noisy pictures of three colours and many sizes, train/CLASS/*.png and val/CLASS/*.jpg."""
    root, draw = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for split, count, suffix in (("train", 16, "png"), ("val", 7, "jpg")):
        for name, colour in COLOURS.items():
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                noise = draw.normal(0, 90, (*draw.integers(20, 60, 2), 3))
                pixels = np.clip(noise + colour, 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{i}.{suffix}")
    return root


@pytest.fixture(scope="module", params=["vit", "cvt"])
def on_pictures(request, pictures, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp(request.param) / "run"
    model = {
        "vit": ['--model_args={"depth": 1, "embed_dim": 16, "num_heads": 2, "patch_size": 4}', "--lr=0.01"],
        "cvt": [
            "--model=cvt-13",
            '--model_args={"depth": [1, 1, 1], "embed_dim": [8, 12, 16], "num_heads": [1, 1, 2]}',
        ],
    }[request.param]
    flags = [f"--data=folder:{pictures}", "--img-size=32", "--design=relu", f"--out={out}"]
    assert main(["train", *flags, *model, *QUICK]) == 0
    return out


def test_the_share_of_right_answers_is_the_accuracy_that_eval_prints(on_pictures, pictures, capsys):
    capsys.readouterr()
    assert main(["eval", str(on_pictures), "--json"]) == 0
    accuracy = lines(capsys)[0]["value"]
    assert main(["predict", str(on_pictures), str(pictures / "val"), "--json", "--batch-size=4"]) == 0
    found = lines(capsys)
    assert len(found) == 21
    assert all(sorted(one["labels"]) == sorted(COLOURS) for one in found)
    assert all(sum(one["scores"]) == pytest.approx(1) for one in found)
    right = [one["labels"][0] == Path(one["input"]).parent.name for one in found]
    assert np.mean(right) == pytest.approx(accuracy)


def test_other_pictures_are_normalised_as_those_of_the_training(on_pictures, pictures, tmp_path, capsys):
    for file in pictures.rglob("*.png"):  # half as bright
        place = tmp_path / "dark" / file.relative_to(pictures)
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.asarray(Image.open(file)) // 2).save(place)
    capsys.readouterr()
    assert main(["predict", str(on_pictures), str(tmp_path / "dark"), "--json", "--top=1"]) == 0
    right = [one["labels"][0] == Path(one["input"]).parent.name for one in lines(capsys)]
    (tmp_path / "dark" / "train").rename(tmp_path / "dark" / "val")
    (tmp_path / "dark" / "train").symlink_to(pictures / "train")
    for directory in (on_pictures, on_pictures / "model"):
        assert main(["eval", str(directory), f"--data=folder:{tmp_path / 'dark'}", "--json"]) == 0
        assert lines(capsys)[0]["value"] == pytest.approx(np.mean(right))


def test_the_scores_are_those_of_the_prepared_pixels(on_pictures, pictures, capsys):
    data = load_data(f"folder:{pictures}", img_size=32)
    model = formix.load(on_pictures / "model")
    with torch.no_grad():
        output = model(data.test.__getitems__(range(21))["pixel_values"])
    expected = (output if isinstance(output, torch.Tensor) else output.logits).softmax(-1)
    capsys.readouterr()
    assert main(["predict", str(on_pictures), str(pictures / "val"), "--json", "--top=3"]) == 0
    found = [dict(zip(one["labels"], one["scores"], strict=True)) for one in lines(capsys)]
    scores = torch.tensor([[one[name] for name in sorted(COLOURS)] for one in found])
    torch.testing.assert_close(scores, expected, atol=2e-6, rtol=1e-4)


def test_timm_knows_how_the_pictures_are_prepared_and_what_the_classes_are(pictures, tmp_path):
    flags = [f"--data=folder:{pictures}", "--img-size=32", "--design=sima", f"--out={tmp_path / 'run'}"]
    assert main(["train", *flags, *QUICK, '--model_args={"depth": 1, "embed_dim": 16, "num_heads": 2}']) == 0
    model = timm.create_model(f"local-dir:{tmp_path / 'run' / 'model'}", pretrained=True)
    config = resolve_model_data_config(model)
    statistics = load_data(f"folder:{pictures}", img_size=32).provenance["normalisation"]
    assert np.allclose(config["mean"], np.array(statistics["mean"]) / 255)
    assert np.allclose(config["std"], np.array(statistics["std"]) / 255)
    assert (*config["input_size"], config["crop_pct"], config["interpolation"]) == (3, 32, 32, 1.0, "bilinear")
    assert list(model.pretrained_cfg["label_names"]) == sorted(COLOURS)
    again = formix.convert(formix.load(tmp_path / "run" / "model"), "relu")
    assert resolve_model_data_config(again) == {**config, "input_size": (3, 32, 32)}
    assert list(again.pretrained_cfg["label_names"]) == sorted(COLOURS)
    assert "label_names" not in formix.create_model(tmp_path / "run" / "model", num_classes=5).pretrained_cfg


def test_grey_models_read_pictures_in_grey(tmp_path, capsys):
    run = tmp_path / "run"
    assert main(["train", "--data=digits", "--limit=256", *QUICK, "--lr=0.003", f"--out={run}"]) == 0
    test = load_data("digits").test
    for i in range(40):
        image = Image.fromarray(test.pixels[i, 0].numpy())
        (image.convert("RGB") if i % 2 else image).save(tmp_path / f"{i:03d}.png")
    with torch.no_grad():
        expected = formix.load(run / "model")(test.__getitems__(range(40))["pixel_values"]).argmax(-1)
    capsys.readouterr()
    assert main(["predict", str(run), *(str(tmp_path / f"{i:03d}.png") for i in range(40)), "--json", "--top=1"]) == 0
    assert [int(one["labels"][0]) for one in lines(capsys)] == expected.tolist()


def test_features_of_a_model_without_classes(tmp_path, capsys):
    model = formix.create_model("vit_tiny_patch16_224", design="relu", depth=1, num_classes=0, img_size=32).eval()
    formix.save(model, tmp_path / "model")
    Image.new("RGB", (40, 40), (200, 10, 10)).save(tmp_path / "one.png")
    assert main(["predict", str(tmp_path / "model"), str(tmp_path / "one.png"), "--json"]) == 0
    assert len(lines(capsys)[0]["features"]) == model.num_features
    assert main(["predict", str(tmp_path / "model"), str(tmp_path / "one.png")]) == 0
    assert f"{model.num_features} features" in capsys.readouterr().out


def test_files_of_results(on_pictures, pictures, tmp_path, capsys):
    arguments = ["predict", str(on_pictures), str(pictures / "val" / "red"), "--top=2"]
    assert main([*arguments, "--json"]) == 0
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert main([*arguments, f"--out={tmp_path / 'new' / 'a.jsonl'}"]) == 0
    assert [json.loads(line) for line in (tmp_path / "new" / "a.jsonl").read_text().splitlines()] == printed
    assert main([*arguments, f"--out={tmp_path / 'a.csv'}"]) == 0
    with (tmp_path / "a.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["label_1"] for row in rows] == [one["labels"][0] for one in printed]
    assert [float(row["score_2"]) for row in rows] == [one["scores"][1] for one in printed]
    assert [p.name for p in tmp_path.iterdir() if "partial" in p.name] == []


@pytest.mark.parametrize("design", ["softmax", "relu"])
def test_a_model_of_bytes_brings_its_tokenizer_and_goes_on(design, tmp_path, capsys):
    (tmp_path / "text.txt").write_text("abc " * 3000)
    flags = [f"--data=text:{tmp_path / 'text.txt'}", "--sequence-length=32", f"--design={design}", "--lr=0.01"]
    small = '--model_args={"n_layer": 1, "n_embd": 32, "n_head": 2}'
    assert main(["train", *flags, small, *QUICK, f"--out={tmp_path / 'run'}"]) == 0
    capsys.readouterr()
    arguments = ["predict", str(tmp_path / "run"), "--text=abc ab", "--new-tokens=8"]
    assert main([*arguments, "--json"]) == 0
    assert lines(capsys) == [{"input": "abc ab", "text": "c abc ab"}]
    model, tokenizer = formix.load(tmp_path / "run/model"), AutoTokenizer.from_pretrained(tmp_path / "run/model")
    theirs = pipeline("text-generation", model=model, tokenizer=tokenizer)("abc ab", max_new_tokens=8, do_sample=False)
    assert theirs[0]["generated_text"] == "abc abc abc ab"
    assert (tmp_path / "run/checkpoints").is_dir()
    assert all((p / "model/tokenizer.json").is_file() for p in (tmp_path / "run/checkpoints").iterdir())
    assert main([*arguments, "--temperature=1", "--seed=3"]) == 0
    first = capsys.readouterr().out
    assert main([*arguments, "--temperature=1", "--seed=3"]) == 0
    assert capsys.readouterr().out == first
    assert main([*arguments[:-1], "--new-tokens=27"]) == 2
    assert "32 positions" in capsys.readouterr().err


def test_masks_are_filled(tmp_path, capsys):
    (tmp_path / "text.txt").write_text("abc " * 3000)
    flags = [f"--data=text:{tmp_path / 'text.txt'}", "--sequence-length=32", "--task=masked-lm", "--lr=0.01"]
    assert main(["train", *flags, f"--model_args={SMALL_TEXT}", *QUICK, f"--out={tmp_path / 'run'}"]) == 0
    capsys.readouterr()
    assert main(["predict", str(tmp_path / "run"), "--text=abc a[MASK]c abc", "--top=2", "--json"]) == 0
    (found,) = lines(capsys)
    assert len(found["labels"]) == len(found["scores"]) == 2
    assert found["scores"][0] >= found["scores"][1]
    assert main(["predict", str(tmp_path / "run"), "--text=abc"]) == 2
    assert "0 times [MASK]" in capsys.readouterr().err
    assert main(["predict", str(tmp_path / "run"), "--text=[MASK]" + "abc " * 8]) == 2
    assert "has 33 tokens and the model reads 32" in capsys.readouterr().err
    assert main(["predict", str(tmp_path / "run"), "--text=abc [MASK]", "--top=1000", "--json"]) == 0
    assert len(lines(capsys)[0]["labels"]) == 258


@pytest.fixture(scope="module")
def glue(tmp_path_factory) -> Path:
    """RTE's layout, with sentences that entail each other when they are the same; and STS-B's."""
    root, draw = tmp_path_factory.mktemp("glue"), np.random.default_rng(1)
    words = list("abcdefgh")
    for task, label in (("RTE", "label"), ("STS-B", "score")):
        (root / task).mkdir()
        for name, count in (("train", 60), ("dev", 20)):
            rows = [f"index\tsentence1\tsentence2\t{label}"]
            for i in range(count):
                first = " ".join(draw.choice(words, draw.integers(1, 12)))
                second = first if i % 2 else " ".join(draw.choice(words, draw.integers(1, 12)))
                answer = {"RTE": ["not_entailment", "entailment"][i % 2], "STS-B": str(5.0 * (i % 2))}[task]
                rows.append(f"{i}\t{first}\t{second}\t{answer}")
            (root / task / f"{name}.tsv").write_text("\n".join(rows) + "\n")
    return root


@pytest.mark.parametrize("task", ["RTE", "STS-B"])
def test_pairs_of_sentences(task, glue, tmp_path, capsys, monkeypatch):
    flags = [f"--data=glue:{glue / task}", "--sequence-length=24", f"--model_args={SMALL_TEXT}", "--design=relu"]
    assert main(["train", *flags, *QUICK, f"--out={tmp_path / 'run'}"]) == 0
    rows = [line.split("\t") for line in (glue / task / "dev.tsv").read_text().splitlines()[1:]]
    stdin = "".join(f"{row[1]}\t{row[2]}\n" for row in rows)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(stdin.encode())))
    capsys.readouterr()
    assert main(["predict", str(tmp_path / "run"), "-", "--json", "--batch-size=3"]) == 0
    found = lines(capsys)
    data, model = load_data(f"glue:{glue / task}", sequence_length=24), formix.load(tmp_path / "run" / "model")
    batch = data.test.__getitems__(range(20))
    with torch.no_grad():
        logits = model(**{k: v for k, v in batch.items() if k != "labels"}).logits
    if task == "STS-B":
        torch.testing.assert_close(
            torch.tensor([one["scores"][0] for one in found]), logits[:, 0], atol=1e-5, rtol=1e-4
        )
        assert all("labels" not in one for one in found)
    else:
        assert model.config.id2label == {0: "entailment", 1: "not_entailment"}
        names = [model.config.id2label[i] for i in logits.argmax(-1).tolist()]
        assert [one["labels"][0] for one in found] == names


def test_what_is_longer_than_in_training_is_cut_and_said(glue, tmp_path, capsys, caplog):
    flags = [f"--data=glue:{glue / 'RTE'}", "--sequence-length=16", f"--model_args={SMALL_TEXT}"]
    assert main(["train", *flags, *QUICK, f"--out={tmp_path / 'run'}"]) == 0
    (tmp_path / "texts.txt").write_text("a b\n" + "a b c d " * 10 + "\n")
    assert main(["predict", str(tmp_path / "run"), str(tmp_path / "texts.txt")]) == 0
    assert "1 of 2 texts have more than 16 tokens" in caplog.text


def test_embeddings_of_sentences(tmp_path, capsys):
    sentences = ["a cat sits", "the dog runs in a park"]
    tokenizer = train_wordpiece(sentences)
    small = json.loads(SMALL_TEXT)
    formix.save(formix.create_model("bert-tiny", task="features", vocab_size=len(tokenizer), **small), tmp_path)
    arguments = ["predict", str(tmp_path), f"--text={sentences[0]}", "--json"]
    assert main(arguments) == 2
    assert "--tokenizer" in capsys.readouterr().err
    tokenizer.save_pretrained(tmp_path)
    assert main(arguments) == 0
    assert np.linalg.norm(lines(capsys)[0]["features"]) == pytest.approx(1, abs=1e-5)


def saved_text_model(directory: Path, name: str, **arguments) -> Path:
    """A model of bytes with random weights, and its tokenizer, which has no padding."""
    small = {} if name in ("gpt2-nano", "llama-nano") else json.loads(SMALL_TEXT)
    model = formix.create_model(name, vocab_size=256, **small, **arguments)
    formix.save(model, directory)
    byte_tokenizer().save_pretrained(directory)
    return directory


@pytest.mark.parametrize("name", ["gpt2-nano", "bert-tiny"])
@pytest.mark.parametrize("task", ["features", "sequence-classification", "token-classification"])
def test_a_text_without_tokens_is_refused(tmp_path, capsys, name, task):
    where = saved_text_model(tmp_path, name, task=task)
    assert main(["predict", str(where), "--text="]) == 2
    assert "'' has no tokens for the model to read" in capsys.readouterr().err


def test_runs_of_tokens(tmp_path, capsys, caplog):
    where = saved_text_model(
        tmp_path, "bert-tiny", task="token-classification", num_labels=3, max_position_embeddings=8
    )
    (tmp_path / "texts.txt").write_text("AB cd\nab cd ab cd ab\n")
    arguments = ["predict", str(where), str(tmp_path / "texts.txt")]
    assert main([*arguments, "--json"]) == 0
    first, second = lines(capsys)
    assert "".join(first["runs"]).replace(" ", "") == "ABcd"
    assert len(first["runs"]) == len(first["labels"]) == len(first["scores"]) > 0
    assert all(label.startswith("LABEL_") for label in first["labels"])
    assert "1 of 2 texts have more than 8 tokens" in caplog.text
    assert main([*arguments, f"--out={tmp_path / 'a.csv'}"]) == 0
    with (tmp_path / "a.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["run"] for row in rows] == [*first["runs"], *second["runs"]]
    assert [float(row["score"]) for row in rows] == [*first["scores"], *second["scores"]]


def test_a_text_without_runs(tmp_path, capsys):
    where = saved_text_model(tmp_path, "bert-tiny", task="token-classification", num_labels=2)
    config = json.loads((where / "config.json").read_text())
    config["id2label"] = {"0": "O", "1": "O"}
    (where / "config.json").write_text(json.dumps(config))
    assert main(["predict", str(where), "--text=ab cd"]) == 0
    assert capsys.readouterr().out == "ab cd: no runs\n"
    assert main(["predict", str(where), "--text=ab cd", "--json"]) == 0
    assert lines(capsys) == [{"input": "ab cd", "labels": [], "scores": [], "runs": []}]


def test_lines_end_where_files_end_them(tmp_path, capsys):
    where = saved_text_model(tmp_path, "gpt2-nano", task="sequence-classification", num_labels=2, n_layer=1)
    texts = ["one\x0ctwo\x85three\u2028four", "second", "caf\u00e9\tlast"]
    (tmp_path / "texts.txt").write_bytes(("\ufeff" + "\r\n".join(texts)).encode())
    found = []
    for size in (1, 3):  # the tokenizer has no padding
        assert main(["predict", str(where), str(tmp_path / "texts.txt"), "--json", f"--batch-size={size}"]) == 0
        found.append(lines(capsys))
    assert [one["input"] for one in found[0]] == texts
    for one, other in zip(*found, strict=True):
        assert one["scores"] == pytest.approx(other["scores"], abs=1e-6)
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n")
    assert main(["predict", str(where), str(tmp_path / "latin.txt")]) == 2
    assert "no UTF-8" in capsys.readouterr().err
    assert main(["predict", str(where), str(tmp_path)]) == 2
    assert "is a folder" in capsys.readouterr().err
    train_wordpiece([chr(c) for c in range(0x4E00, 0x4F00)]).save_pretrained(tmp_path / "words")
    for said in ("it is none: read it with that one (tokenizer=", "knows 256; read the text with"):
        assert main(["predict", str(where), "--text=a", f"--tokenizer={tmp_path / 'words'}"]) == 2
        assert said in capsys.readouterr().err
        (where / "tokenizer.json").unlink(missing_ok=True)  # then there is its number alone to go by


def test_draws_are_of_all_tokens(tmp_path, capsys):
    where = saved_text_model(tmp_path, "gpt2-nano", n_layer=1, n_embd=16, n_head=2, n_positions=256)
    model = formix.load(where)
    with torch.no_grad():  # the same probabilities at every place
        model.transformer.ln_f.weight.zero_()
        model.transformer.ln_f.bias.fill_(1)
    formix.save(model, where)
    assert main(["predict", str(where), "--text=a", "--new-tokens=200", "--temperature=1", "--json"]) == 0
    assert len(set(lines(capsys)[0]["text"]) - {"\ufffd"}) > 50


def test_features_are_of_the_whole_text(tmp_path, capsys):
    where = saved_text_model(tmp_path, "bert-tiny", task="features", max_position_embeddings=512)
    found = []
    for end in ("xy ", "zw "):
        assert main(["predict", str(where), "--json", f"--text={'ab ' * 90}{end * 30}"]) == 0
        found.append(lines(capsys)[0]["features"])
    assert found[0] != pytest.approx(found[1], abs=1e-5)


def test_flags_with_their_values_behind_them(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    formix.save(formix.create_model("vit_tiny_patch16_224", depth=1, embed_dim=16, num_heads=2, img_size=32), "model")
    for name in "ab":
        Image.new("RGB", (40, 40)).save(f"{name}.png")
    for arguments in (
        ["model", "a.png", "--top", "2", "b.png", "--json"],
        ["--model=model", "--json", "a.png", "b.png"],
    ):
        assert main(["predict", *arguments]) == 0
        found = lines(capsys)
        assert [one["input"] for one in found] == ["a.png", "b.png"]
    assert main(["predict", "model", "--on-bad-sample", "skip", "--json", "true", "a.png", "--top", "1"]) == 0
    assert len(lines(capsys)[0]["labels"]) == 1
    for help_flag in ("-h", "--help"):
        with pytest.raises(SystemExit, match="0"):
            main(["predict", "model", help_flag])


DOCUMENTED = (Path(__file__).resolve().parents[2] / "docs" / "training.md").read_text().splitlines()


def test_the_documented_commands(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    formix.save(
        formix.create_model("vit_tiny_patch16_224", "relu", depth=1, embed_dim=16, num_heads=2, img_size=32),
        "runs/deit-relu",
    )
    saved_text_model(Path("runs/paf-rte"), "bert-tiny", design="paf", num_labels=2)
    saved_text_model(Path("runs/gpt2"), "gpt2-nano", n_layer=1, n_positions=64)
    Path("pictures").mkdir()
    for name in ("a.jpg", "pictures/b.png"):
        Image.new("RGB", (40, 40)).save(name)
    Path("sentences.tsv").write_text("a cat\ta dog\n")
    commands = [line.split("#")[0] for line in DOCUMENTED if line.startswith("    formix predict ")]
    assert len(commands) >= 4
    for command in commands:
        assert main(shlex.split(command)[1:]) == 0, command
    assert Path("answers.csv").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "inputs are missing"),
        (["nothing.png"], "does not exist"),
        (["broken.png"], "cannot be read"),
        (["broken.png", "--top=0"], "top is 0"),
        (["broken.png", "--out=a.txt"], ".csv or .jsonl"),
        (["texts.csv", "--out=./texts.csv"], "'./texts.csv', which is one of the inputs"),
        (["broken.png", "--temperature=-1"], "temperature is -1"),
        (["--text=hello"], "is for images"),
        (["broken.png", "--bacth-size=3"], "did you mean batch_size"),
    ],
)
def test_what_cannot_be_predicted_is_said_in_a_sentence(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    formix.save(formix.create_model("vit_tiny_patch16_224", depth=1, embed_dim=16, num_heads=2, img_size=32), "model")
    Path("broken.png").write_bytes(b"no picture")
    assert main(["predict", "model", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_broken_pictures_are_left_out_if_asked(tmp_path, capsys, caplog):
    formix.save(formix.create_model("vit_tiny_patch16_224", depth=1, embed_dim=16, num_heads=2, img_size=32), tmp_path)
    (tmp_path / "broken.png").write_bytes(b"no picture")
    Image.new("RGB", (40, 40)).save(tmp_path / "fine.png")
    files = [str(tmp_path / "broken.png"), str(tmp_path / "fine.png")]
    assert main(["predict", str(tmp_path), *files, "--on-bad-sample=skip", "--json"]) == 0
    assert [Path(one["input"]).name for one in lines(capsys)] == ["fine.png"]
    assert "1 of prediction: " in caplog.text
    assert main(["predict", str(tmp_path), files[0], "--on-bad-sample=skip"]) == 2
    assert "None of the 1 pictures" in capsys.readouterr().err


def test_no_model_and_no_argument(tmp_path, capsys):
    assert main(["predict"]) == 2
    assert main(["predict", str(tmp_path / "none"), "a.png"]) == 2
    assert "no config.json" in capsys.readouterr().err
