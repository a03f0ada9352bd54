import errno
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from filelock import FileLock

import formix
from formix.comparison import CompareConfig, compare, read_results
from formix.data.glue import train_wordpiece
from formix.environment import capture_environment
from formix.records import UNFINISHED
from formix.training.job import LOCK

SMALL = {
    "data": "digits",
    "designs": "softmax,relu",
    "seeds": 2,
    "epochs": 2.0,
    "limit": 128,
    "batch_size": 32,
    "precision": "float32",
    "latency": False,
    "model_args": {"depth": 2, "embed_dim": 16, "num_heads": 2, "patch_size": 4},
}


def outcome(results):
    """What a run's repetition must reproduce: everything but times."""
    return {
        (r.design, r.seed, r.lr): (
            r.status,
            r.validation,
            r.test,
            r.parameters,
            r.flops,
            r.peak_memory_bytes,
            r.selected,
        )
        for r in results.runs
    }


def test_results_hold_every_run_and_the_resolved_configuration(tmp_path):
    config = CompareConfig(**SMALL, lrs="1e-3,5e-3", out=str(tmp_path / "out"))
    results = compare(config)
    assert read_results(tmp_path / "out" / "results.json") == results
    assert len(results.runs) == 2 * 2 + 2  # both rates with the first seed, the chosen one with the second
    for design in ("softmax", "relu"):
        chosen = {r.lr for r in results.runs if r.design == design and r.selected}
        tried = {r.lr: r.validation for r in results.runs if r.design == design and r.seed == 0}
        assert chosen == {max(tried, key=lambda lr: (tried[lr], -lr))}
    assert all((r.test is not None) == r.selected for r in results.runs)  # test is for reporting, never for choosing
    run = results.runs[0]
    assert len(run.curve) == 5
    assert run.flops > 0
    assert run.train_items_per_second > 0
    assert results.config["limit"] == 128
    assert (tmp_path / "out" / "results.csv").read_text().count("\n") == 1 + len(results.runs)


def test_the_same_comparison_twice_gives_the_same_metrics(tmp_path):
    config = CompareConfig(**SMALL, out=str(tmp_path / "a"))
    assert outcome(compare(config)) == outcome(compare(replace(config, out=str(tmp_path / "b"))))


def test_started_again_it_reruns_nothing_and_adds_what_is_new(tmp_path, monkeypatch):
    from formix.comparison import runner

    config = CompareConfig(**SMALL, out=str(tmp_path))
    first = compare(config)
    trained = []
    real = runner.train
    monkeypatch.setattr(runner, "train", lambda *a, **k: trained.append(1) or real(*a, **k))
    assert outcome(compare(config)) == outcome(first)
    assert not trained
    more = compare(replace(config, designs="softmax,relu,paf"))
    assert len(trained) == 2
    assert outcome(first).items() <= outcome(more).items()


def test_designs_that_cannot_do_the_task_are_listed_with_the_reason(tmp_path):
    (tmp_path / "a.txt").write_text("the cat sat on the mat. " * 300)
    settings = {
        **SMALL, "data": f"text:{tmp_path / 'a.txt'}", "sequence_length": 16, "designs": "softmax,sima,activator",
        "model_args": {"n_layer": 1, "n_embd": 16, "n_head": 2}, "limit": None, "epochs": 1.0,
    }  # fmt: skip
    results = compare(CompareConfig(**settings, out=str(tmp_path / "out")))
    refused = {d.design: d.refused for d in results.designs}
    assert refused["softmax"] is None
    assert "see the future" in refused["sima"]
    assert "mixes no tokens" in refused["activator"]
    assert {r.design for r in results.runs} == {"softmax"}
    assert "byte bigram" in results.task.baselines


def test_encoders_are_compared_by_the_tokens_they_are_not_shown(tmp_path):
    (tmp_path / "a.txt").write_text("abc def " * 400)
    text = {"data": f"text:{tmp_path / 'a.txt'}", "task": "masked-lm", "sequence_length": 16, "model_args": {}}
    settings = {**SMALL, **text, "designs": "softmax,sima,paf", "seeds": 1, "out": str(tmp_path / "out")}
    results = compare(CompareConfig(**settings))
    assert (results.task.kind, results.task.metric, results.task.higher_is_better) == ("masked-lm", "perplexity", False)
    assert [run.design for run in results.runs] == ["softmax", "sima", "paf"]
    assert all(1 < run.test < 258 for run in results.runs)
    with pytest.raises(ValueError, match="another mask_probability"):
        compare(CompareConfig(**settings, mask_probability=0.3))
    with pytest.raises(ValueError, match=r"mask_probability is 0\.3, which is of task='masked-lm'"):
        compare(CompareConfig(**{**settings, "task": None}, mask_probability=0.3))
    with pytest.raises(ValueError, match="task is 'mlm'; it must be 'masked-lm'"):
        compare(CompareConfig(**{**settings, "task": "mlm"}))


