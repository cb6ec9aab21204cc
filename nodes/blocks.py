"""Which transformer blocks the patch serves: the grammar of `blocks`, and how a call's block is known.

Blocks are numbered over the whole model in the order they run: double blocks first, then single blocks.
"""

import re
from dataclasses import dataclass

GRAMMAR = (
    'write "all", or a comma list of blocks counted from 0: "5" is one block, "2-37" a range, "-1" the last block, '
    'and "!" in front leaves blocks out: "!0,!-1" is all but the first and the last'
)
_ITEM = re.compile(r"(!?)\s*(?:(\d+)\s*-\s*(\d+)|(-?\d+))")


@dataclass(frozen=True)
class Selection:
    """A parsed `blocks` string. `keep` and `drop` are (first, last) pairs, inclusive; negative counts from the end."""

    text: str
    keep: tuple[tuple[int, int], ...] = ()
    drop: tuple[tuple[int, int], ...] = ()

    @property
    def everything(self) -> bool:
        return not self.keep and not self.drop

    def contains(self, index: int, total: int) -> bool:
        """Whether block `index` of a model of `total` blocks is selected. Plain integers only: torch.compile runs it."""
        if self.keep and not _within(self.keep, index, total):
            return False
        return not _within(self.drop, index, total)

    def beyond(self, total: int) -> bool:
        """Whether the string names a block that a model of `total` blocks does not have."""
        return any(not -total <= edge < total for pair in self.keep + self.drop for edge in pair)


def _within(pairs, index: int, total: int) -> bool:
    for first, last in pairs:
        if (first if first >= 0 else total + first) <= index <= (last if last >= 0 else total + last):
            return True
    return False


def parse(text: str) -> Selection:
    """Parse a `blocks` string. Raises ValueError with the grammar when it is not one."""
    if not isinstance(text, str):
        raise ValueError(f"blocks is {text!r}: {GRAMMAR}.")
    if text.strip().lower() == "all":
        return Selection(text)
    keep, drop = [], []
    for item in text.split(","):
        match = _ITEM.fullmatch(item.strip())
        if match is None:
            raise ValueError(f'blocks has "{item.strip()}" in "{text}": {GRAMMAR}.')
        negated, first, last, single = match.groups()
        pair = (int(single), int(single)) if single is not None else (int(first), int(last))
        if single is None and pair[0] > pair[1]:
            raise ValueError(f'blocks has the range "{item.strip()}", which starts after its end: {GRAMMAR}.')
        (drop if negated else keep).append(pair)
    return Selection(text, tuple(keep), tuple(drop))


def count_blocks(diffusion_model) -> dict[str, int]:
    """How many blocks of each type the model has, or {} when it is not known before it runs."""
    if hasattr(diffusion_model, "double_blocks"):  # Flux, HunyuanVideo, Chroma, Hunyuan3D
        return {
            "double": len(diffusion_model.double_blocks),
            "single": len(getattr(diffusion_model, "single_blocks", ())),
        }
    if any(base.__module__ == "comfy.ldm.wan.model" for base in type(diffusion_model).__mro__):
        return {"double": len(diffusion_model.blocks), "single": 0}
    return {}


def position(options: dict, counts: dict[str, int]) -> tuple[int, int] | None:
    """(index, total) of the block that makes this call, over the whole model; None outside any numbered block.

    A UNet sets block_index alone, meaning something else, so block_type must be there too.
    """
    kind, index = options.get("block_type"), options.get("block_index")
    if kind is None or index is None:
        return None
    if counts:
        return (index + (counts["double"] if kind == "single" else 0), counts["double"] + counts["single"])
    total = options.get("total_blocks")  # of this type alone, so only good when the model has one type
    return (index, total) if kind == "double" and total is not None else None


def tells_its_blocks(diffusion_model) -> bool:
    """Whether the model's own code writes block_index into transformer_options (Wan does only in newer ComfyUI)."""
    return any(
        "block_index" in method.__code__.co_consts
        for base in type(diffusion_model).__mro__
        for method in vars(base).values()
        if hasattr(method, "__code__")
    )


class Tags:
    """Make a model that does not tell its blocks tell them, through ComfyUI's block replacement hook.

    Put into the options of every model call, around whatever replacement another node has put there by then. Each tag is
    made once, so that torch.compile sees the same function in every step. As in newer ComfyUI the tag stays after the
    block, so that what hangs on a block (VACE) counts as that block.
    """

    def __init__(self, counts: dict[str, int]):
        self.counts = counts
        self.made: dict[tuple, tuple] = {}  # (hook, index) -> (the replacement it wraps, the tag)

    def __deepcopy__(self, memo):
        return self

    def into(self, options: dict) -> dict:
        """A copy of transformer_options with every block tagged."""
        replaces = options.get("patches_replace", {})
        dit = dict(replaces.get("dit", {}))
        for kind, count in self.counts.items():
            for index in range(count):
                hook = (f"{kind}_block", index)
                replaced = dit.get(hook)
                if hook not in self.made or self.made[hook][0] is not replaced:
                    self.made[hook] = replaced, _tagger(kind, index, count, replaced)
                dit[hook] = self.made[hook][1]
        return {**options, "patches_replace": {**replaces, "dit": dit}}


def _tagger(kind: str, index: int, count: int, replaced):
    def tag(args, extra):
        options = args.get("transformer_options")
        if options is not None:
            options["block_type"], options["block_index"], options["total_blocks"] = kind, index, count
        return extra["original_block"](args) if replaced is None else replaced(args, extra)

    return tag
