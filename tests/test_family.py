"""The four published architectures, counted."""

import math

import jax
import pytest

from lnjax.errors import ConfigError
from lnjax.models.family import family, searched_blocks
from lnjax.models.spec import param_shapes, runs

PUBLISHED = {
    "nano4b": (4_512_746_496, 32, 32, 1),
    "nano8b": (8_030_261_248, 32, 32, 1),
    "super49b": (49_867_145_216, 80, 49, 25),
    "ultra253b": (253_401_268_224, 81, 64, 32),
}
"""Parameters, blocks that do something, blocks with attention, runs of equal blocks."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_and_blocks_are_the_published_ones(name):
    spec = family(name)
    shapes = jax.tree.leaves(param_shapes(spec), is_leaf=lambda x: isinstance(x, tuple))
    count = sum(map(math.prod, shapes))
    assert (count, len(spec.blocks), sum(b.attention is not None for b in spec.blocks), len(runs(spec))) == PUBLISHED[
        name
    ]


def test_ultra_keeps_its_layer_numbers_and_its_fused_blocks():
    spec = family("ultra253b")
    widths = {b.source_layer: b.ffn.width for b in spec.blocks if b.ffn}
    assert {k: v for k, v in widths.items() if v > 100_000} == {125: 399360, 134: 425984, 143: 343040, 149: 301056}
    assert (spec.num_source_layers, spec.blocks[-1].source_layer, spec.rope.factor) == (162, 161, 16.0)


def test_the_notation_names_layers_parts_and_widths():
    blocks, layers = searched_blocks("A64 2*. -32 A", num_kv_heads=2)
    assert layers == 5
    assert [(b.source_layer, b.attention is not None, b.ffn and b.ffn.width) for b in blocks] == [
        (0, True, 64),
        (3, False, 32),
        (4, True, None),
    ]


def test_another_name_is_an_error_with_the_names_there_are():
    with pytest.raises(ConfigError, match="nano4b, nano8b, super49b, ultra253b"):
        family("nano5b")