def test_a_comparison_in_which_no_design_can_run_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("the cat sat on the mat. " * 300)
    settings = {
        **SMALL,
        "data": f"text:{tmp_path / 'a.txt'}",
        "sequence_length": 16,
        "designs": "sima",
        "model_args": {},
    }
    with pytest.raises(ValueError, match="None of the designs"):
        compare(CompareConfig(**settings, out=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("designs", ["relu,sima", "softmax"])
def test_a_misspelt_model_argument_is_no_property_of_the_designs(tmp_path, designs):
    settings = {**SMALL, "designs": designs, "model_args": {"depht": 2}}
    with pytest.raises(ValueError, match=r"^timm cannot build .*'depht'"):
        compare(CompareConfig(**settings, out=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


def test_a_diverged_run_is_recorded_and_the_others_go_on(tmp_path, monkeypatch):
    from formix.comparison import runner

    real = runner.build_model

    def broken_relu(data, name, arguments, design):
        model = real(data, name, arguments, design)
        if design == "relu":
            model.head.weight.data.fill_(float("inf"))
        return model

    monkeypatch.setattr(runner, "build_model", broken_relu)
    results = compare(CompareConfig(**SMALL, out=str(tmp_path)))
    relu = [r for r in results.runs if r.design == "relu"]
    assert [r.status for r in relu] == ["diverged", "diverged"]
    assert "step 1 with learning rate 0.001" in relu[0].message
    assert all(r.test is not None for r in results.runs if r.design == "softmax")


def test_a_directory_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("important")
    with pytest.raises(ValueError, match="no comparison of formix's"):
        compare(CompareConfig(**SMALL, out=str(tmp_path)))
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text('{"model_type": "formix_bert"}')
    with pytest.raises(ValueError, match="no comparison of formix's"):
        compare(CompareConfig(**SMALL, out=str(model)))
    config = CompareConfig(**SMALL, out=str(tmp_path / "out"))
    compare(config)
    before = (tmp_path / "out" / "results.json").read_bytes()
    with pytest.raises(ValueError, match="another epochs"):
        compare(replace(config, epochs=3.0))
    assert (tmp_path / "out" / "results.json").read_bytes() == before


def test_a_start_that_could_not_write_leaves_nothing_that_the_next_one_minds(tmp_path, monkeypatch):
    def full(path, text):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    config = CompareConfig(**{**SMALL, "designs": "softmax", "seeds": 1}, out=str(tmp_path / "out"))
    with monkeypatch.context() as patch:
        patch.setattr("formix.comparison.runner.write_atomically", full)
        with pytest.raises(OSError, match="No space"):
            compare(config)
    assert len(compare(config).runs) == 1


def test_a_start_that_was_killed_while_it_wrote_its_settings_leaves_nothing_that_the_next_one_minds(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / f".config.json.4321{UNFINISHED}").write_text('{"defi')  # as `write_atomically` has it
    assert len(compare(CompareConfig(**{**SMALL, "seeds": 1}, out=str(tmp_path / "out"))).runs) == 2


def test_one_comparison_at_a_time_has_a_directory(tmp_path):
    config = CompareConfig(**{**SMALL, "designs": "softmax", "seeds": 1}, out=str(tmp_path / "out"))
    (tmp_path / "out").mkdir()
    with FileLock(tmp_path / "out" / LOCK), pytest.raises(ValueError, match="another formix compare is under way"):
        compare(config)
    assert [p.name for p in (tmp_path / "out").iterdir() if p.name != LOCK] == []
    assert len(compare(config).runs) == 1


def test_a_directory_of_other_data_under_the_same_name_is_refused(tmp_path):
    settings = {**SMALL, "data": f"text:{tmp_path / 'a.txt'}", "sequence_length": 16, "limit": None, "epochs": 1.0}
    settings |= {"designs": "softmax", "seeds": 1, "model_args": {"n_layer": 1, "n_embd": 16, "n_head": 2}}
    config = CompareConfig(**settings, out=str(tmp_path / "out"))
    (tmp_path / "a.txt").write_text("the cat sat on the mat. " * 300)
    compare(config)
    (tmp_path / "a.txt").write_text("the dog sat on the mat. " * 300)
    with pytest.raises(ValueError, match="another contents of data"):
        compare(config)


def test_a_directory_of_another_tokenizer_under_the_same_name_is_refused(tmp_path):
    text = "The cat sat on the mat. " * 300
    (tmp_path / "a.txt").write_text(text)
    settings = {**SMALL, "data": f"text:{tmp_path / 'a.txt'}", "sequence_length": 16, "limit": None, "epochs": 1.0}
    settings |= {"designs": "softmax", "seeds": 1, "model_args": {"n_layer": 1, "n_embd": 16, "n_head": 2}}
    config = CompareConfig(**settings, tokenizer=str(tmp_path / "words"), out=str(tmp_path / "out"))
    words = train_wordpiece([text])
    words.save_pretrained(config.tokenizer)
    assert compare(config).runs == compare(config).runs
    words.add_tokens("The cat")
    words.save_pretrained(config.tokenizer)
    with pytest.raises(ValueError, match="another contents of data and tokenizer"):
        compare(config)


def test_a_directory_of_other_weights_under_the_same_name_is_refused(tmp_path):
    settings = {**SMALL, "designs": "softmax", "seeds": 1, "epochs": 1.0, "model_args": {}}
    model = {"img_size": 8, "in_chans": 1, "embed_dim": 16, "depth": 1, "num_heads": 2, "patch_size": 4}
    config = CompareConfig(**settings, model=str(tmp_path / "model"), out=str(tmp_path / "out"))
    formix.save(formix.create_model("vit_tiny_patch16_224", design="softmax", **model), config.model)
    before = compare(config)
    assert compare(config).runs == before.runs
    formix.save(formix.create_model("vit_tiny_patch16_224", design="softmax", **model), config.model)
    with pytest.raises(ValueError, match="another contents of model"):
        compare(config)


def test_a_directory_of_a_processor_that_computes_otherwise_is_refused(tmp_path, monkeypatch):
    config = CompareConfig(**{**SMALL, "designs": "softmax", "seeds": 1, "precision": "auto"}, out=str(tmp_path))
    monkeypatch.setattr("formix.comparison.runner.computed_in", lambda precision: "bfloat16")
    compare(config)
    monkeypatch.setattr("formix.comparison.runner.computed_in", lambda precision: "float32")
    with pytest.raises(ValueError, match="another precision"):
        compare(config)


def test_every_design_sees_the_same_batches_in_the_same_order(tmp_path, monkeypatch):
    from formix.training import tasks

    real, seen = tasks.forward, []

    def watched(model, batch):
        if model.training:
            seen.append(batch["pixel_values"].double().sum().item())
        return real(model, batch)

    monkeypatch.setattr(tasks, "forward", watched)
    compare(CompareConfig(**SMALL | {"designs": "softmax,sima,activator,paf,skip", "seeds": 1}, out=str(tmp_path)))
    steps = len(seen) // 5
    assert steps >= 8
    assert all(seen[i * steps : (i + 1) * steps] == seen[:steps] for i in range(5))


def test_hybrids_and_options_are_designs_like_others(tmp_path):
    designs = 'softmax,relu(layers={"0": "softmax", "-1": "paf"}),skip(heads=1,source=last(1,1))'
    results = compare(CompareConfig(**SMALL | {"designs": designs, "seeds": 1, "epochs": 1.0}, out=str(tmp_path)))
    hybrid = results.designs[1]
    assert hybrid.definition["layers"]["0"]["kind"] == "softmax"
    assert hybrid.definition["layers"]["-1"]["parallel"] is True
    assert [r.status for r in results.runs] == ["ok"] * 3


def test_times_are_measured_once_for_all_runs_of_a_design(tmp_path):
    settings = {**SMALL, "latency": True, "epochs": 1.0}
    runs = compare(CompareConfig(**settings, out=str(tmp_path))).runs
    for run in runs:
        assert set(run.latency_ms) == {"float32", "bfloat16"}
        assert all(set(row) == {"1", "32"} and min(row.values()) > 0 for row in run.latency_ms.values())
    assert len({(run.design, run.train_items_per_second) for run in runs}) == len({run.design for run in runs}) == 2


def test_killed_in_the_middle_it_keeps_finished_runs_and_ends_as_if_undisturbed(tmp_path):
    settings = {**SMALL, "seeds": 3, "epochs": 3.0}
    flags = [f"--{k}={json.dumps(v) if isinstance(v, dict) else v}" for k, v in settings.items() if v is not None]
    command = [sys.executable, "-m", "formix.cli", "compare", *flags, f"--out={tmp_path / 'killed'}"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    runs = tmp_path / "killed" / "runs"
    deadline = time.time() + 120
    while len(list(runs.glob("*.json")) if runs.is_dir() else []) < 2 and time.time() < deadline:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    kept = {p.name: p.read_bytes() for p in runs.glob("*.json")}
    assert 2 <= len(kept) < 6
    assert not (tmp_path / "killed" / "results.json").exists()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, timeout=300)
    assert all((runs / name).read_bytes() == content for name, content in kept.items())
    undisturbed = compare(CompareConfig(**settings, out=str(tmp_path / "undisturbed")))
    assert outcome(read_results(tmp_path / "killed" / "results.json")) == outcome(undisturbed)


def test_the_environment_names_processor_and_versions():
    environment = capture_environment()
    assert environment.cpu
    assert (
        environment.instruction_set.split(" + ")[0] in ("DEFAULT", "AVX2", "AVX512") or Path("/proc/cpuinfo").exists()
    )
    assert environment.threads >= 1
    assert environment.torch.startswith("2.")
