"""How images are prepared stays the source's: in memory, on disk, through timm, in recovery and on the way back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import transformers as hf
from PIL import Image
from sources import SOURCES, make
from timm.data import resolve_model_data_config

import formix
import formix.comparison  # before a test replaces what it imports
from formix.conversion import restore
from formix.conversion.pipeline import Recovery, load_recovery_data
from formix.data import load_data
from formix.models.image import image_size

OWN = {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6), "interpolation": "bilinear", "crop_pct": 0.75,
       "crop_mode": "border"}  # fmt: skip
TIMM = ("vit", "deit-distilled", "dinov2", "xcit")
PROCESSORS = {"hf-vit": hf.ViTImageProcessor, "hf-deit": hf.DeiTImageProcessor, "hf-dinov2": hf.BitImageProcessor,
              "hf-dinov2-registers": hf.BitImageProcessor}  # fmt: skip


def config_of(model: Any) -> dict[str, Any]:
    """timm's data config, with lists as they come from JSON as tuples."""
    return {k: tuple(v) if isinstance(v, list) else v for k, v in resolve_model_data_config(model).items()}


def everywhere(model: Any, directory: Path) -> list[dict[str, Any]]:
    formix.save(model, directory)
    timms = timm.create_model(f"local-dir:{directory}", pretrained=True)
    further = formix.convert(formix.load(directory), "softmax" if hasattr(model, "pos_antialias") else "sima")
    return [config_of(m) for m in (model, formix.load(directory), timms, further)]


@pytest.mark.parametrize("name", TIMM)
def test_of_a_timm_model(name: str, tmp_path) -> None:
    source = make(name).float()
    source.pretrained_cfg = {**source.pretrained_cfg, **OWN, "input_size": (3, *image_size(source))}
    model = formix.convert(source, "relu")
    assert everywhere(model, tmp_path) == [config_of(source)] * 4
    assert config_of(restore(formix.load(tmp_path))) == config_of(source)


def test_a_model_that_reads_any_size_keeps_that_of_its_source(tmp_path) -> None:
    source = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, num_classes=0, dynamic_img_size=True)
    source.pretrained_cfg = {**source.pretrained_cfg, **OWN, "input_size": (3, 64, 64)}
    model = formix.convert(source, "relu")
    assert everywhere(model, tmp_path) == [config_of(source)] * 4
    images = load_recovery_data(model, Recovery(data="digits"))[0].train
    assert images[0]["pixel_values"].shape == (3, 64, 64)


def test_every_verb_takes_the_images_of_a_model_that_reads_any_size_so(tmp_path, capsys) -> None:
    """DINOv2's positions are of another size than the images that it is used with."""
    from formix.cli import main

    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2, "in_chans": 1}
    model = formix.create_model("vit_tiny_patch16_224", num_classes=10, dynamic_img_size=True, **sizes)
    model.pretrained_cfg = {**model.pretrained_cfg, "input_size": (1, 24, 24)}
    formix.save(model, tmp_path / "model")
    assert load_recovery_data(model, Recovery(data="digits"))[0].img_size == (24, 24)
    for verb in (["eval"], ["analyze", "--batches=1", "--batch-size=2"]):
        command = [*verb, f"--model={tmp_path / 'model'}", "--data=digits"]
        for size, status in ((["--img-size=8"], 0), (["--img-size=12"], 2), ([], 0)):
            capsys.readouterr()
            assert main([*command, *size]) == status
            said = capsys.readouterr()
            assert ("img_size is 12 x 12 and must be a multiple" in said.err) == (status == 2)
    assert "2 sequences, 20 tokens" in said.out  # of 3 x 3 patches and a class token
    with pytest.raises(ValueError, match="The model has patches of 8 x 8; img_size is 12 x 12"):
        load_recovery_data(model, Recovery(data="digits", img_size=12))


