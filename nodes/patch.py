"""Sage Attention Patch: model in, model out, with the model's attention on quantised kernels."""

from comfy_api.latest import io

from . import blocks as blocks_module
from . import sampling
from .kernels import INTENTS, PV_MODES, QK_GRANULARITIES, AttentionConfig
from .override import Settings, make_override

_SLOT = "optimized_attention_override"
_SWITCH = {"auto": "auto", "on": True, "off": False}
_COMBOS = {
    "mode": INTENTS,
    "pv_accum": ("auto", *PV_MODES),
    "qk_quant_gran": ("auto", *QK_GRANULARITIES),
    "smooth_k": tuple(_SWITCH),
    "smooth_v": tuple(_SWITCH),
    "rotate": tuple(_SWITCH),
    "attention": ("self", "cross", "both"),
}


class SageAttentionPatch(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SageAttentionPatch",
            display_name="Sage Attention Patch",
            category="model/patch",
            description="Runs the model's attention on quantised kernels: INT8 for Q·K, FP16, FP8 or INT8 for P·V, "
            "the best that the machine at hand can run. Calls it cannot serve run as before and are reported.",
            inputs=_inputs(),
            outputs=[io.Model.Output(tooltip="The model with its attention patched.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, blocks=None, start_percent=None, end_percent=None):
        # None: the value comes over a link, and execute checks it. Only what ComfyUI cannot check itself stands here,
        # for it repeats the answer for each argument named.
        return problem(blocks, start_percent, end_percent) or True

    @classmethod
    def execute(
        cls, model, mode, pv_accum, qk_quant_gran, smooth_k, smooth_v, rotate,
        start_percent, end_percent, blocks, attention, min_tokens,
    ):  # fmt: skip
        if wrong := problem(blocks, start_percent, end_percent):
            raise ValueError(wrong)
        _check_combos(
            mode=mode, pv_accum=pv_accum, qk_quant_gran=qk_quant_gran, smooth_k=smooth_k, smooth_v=smooth_v,
            rotate=rotate, attention=attention,
        )  # fmt: skip
        config = AttentionConfig(
            intent=mode,
            pv_accum=pv_accum,
            qk_quant_gran=qk_quant_gran,
            smooth_k=_SWITCH[smooth_k],
            smooth_v=_SWITCH[smooth_v],
            rotate=_SWITCH[rotate],
            strict=False,
        )
        patched = model.clone()
        diffusion_model = patched.get_model_object("diffusion_model")
        diffusion_model = getattr(diffusion_model, "_orig_mod", diffusion_model)  # of a compiled one
        counts = blocks_module.count_blocks(diffusion_model)
        selection = blocks_module.parse(blocks)
        told = blocks_module.tells_its_blocks(diffusion_model)
        tags = blocks_module.Tags(counts) if counts and not told else None
        total = sum(counts.values())
        notes = ()
        if counts and selection.beyond(total):
            notes = (f'blocks "{blocks}" names blocks beyond this model\'s {total} (0 to {total - 1})',)
        node_id = cls.hidden.unique_id
        node_id = None if node_id is None else str(node_id)
        patch = sampling.Patch(node_id, start_percent, end_percent, notes, tags)
        sampling.install(patched, patch)
        options = patched.model_options["transformer_options"]
        settings = Settings(config, selection, counts, attention, min_tokens, told)
        options[_SLOT] = make_override(settings, patch, options.get(_SLOT))
        return io.NodeOutput(patched)


def problem(blocks, start_percent, end_percent) -> str | None:
    """What is wrong with these values, as a sentence, or None. A value of None is not known yet."""
    try:
        if blocks is not None:
            blocks_module.parse(blocks)
    except ValueError as error:
        return str(error)
    for name, value in (("start_percent", start_percent), ("end_percent", end_percent)):
        if value is not None and not 0 <= value <= 1:
            return f"{name} is {value}; it must be 0 to 1."
    if start_percent is not None and end_percent is not None and start_percent > end_percent:
        return (
            f"start_percent is {start_percent}, after end_percent, which is {end_percent}: no step would lie between "
            "them. Make start_percent the smaller one."
        )
    return None


def _check_combos(**values) -> None:
    """Raise ValueError for a value that is no option: ComfyUI 0.3.75 lets any through for a V3 node."""
    for name, value in values.items():
        if value not in _COMBOS[name]:
            raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(_COMBOS[name])}.")


def _inputs() -> list:
    def combo(name: str, tooltip: str):
        return io.Combo.Input(name, options=list(_COMBOS[name]), default=_COMBOS[name][0], tooltip=tooltip)

    return [
        io.Model.Input(
            "model", tooltip="The model to patch: put this node between the loader (and LoRAs) and the sampler."
        ),
        combo(
            "mode",
            "What to aim for; the kernel is the best one for it on this machine. auto: fast without visible loss. "
            "fast: the fastest. balanced: between. accurate: closest to full precision.",
        ),
        combo(
            "pv_accum",
            "The type of P and V and of the sum of their products. auto follows mode. What this machine cannot run is "
            "served by the nearest mode that is at least as accurate, and reported.",
        ),
        combo(
            "qk_quant_gran",
            "How many tokens of Q and K share an INT8 scale: finer (per_thread) is more accurate.",
        ),
        combo(
            "smooth_k",
            "Subtract K's mean over tokens before quantising: exact, and much more accurate for most models.",
        ),
        combo(
            "smooth_v",
            "Subtract V's mean per channel before quantising and add it back: helps where V has a strong offset.",
        ),
        combo("rotate", "Rotate Q and K alike before quantising: exact, and spreads channels that stand out."),
        io.Float.Input(
            "start_percent",
            default=0.0,
            min=0.0,
            max=1.0,
            step=0.01,
            tooltip="The patch works from this part of sampling on; steps before it run the previous attention.",
        ),
        io.Float.Input(
            "end_percent",
            default=1.0,
            min=0.0,
            max=1.0,
            step=0.01,
            tooltip="The patch works up to this part of sampling; steps after it run the previous attention.",
        ),
        io.String.Input(
            "blocks",
            default="all",
            tooltip="The transformer blocks to patch, counted from 0, double blocks before single ones: all, or a list "
            "such as 2-37, or !0,!-1 for all but the first and the last.",
        ),
        combo(
            "attention",
            "self: as many keys as queries (joint text and image attention too). cross: attention to the text, which "
            "is short and gains little.",
        ),
        io.Int.Input(
            "min_tokens",
            default=-1,
            min=-1,
            max=1048576,
            tooltip="Calls with fewer query or key tokens run the previous attention: quantising them costs more than "
            "it saves. -1: as many as your card was measured to need, or 1024 where nobody has measured it.",
        ),
    ]
