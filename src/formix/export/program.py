"""A model as a program: tensors in, tensors out, each by name, with the sizes that may change from call to call."""

from __future__ import annotations

import inspect
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from formix.export.sheet import Axis, Port

MOST = 2**20  # of an axis without a limit of the model's own; PyTorch wants a number
PLUS = " + "  # in a port's shape, between the axes of a sum


class Program(nn.Module):
    """What is exported: `inputs`, and `axes`, those of their sizes that are free. Images and logits are float32 in
    every type of the weights."""

    inputs: tuple[Port, ...]  # those with a dot in their names are the arguments of forward's * before the dot
    axes: dict[str, Axis]
    task: str
    judged: int | None = None  # how many outputs say what is large, for the check; None: all

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    @abstractmethod
    def example(self, sizes: Mapping[str, int], *, padding: str = "none", seed: int = 0) -> tuple[Tensor, ...]:
        """Inputs of these sizes of the free axes; the first sample stays whole when the others are padded."""

    def sizes(self, wanted: Mapping[str, int]) -> dict[str, int]:
        """The sizes of the free axes, within their limits."""
        return {n: min(wanted[n], axis.most or wanted[n]) for n, axis in self.axes.items()}

    def shape(self, port: Port, sizes: Mapping[str, int]) -> list[int]:
        """The port's shape with the free axes in numbers."""
        return [sum(sizes[n] if n in sizes else int(n) for n in str(size).split(PLUS)) for size in port.shape]

    @abstractmethod
    def named_outputs(self, *inputs: Tensor) -> dict[str, Tensor]:
        """The outputs by name."""

    def floats(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The outputs in order, float32."""
        return tuple(out.float() for out in self.named_outputs(*inputs).values())


class ImageProgram(Program):
    """pixel_values float32 [batch, channels, height, width], normalised -> logits [batch, classes], or features."""

    def __init__(self, model: Any, size: tuple[int, int, int], *, batch: int | None = None) -> None:
        super().__init__(model)
        _resample_positions(model, size[1:])
        self.task = "image-classification"
        head = model.config.num_labels if hasattr(model, "config") else model.num_classes
        if head == 0 or type(model).__name__ == "FormixCvtModel":
            self.task = "features"
        self.axes = {} if batch else {"batch": Axis(least=1)}
        about = "pixels 0 to 1, resized and cropped as `image` says, minus mean, divided by std"
        self.inputs = (Port(name="pixel_values", dtype="float32", shape=(batch or "batch", *size), about=about),)

    def example(self, sizes: Mapping[str, int], *, padding: str = "none", seed: int = 0) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(seed)
        return (torch.randn(self.shape(self.inputs[0], sizes), generator=generator),)

    def named_outputs(self, *inputs: Tensor) -> dict[str, Tensor]:
        (pixels,) = inputs
        pixels = pixels.to(next(self.model.parameters()).dtype)
        if hasattr(self.model, "config"):
            return _tensors(self.model(pixel_values=pixels))
        return {"features" if self.task == "features" else "logits": self.model(pixels)}

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        return self.floats(pixel_values)


@torch.no_grad()
def _resample_positions(model: Any, size: tuple[int, int]) -> None:
    """Give a Vision Transformer that takes any size the positions of this one, in place: the file has no other, and
    OpenVINO no antialiased resampling."""
    from timm.models.vision_transformer import VisionTransformer

    free = isinstance(model, VisionTransformer) and model.dynamic_img_size and model.pos_embed is not None
    if not free or not getattr(model, "pos_antialias", True):
        return
    embed = model.patch_embed
    grid = embed.dynamic_feat_size(size)  # with what padding adds
    model.set_input_size([n * part for n, part in zip(grid, embed.patch_size, strict=True)])
    model.dynamic_img_size, embed.flatten = False, True


class TextProgram(Program):
    """input_ids and attention_mask, int64 [batch, tokens], and token_type_ids where the model has several types ->
    what transformers' class gives: logits, start and end logits, or hidden states.

    A decoder's positions count the ones of attention_mask, so padding may stand on either side.
    """

    def __init__(self, model: Any, task: str, *, batch: int | None = None, tokens: int | None = None) -> None:
        from formix.models.text import as_choices, is_decoder, positions

        super().__init__(model)
        config = model.config
        self.task, self.decoder = task, is_decoder(model)
        self.axes = {} if batch else {"batch": Axis(least=1)}
        shape: tuple[int | str, ...] = (batch or "batch",)
        if as_choices(model, {"ids": torch.zeros(1, 1)})["ids"].dim() == 3:
            self.axes["choices"] = Axis(least=1)
            shape += ("choices",)
        if tokens is None:
            self.axes["tokens"] = Axis(least=1, most=positions(config))
        shape += (tokens or "tokens",)
        self.pad = 0 if config.pad_token_id is None else int(config.pad_token_id)
        mask = "1 for a token, 0 for padding"
        self.inputs = (
            Port(name="input_ids", dtype="int64", shape=shape, about="the tokenizer's"),
            Port(name="attention_mask", dtype="int64", shape=shape, about=mask),
        )
        types = getattr(config, "type_vocab_size", 1)
        if types > 1 and "token_type_ids" in inspect.signature(type(model).forward).parameters:
            about = f"the tokenizer's, 0 to {types - 1}: which text of a pair a token is of"
            self.inputs += (Port(name="token_type_ids", dtype="int64", shape=shape, about=about),)

    def example(self, sizes: Mapping[str, int], *, padding: str = "none", seed: int = 0) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(seed)
        ids, mask = self.texts(self.shape(self.inputs[0], sizes), padding, generator)
        if len(self.inputs) == 2:
            return ids, mask
        types = torch.randint(self.model.config.type_vocab_size, ids.shape, generator=generator)
        return ids, mask, torch.where(mask.bool(), types, 0)

    def texts(self, shape: list[int], padding: str, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Tokens and their mask."""
        config = self.model.config
        ids = torch.randint(config.vocab_size, shape, generator=generator)
        if config.vocab_size > 1:
            ids = torch.where(ids == self.pad, (self.pad + 1) % config.vocab_size, ids)
        mask = torch.ones_like(ids)
        rows = mask.flatten(0, -2)  # [B, N] or [B choices, N], the same memory
        for i, row in enumerate(rows if padding != "none" else []):
            missing = min(row.numel() - 1, i * row.numel() // len(rows) + (len(rows) == 1))
            row[row.numel() - missing :] = 0
        mask = mask.flip(-1) if padding == "left" else mask
        return torch.where(mask.bool(), ids, self.pad), mask

    def named_outputs(self, *inputs: Tensor) -> dict[str, Tensor]:
        given: dict[str, Any] = {port.name: x for port, x in zip(self.inputs, inputs, strict=True)}
        if self.decoder:
            given["position_ids"] = (given["attention_mask"].cumsum(-1) - 1).clamp(min=0)
            given["use_cache"] = False
        return _tensors(self.model(**given))

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        inputs = (input_ids, attention_mask, token_type_ids)
        return self.floats(*(x for x in inputs if x is not None))


def _tensors(output: Any) -> dict[str, Tensor]:
    return {name: x for name, x in output.items() if isinstance(x, Tensor)}


def trace(program: Program, sizes: Mapping[str, int]) -> torch.export.ExportedProgram:
    """The program for any size of its axes, traced at these.

    Raises:
        ValueError: torch.export cannot have it so.
    """
    try:
        with torch.no_grad():
            exported = torch.export.export(program, program.example(sizes), dynamic_shapes=dynamic_shapes(program))
    except (RuntimeError, ValueError, TypeError, AssertionError) as error:  # torch.export's and timm's are of these
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"torch.export cannot trace this {type(program.model).__name__}: {reason}") from error
    for node in exported.graph.nodes:
        node.meta.pop("stack_trace", None)  # paths of this machine, in every file
    return exported


def dynamic_shapes(program: Program) -> dict[str, Any]:
    """Of each input the free dimensions, as torch.export and torch.onnx take them."""
    dims: dict[str, Any] = {
        n: torch.export.Dim(n, min=axis.least, max=axis.most or MOST) for n, axis in program.axes.items()
    }

    def free(port: Port) -> dict[int, Any]:
        return {i: _dim(n, dims) for i, n in enumerate(port.shape) if isinstance(n, str)}

    shapes: dict[str, Any] = {port.name: free(port) for port in program.inputs if "." not in port.name}
    several = [port for port in program.inputs if "." in port.name]
    return {**shapes, several[0].name.split(".")[0]: tuple(map(free, several))} if several else shapes


def _dim(name: str, dims: dict[str, Any]) -> Any:
    """The dimension of an axis, or of a sum of axes and numbers, which is added."""
    if name not in dims:
        free = [dims[part] for part in name.split(PLUS) if part in dims]
        rest = sum(int(part) for part in name.split(PLUS) if part not in dims)
        if len(free) == 1:
            dims[name] = free[0] + rest
        else:
            least, most = rest + sum(dim.min for dim in free), rest + sum(dim.max for dim in free)
            dims[name] = torch.export.Dim(name.replace(PLUS, "_"), min=least, max=most)
    return dims[name]


def output_ports(program: Program, exported: torch.export.ExportedProgram, sizes: Mapping[str, int]) -> list[Port]:
    """Names, types and shapes of the outputs, the free sizes by the names of the axes."""
    import sympy

    nodes = {node.name: node for node in exported.graph.nodes}
    symbols = {}
    for port, name in zip(program.inputs, exported.graph_signature.user_inputs, strict=True):
        for axis, size in zip(port.shape, nodes[str(name)].meta["val"].shape, strict=True):
            if isinstance(axis, str) and isinstance(size, torch.SymInt):
                symbols[size.node.expr] = sympy.Symbol(axis)
    with torch.no_grad():
        names = list(program.named_outputs(*program.example(sizes)))
    ports = []
    for name, node in zip(names, exported.graph_signature.user_outputs, strict=True):
        value = nodes[str(node)].meta["val"]
        shape = tuple(
            str(n.node.expr.xreplace(symbols)) if isinstance(n, torch.SymInt) else int(n) for n in value.shape
        )
        ports.append(Port(name=name, dtype=str(value.dtype).removeprefix("torch."), shape=shape))
    return ports


def unread(program: Program, exported: torch.export.ExportedProgram) -> list[str]:
    """Inputs that no output depends on."""
    reached, ahead = set(), [node for node in exported.graph.nodes if node.op == "output"]
    while ahead:
        node = ahead.pop()
        ahead += [before for before in node.all_input_nodes if before.name not in reached]
        reached.add(node.name)
    names = zip(program.inputs, exported.graph_signature.user_inputs, strict=True)
    return [port.name for port, name in names if str(name) not in reached]