def test_recovery_reads_images_that_are_no_square(tmp_path, capsys) -> None:
    from formix.cli import main

    sizes = {"img_size": (16, 8), "patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 2}
    formix.save(formix.create_model("vit_tiny_patch16_224", num_classes=2, **sizes), tmp_path / "model")
    for i in range(10):
        Image.fromarray(np.full((16, 8, 3), 20 * i, dtype=np.uint8)).save(tmp_path / f"{i}.png")
    recovery = json.dumps({"stages": "match:1steps", "evaluations": 1})
    command = ["convert", str(tmp_path / "model"), "--design=relu", f"--out={tmp_path / 'out'}"]
    assert main([*command, f"--recover=folder:{tmp_path}", f"--recovery={recovery}"]) == 0
    assert main([*command, "--recover=digits", f"--recovery={recovery}"]) == 2
    assert "takes images of 3 x 16 x 8, and those of 'digits' are 3 x 8 x 8" in capsys.readouterr().err


def test_of_a_tag_of_timm_s() -> None:
    source = timm.create_model("vit_small_patch16_224.dino", depth=1)
    assert config_of(formix.convert(source, "relu")) == config_of(source)
    assert config_of(source)["mean"] == timm.data.IMAGENET_DEFAULT_MEAN


@pytest.mark.parametrize("name", list(PROCESSORS))
def test_of_a_transformers_model(name: str, tmp_path) -> None:
    source = SOURCES[name]()
    source.save_pretrained(tmp_path / "source")
    edge = {"size": {"shortest_edge": 32}} if "dinov2" in name else {"size": {"height": 32, "width": 32}}
    crop = {} if name == "hf-vit" else {"crop_size": {"height": 24, "width": 24}, "do_center_crop": True}
    processor = PROCESSORS[name](image_mean=OWN["mean"], image_std=OWN["std"], resample=2, **edge, **crop)
    processor.save_pretrained(tmp_path / "source")
    model = formix.convert(type(source).from_pretrained(tmp_path / "source"), "relu")
    wanted = {
        "mean": OWN["mean"],
        "std": OWN["std"],
        "interpolation": "bilinear",
        "crop_pct": 0.75 if crop else 1.0,
        "crop_mode": "center" if "dinov2" in name else "squash",
        "input_size": (3, 24, 24) if "dinov2" in name else (3, 16, 16),  # ViT and DeiT read the size of their config
    }
    assert everywhere(model, tmp_path / "out") == [wanted] * 4


def test_pixels_that_a_processor_leaves_as_they_are(tmp_path) -> None:
    SOURCES["hf-vit"]().save_pretrained(tmp_path)
    hf.ViTImageProcessor(do_rescale=False, image_mean=[51, 51, 51], image_std=[102, 102, 102]).save_pretrained(tmp_path)
    model = formix.convert(tmp_path, "relu")
    assert config_of(model)["mean"] == (0.2,) * 3
    assert config_of(model)["std"] == (0.4,) * 3


def test_a_transformers_model_without_an_image_processor_is_named(tmp_path, caplog) -> None:
    SOURCES["hf-vit"]().save_pretrained(tmp_path)
    formix.convert(tmp_path, "relu")
    assert f"{tmp_path}: no image processor can be read" in caplog.text


def test_formix_eval_reads_images_as_the_source_does(tmp_path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    from formix.cli import main

    source = timm.create_model("vit_small_patch16_224", img_size=16, embed_dim=16, depth=1, num_heads=2, num_classes=10)
    source.pretrained_cfg = {**source.pretrained_cfg, **OWN}
    formix.save(formix.convert(source, "softmax"), tmp_path)

    def first_mean(model: Any, data: Any, split: str, batch_size: int) -> float:
        return data.test[0]["pixel_values"].mean().item()

    monkeypatch.setattr("formix.training.evaluate", first_mean)
    capsys.readouterr()
    assert main(["eval", str(tmp_path), "--data=digits", "--img_size=16", "--json"]) == 0
    pixels = load_data("digits", img_size=16).test.normalised(OWN["mean"], OWN["std"])[0]["pixel_values"]
    assert json.loads(capsys.readouterr().out)["value"] == pytest.approx(pixels.mean().item())


def test_recovery_and_the_command_line_read_images_as_the_source_does(tmp_path, capsys) -> None:
    from formix.cli import main

    source = timm.create_model("vit_small_patch16_224", img_size=16, embed_dim=16, depth=2, num_heads=2, num_classes=0)
    source.pretrained_cfg = {**source.pretrained_cfg, **OWN}
    ours = load_recovery_data(formix.convert(source, "relu"), Recovery(data="digits"))[0].train
    plain = load_data("digits", img_size=16).train.normalised((0, 0, 0), (1, 1, 1))
    mean, std = (torch.tensor(OWN[name])[:, None, None] for name in ("mean", "std"))
    torch.testing.assert_close(ours[0]["pixel_values"], (plain[0]["pixel_values"] - mean) / std)
    timm.models.save_for_hf(source, tmp_path / "source", model_args={"img_size": 16, "embed_dim": 16, "depth": 2,
                                                                     "num_heads": 2})  # fmt: skip
    recovery = {"stages": "match:1steps", "calibration": 1, "evaluations": 1, "limit": 64}
    command = ["convert", str(tmp_path / "source"), "--design=relu", "--recover=digits", f"--out={tmp_path / 'out'}"]
    assert main([*command, f"--recovery={json.dumps(recovery)}", "--probe=digits"]) == 0
    metrics = json.loads((tmp_path / "out" / "conversion.json").read_text())["metrics"]
    assert all(0.1 < values["probe digits"] <= 1 for values in metrics.values())
    assert config_of(formix.load(tmp_path / "out")) == config_of(source) | {"input_size": (3, 16, 16)}


def test_recovery_takes_pictures_in_no_class_where_it_reads_no_labels(tmp_path) -> None:
    source = timm.create_model("vit_tiny_patch16_224", img_size=16, embed_dim=16, depth=1, num_heads=2, num_classes=2)
    for i in range(10):
        Image.fromarray(np.full((16, 16, 3), 20 * i, dtype=np.uint8)).save(tmp_path / f"{i}.png")
    data, _ = load_recovery_data(source, Recovery(data=f"folder:{tmp_path}"))
    assert [len(part) for part in (data.train, data.validation, data.test)] == [8, 1, 1]
    with pytest.raises(ValueError, match="no classes"):
        load_recovery_data(source, Recovery(data=f"folder:{tmp_path}", labelled=True))
