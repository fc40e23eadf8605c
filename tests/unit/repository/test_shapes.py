"""What the parameter `shape_buckets` may say, and what is said about the rest."""

import json
import math

import pytest

from headrace.errors import ModelLoadError
from headrace.repository.shapes import check_shape_buckets, shape_buckets
from headrace.tensors import TensorSpec

INPUTS = [
    TensorSpec("ids", "INT64", (-1, -1)),
    TensorSpec("mask", "BOOL", (-1, -1)),
    TensorSpec("image", "FP32", (-1, -1, -1, 3)),
    TensorSpec("word", "BYTES", (-1, -1)),
    TensorSpec("small", "UINT8", (-1, -1)),
]
OUTPUTS = [TensorSpec("logits", "FP32", (-1, -1, 7)), TensorSpec("score", "FP32", (-1, 1))]
FULL = {
    "sizes": {"tokens": [16, 64], "height": [224]},
    "inputs": {"ids": ["tokens"], "mask": ["tokens"], "image": ["height", None]},
    "outputs": {"logits": ["tokens"]},
    "pad": {"ids": 1, "mask": True, "image": 0.5},
}


def read(max_batch_size=8, **changes):
    given = {key: value for key, value in (FULL | changes).items() if value is not None}
    rules = shape_buckets(json.dumps(given))
    check_shape_buckets(rules, INPUTS, OUTPUTS, max_batch_size)
    return rules


def test_all_of_it_is_read():
    rules = read()

    assert rules.sizes == {"tokens": (16, 64), "height": (224,)}
    assert rules.inputs == {"ids": ("tokens",), "mask": ("tokens",), "image": ("height", None)}
    assert rules.outputs == {"logits": ("tokens",)}
    assert rules.pad == {"ids": 1, "mask": True, "image": 0.5}


def test_outputs_and_padding_may_be_left_out():
    rules = read(outputs=None, pad=None)

    assert (rules.outputs, rules.pad) == ({}, {})
    assert shape_buckets(None) is None


def test_every_size_occurs_in_a_shape_to_warm_up_with():
    assert read().shapes() == [
        {"ids": [16], "mask": [16], "image": [224, 1]},
        {"ids": [64], "mask": [64], "image": [224, 1]},
    ]


def test_a_mask_may_be_padded_with_infinity_when_that_is_what_is_said():
    assert read(pad={"image": -math.inf}).pad == {"image": -math.inf}


@pytest.mark.parametrize(
    ("changes", "fact"),
    [
        ({"sizes": None}, "expected a JSON object with 'sizes' and 'inputs'"),
        ({"inputs": None}, "expected a JSON object with 'sizes' and 'inputs'"),
        ({"cut": {}}, "has 'cut'; expected 'sizes', 'inputs', 'outputs' and 'pad' alone"),
        ({"outputs": ["logits"]}, """has '["logits"]' as 'outputs'; expected a JSON object"""),
        ({"sizes": {}}, "has 0 dimensions in 'sizes'; expected 1 to 8"),
        ({"sizes": {"tokens": []}}, "has '[]' as sizes of 'tokens'; expected 1 to 64 whole"),
        ({"sizes": {"tokens": [64, 16]}}, "whole numbers above 0, ascending"),
        ({"sizes": {"tokens": [16, 16]}}, "whole numbers above 0, ascending"),
        ({"sizes": {"tokens": [0]}}, "whole numbers above 0, ascending"),
        ({"sizes": {"tokens": [True]}}, "whole numbers above 0, ascending"),
        ({"sizes": {"tokens": 16}}, "whole numbers above 0, ascending"),
        (
            {"inputs": {"ids": "tokens"}},
            "'ids' in 'inputs'; expected a list of names from 'sizes', ['height', 'tokens'], or",
        ),
        ({"inputs": {"ids": ["width"]}}, """has '["width"]' for 'ids' in 'inputs'; expected"""),
        ({"inputs": {"ids": [["tokens"]]}}, "expected a list of names"),
        ({"inputs": {"ids": [None]}}, "names no dimension of 'ids' in 'inputs'; leave it out"),
        ({"inputs": {"idz": ["tokens"]}, "pad": {}}, "has input 'idz'; expected one of ['ids', "),
        (
            {"inputs": {"image": ["height"]}, "outputs": {}, "pad": {}},
            "names 1 dimensions of input 'image', which has 2 variable ones",
        ),
        ({"outputs": {"score": ["tokens"]}}, "of output 'score', which has 0 variable ones"),
        ({"outputs": {"loss": ["tokens"]}}, "has output 'loss'; expected one of ['logits', "),
        (
            {"inputs": {"image": ["height", None]}, "pad": {}},
            "cuts output 'logits' by 'tokens', which no input has",
        ),
        ({"pad": {"word": 0}}, "has 'word' in 'pad'; expected one of 'inputs', ['ids', "),
        ({"pad": {"ids": [0]}}, "pads 'ids' with '[0]'; expected one value"),
        ({"pad": {"ids": 0.5}}, "pads input 'ids', which is INT64, with '0.5'"),
        ({"pad": {"ids": 1 << 63}}, "pads input 'ids', which is INT64, with"),
        ({"pad": {"mask": 1}}, "pads input 'mask', which is BOOL, with '1'"),
        ({"pad": {"image": "0"}}, "pads input 'image', which is FP32, with"),
        ({"max_batch_size": 0}, "needs a max_batch_size above 0"),
        ({"inputs": {"ids": ["tokens"], "word": ["tokens"]}, "pad": {"word": 0}}, "BYTES, with"),
        ({"inputs": {"ids": ["tokens"], "small": ["tokens"]}, "pad": {"small": 256}}, "UINT8"),
        ({"inputs": {"ids": ["tokens"], "small": ["tokens"]}, "pad": {"small": -1}}, "UINT8"),
        ({"pad": {"image": 10**400}}, "pads input 'image', which is FP32, with"),
        ({"pad": {"image": 1e39}}, "pads input 'image', which is FP32, with '1e+39'"),
        ({"pad": {"ids": 10**400}}, "pads input 'ids', which is INT64, with"),
        (
            {"inputs": {"ids": ["tokens"], "word": ["tokens"]}, "pad": {"word": "\ud800"}},
            "pads input 'word', which is BYTES, with",
        ),
    ],
)
def test_what_does_not_fit_is_refused_with_what_was_expected(changes, fact):
    with pytest.raises(ModelLoadError) as refused:
        read(**changes)

    message = str(refused.value)
    assert message.startswith("config.pbtxt: parameter 'shape_buckets'")
    assert fact in message
    assert len(message) < 500


@pytest.mark.parametrize("text", ["tokens", "[" * 100_000, "[]", "3"])
def test_what_is_no_json_object_is_refused(text):
    with pytest.raises(ModelLoadError, match="shape_buckets"):
        shape_buckets(text)
