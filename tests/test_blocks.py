"""The grammar of `blocks`, and how a call's block is known from transformer_options."""

import copy

import pytest

from nodes.blocks import GRAMMAR, Tags, count_blocks, parse, position, tells_its_blocks


@pytest.mark.parametrize(
    "text, total, expected",
    [
        ("all", 4, [0, 1, 2, 3]),
        (" ALL ", 2, [0, 1]),
        ("0", 4, [0]),
        ("1-2", 4, [1, 2]),
        ("2 - 3", 4, [2, 3]),
        ("-1", 4, [3]),
        ("-2", 4, [2]),
        ("0,2", 4, [0, 2]),
        ("3, 0 ,1-1", 4, [0, 1, 3]),
        ("!0,!-1", 5, [1, 2, 3]),
        ("! 0", 3, [1, 2]),
        ("0-9,!3-5", 10, [0, 1, 2, 6, 7, 8, 9]),
        ("!2,0-3", 10, [0, 1, 3]),
        ("2-37", 40, list(range(2, 38))),
        ("2-37", 4, [2, 3]),
        ("!7", 4, [0, 1, 2, 3]),
        ("9", 4, []),
        ("-9", 4, []),
        ("0,!0", 3, []),
    ],
)
def test_selection(text, total, expected):
    selection = parse(text)
    assert [index for index in range(total) if selection.contains(index, total)] == expected


@pytest.mark.parametrize(
    "text", ["", " ", ",", "0,", "a", "1.5", "0;1", "--1", "1-", "1--2", "-3-5", "!", "!!0", "all,0", "0 1"]
)
def test_what_is_not_in_the_grammar_is_refused_with_it(text):
    with pytest.raises(ValueError, match="blocks has ") as refused:
        parse(text)
    assert GRAMMAR in str(refused.value)


def test_a_range_that_starts_after_its_end_is_refused():
    with pytest.raises(ValueError, match='the range "5-2", which starts after its end') as refused:
        parse("0,5-2")
    assert GRAMMAR in str(refused.value)


def test_another_type_is_refused():
    with pytest.raises(ValueError, match="blocks is 3: "):
        parse(3)


@pytest.mark.parametrize(
    "text, total, beyond", [("all", 4, False), ("0-3,-4", 4, False), ("4", 4, True), ("!-5", 4, True)]
)
def test_beyond(text, total, beyond):
    assert parse(text).beyond(total) is beyond


def test_everything():
    assert parse("all").everything
    assert not parse("0").everything and not parse("!0").everything


class Blocks:
    """A model of a family that numbers double and single blocks."""

    def __init__(self, double, single):
        self.double_blocks, self.single_blocks = [None] * double, [None] * single

    def forward(self, options):
        options["block_index"] = 0


class Silent:
    def __init__(self):
        self.double_blocks = [None] * 3

    def forward(self, options):
        options["other"] = 0


Wan = type("WanModel", (), {"__module__": "comfy.ldm.wan.model", "blocks": [None] * 3})
Vace = type("VaceWanModel", (Wan,), {"__module__": "elsewhere"})


def test_count_blocks():
    assert count_blocks(Blocks(2, 3)) == {"double": 2, "single": 3}
    assert count_blocks(Silent()) == {"double": 3, "single": 0}
    assert count_blocks(Wan()) == count_blocks(Vace()) == {"double": 3, "single": 0}
    assert count_blocks(object()) == {}


def test_tells_its_blocks():
    assert tells_its_blocks(Blocks(1, 1))
    assert not tells_its_blocks(Silent()) and not tells_its_blocks(Wan())


@pytest.mark.parametrize(
    "options, counts, expected",
    [
        ({"block_type": "double", "block_index": 1, "total_blocks": 2}, {"double": 2, "single": 3}, (1, 5)),
        ({"block_type": "single", "block_index": 0, "total_blocks": 3}, {"double": 2, "single": 3}, (2, 5)),
        ({"block_type": "single", "block_index": 2, "total_blocks": 3}, {"double": 2, "single": 3}, (4, 5)),
        ({"block_type": "double", "block_index": 7, "total_blocks": 60}, {}, (7, 60)),
        ({"block_type": "single", "block_index": 7, "total_blocks": 60}, {}, None),  # how many doubles, nobody says
        ({"block_type": "double", "block_index": 7}, {}, None),
        ({"block_index": 0, "block": ("input", 4)}, {}, None),  # a UNet: the index inside one of its layers
        ({}, {"double": 2, "single": 3}, None),  # a text refiner
    ],
)
def test_position(options, counts, expected):
    assert position(options, counts) == expected


def run(options, key, args):
    """What a model does with a replaced block."""
    replace = options["patches_replace"]["dit"][key]
    return replace(args, {"original_block": lambda given: ("original", dict(given["transformer_options"]))})


def test_tags_compose_with_what_is_there():
    def there(args, extra):
        return ("replaced", *extra["original_block"](args))

    given = {"other": 1, "patches_replace": {"dit": {("double_block", 1): there}, "attn2": {}}}
    options = Tags({"double": 2, "single": 1}).into(given)
    assert given["patches_replace"]["dit"] == {("double_block", 1): there}, "ComfyUI's own dict is not written"
    assert options["other"] == 1 and options["patches_replace"]["attn2"] == {}
    told = {"block_type": "double", "block_index": 0, "total_blocks": 2}
    assert run(options, ("double_block", 0), {"transformer_options": {}}) == ("original", told)
    told["block_index"] = 1
    assert run(options, ("double_block", 1), {"transformer_options": {}}) == ("replaced", "original", told)
    told = {"block_type": "single", "block_index": 0, "total_blocks": 1}
    assert run(options, ("single_block", 0), {"transformer_options": {}}) == ("original", told)


def test_tags_are_made_once_until_another_node_replaces_a_block():
    tags = Tags({"double": 2, "single": 0})
    first, again = tags.into({}), tags.into({})
    assert first["patches_replace"]["dit"] == again["patches_replace"]["dit"], (
        "a new function would recompile the model"
    )
    later = tags.into({"patches_replace": {"dit": {("double_block", 0): lambda args, extra: "theirs"}}})
    assert run(later, ("double_block", 0), {"transformer_options": {}}) == "theirs"
    key = ("double_block", 1)
    assert later["patches_replace"]["dit"][key] is first["patches_replace"]["dit"][key]
    assert copy.deepcopy(tags) is tags


def test_a_model_that_hands_over_no_options_is_left_alone():
    tag = Tags({"double": 1, "single": 0}).into({})["patches_replace"]["dit"]["double_block", 0]
    assert tag({"img": 1}, {"original_block": lambda args: args}) == {"img": 1}
