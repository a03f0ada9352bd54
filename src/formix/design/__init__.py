"""What a block is: three independent choices, and the names of their combinations.

A `Design` says everything that changes the mathematics of a model's blocks and nothing that changes only their speed:

    mixer    how tokens exchange information   Softmax, Pointwise, Sima, GatedUnit
    layout   how mixer and FFN sit together    Layout: series or parallel, pre- or post-norm, with or without an FFN
    wiring   what earlier layers a block reads Wiring: keys and values of a source layer for some heads

Each choice holds for all layers; `layers` replaces the mixer, the layout or both of single ones (hybrids).
"""

from formix.design.core import Design, LayerDesign
from formix.design.layout import Layout
from formix.design.mixers import MIXERS, Activation, Gate, GatedUnit, GluActivation, Mixer, Pointwise, Sima, Softmax
from formix.design.named import design, list_designs, split_outside_brackets
from formix.design.wiring import Wiring

__all__ = [
    "MIXERS", "Activation", "Design", "Gate", "GatedUnit", "GluActivation", "LayerDesign", "Layout", "Mixer",
    "Pointwise", "Sima", "Softmax", "Wiring", "design", "list_designs", "split_outside_brackets",
]  # fmt: skip
