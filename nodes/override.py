"""The attention override: one attention call of a ComfyUI model, served by sage_kernels or passed on with a reason.

Everything here may run inside torch.compile. There it reads only what stays the same from step to step (and one bool
that says whether this step is inside the window) and counts nothing: a counter would make every step a new graph.
"""

import sys
from dataclasses import dataclass

import torch

from .blocks import Selection, position
from .call import mask_4d, not_understood, to_comfy, unview, views
from .errors import serve_or_raise
from .kernels import AttentionConfig, attention, attention_consuming, explain, too_few
from .sampling import Patch


@dataclass(frozen=True)
class Settings:
    """What the node's user chose, and how many blocks of each type the model has ({} when not known)."""

    config: AttentionConfig
    selection: Selection
    counts: dict[str, int]
    attention: str  # "self", "cross" or "both"
    min_tokens: int  # below 0: as many as the card needs to gain
    told: bool = True  # the model's own code tells its blocks, so a call without one is outside them


def make_override(settings: Settings, patch: Patch, previous=None):
    """The function for transformer_options["optimized_attention_override"].

    `previous` is the override that was there before, or None; calls not taken run it, or ComfyUI's own attention.
    A closure, because ComfyUI's clone() deep-copies model_options and functions keep their identity there.
    """

    def attempt(peek, take, restore, heads, named, kwargs):
        """The output in ComfyUI's layout, or None when the call is to be passed on.

        peek() lends [q, k, v], take() gives them away. restore(qkv) undoes take() with what the kernel has left of the
        list, and says whether it could.
        """
        compiling = torch.compiler.is_compiling()
        if compiling:
            patch.compiled = True  # written, never read here: a read would make it a guard
        skip_reshape, skip_output_reshape = named["skip_reshape"], named["skip_output_reshape"]
        options = kwargs.get("transformer_options") or {}
        block = position(options, settings.counts)
        q, k, v = peek()
        reason = not_understood(q, k, v, heads, named, kwargs)
        reason = reason or _not_asked(settings, patch, options, block, q, k, skip_reshape, kwargs)
        if reason is None:
            layout = "HND" if skip_output_reshape else "NHD"
            call = {
                "tensor_layout": layout,
                "sm_scale": kwargs.get("scale"),
                "attn_mask": mask_4d(named["mask"]),
                "config": settings.config,
            }
            q, k, v = views((q, k, v), heads, skip_reshape, layout)
            choice = explain(q, k, v, **call)
            reason = choice.refusal or _too_few(settings, choice.backend, q, k, layout)
        if reason is None and not compiling:
            kernel = f"{choice.backend} {choice.mode}"
            reason = patch.report.broken.get(kernel)
        if reason is not None:
            if not compiling:
                patch.report.passed[reason] += 1
            return None
        del q, k, v  # from here on the list alone keeps them
        qkv = views(take(), heads, skip_reshape, layout)
        if compiling:  # an error is dealt with around the model, in sampling.py
            return to_comfy(attention(*qkv, **call), skip_output_reshape)
        try:
            out = attention_consuming(qkv, **call)
        except Exception as error:
            restored = restore([unview(t, skip_reshape, layout) for t in qkv])
            serve_or_raise(error, kernel, patch.report, restored)
            return None
        patch.report.took(choice, None if block is None else block[0])
        return to_comfy(out, skip_output_reshape)

    def override(
        func, q, k, v, heads, mask=None, attn_precision=None, skip_reshape=False, skip_output_reshape=False, **kwargs
    ):
        def lend():
            return [q, k, v]

        named = _named(mask, attn_precision, skip_reshape, skip_output_reshape)
        out = attempt(lend, lend, lambda qkv: True, heads, named, kwargs)
        if out is not None:
            return out
        if previous is None:
            return func(q, k, v, heads, **named, **kwargs)
        return previous(func, q, k, v, heads, **named, **kwargs)

    core = _core_with_containers()
    if core is not None:
        override.container_function = _container_function(attempt, previous, core)
    return override


def _named(mask, attn_precision, skip_reshape, skip_output_reshape) -> dict:
    return {
        "mask": mask,
        "attn_precision": attn_precision,
        "skip_reshape": skip_reshape,
        "skip_output_reshape": skip_output_reshape,
    }


def _core_with_containers():
    """comfy.ldm.modules.attention where it has single-owner containers for q, k and v (newer ComfyUI), else None."""
    core = sys.modules.get("comfy.ldm.modules.attention")
    return core if hasattr(core, "AttentionTensorContainer") else None


def _container_function(attempt, previous, core):
    """The override for containers: q, k and v are freed as soon as they are quantised. ComfyUI calls it without func."""

    def container_function(
        q, k, v, heads, mask=None, attn_precision=None, skip_reshape=False, skip_output_reshape=False, **kwargs
    ):
        containers = (q, k, v)

        def restore(qkv):
            for container, tensor in zip(containers, qkv):
                container.tensor = tensor
            return len(qkv) == len(containers)

        def peek():
            return [container.peek() for container in containers]

        def take():
            return [container.take() for container in containers]

        named = _named(mask, attn_precision, skip_reshape, skip_output_reshape)
        out = attempt(peek, take, restore, heads, named, kwargs)
        if out is not None:
            return out
        # kwargs carries ComfyUI's _inside_attn_wrapper, so that its attention does not call an override again.
        if previous is None:
            return core.optimized_attention(q, k, v, heads, **named, **kwargs)
        if hasattr(previous, "container_function"):
            return previous.container_function(q, k, v, heads, **named, **kwargs)
        return previous(core.optimized_attention, *take(), heads, **named, **kwargs)

    return container_function


def _not_asked(settings: Settings, patch: Patch, options, block, q, k, skip_reshape, kwargs) -> str | None:
    """Why the user or the model does not want this call quantised, or None. Reasons hold no varying number: they group."""
    if kwargs.get("low_precision_attention") is False:
        return "the model asks for full precision (low_precision_attention=False)"
    whole = patch.start_percent <= 0 and patch.end_percent >= 1
    if not options.get(patch.key, whole):
        return f"step outside start_percent {patch.start_percent:g} to end_percent {patch.end_percent:g}"
    tokens = 2 if skip_reshape else 1
    nq, nk = q.shape[tokens], k.shape[tokens]
    kind = "self" if nq == nk else "cross"
    if settings.attention not in (kind, "both"):
        return f"{kind} attention (attention is set to {settings.attention})"
    if nq < settings.min_tokens or nk < settings.min_tokens:
        return f"fewer than {settings.min_tokens} tokens (min_tokens)"
    if block is None and settings.counts and settings.told:
        return "outside the model's numbered blocks (a text refiner, for example)"
    if settings.selection.everything:
        return None
    if block is None:
        return f'this model does not tell its blocks, so blocks "{settings.selection.text}" cannot be applied'
    if not settings.selection.contains(*block):
        return f'block not in blocks "{settings.selection.text}"'
    return None


def _too_few(settings: Settings, backend: str, q, k, layout: str) -> str | None:
    """Why quantising this call would cost more than it saves, where that was left to us."""
    if settings.min_tokens >= 0:
        return None
    tokens = 2 if layout == "HND" else 1
    least = too_few(backend, str(q.device), q.shape[-1], q.shape[tokens], k.shape[tokens])
    return f"counts as fewer than {least} tokens, too few to gain on this device (min_tokens is -1)" if least else None
