"""The arguments of one attention call: whether all of them can be honoured, and its tensors as the kernels want them."""

import torch

# What the hook's callers pass besides the named arguments, and what becomes of it here.
_UNDERSTOOD = {
    "transformer_options",  # read: block, window
    "_inside_attn_wrapper",  # ComfyUI's own marker against recursion
    "scale",  # honoured
    "enable_gqa",  # honoured
    "low_precision_attention",  # honoured: False is passed on
    "preferred_attention",  # a model's default backend; an override comes before it
}


def not_understood(q, k, v, heads, named, kwargs) -> str | None:
    """Why the call's arguments cannot be honoured here, or None. What concerns kernels alone, explain() says."""
    mask, attn_precision, skip_reshape = named["mask"], named["attn_precision"], named["skip_reshape"]
    # Asking for float32 means that q·k and softmax must not overflow in half precision; the kernels always keep
    # logits and softmax in float32, so it is honoured as it stands.
    if attn_precision not in (None, torch.float32):
        return f"attn_precision {attn_precision} is not one that this node knows"
    for name, value in kwargs.items():
        if name not in _UNDERSTOOD and value is not None:
            return f"the model passes an argument that this node does not know: {name}"
    if mask is not None and mask.dim() not in (2, 3, 4):
        return f"the mask has {mask.dim()} dimensions (2, 3 and 4 are known)"
    if any(t.requires_grad for t in (q, k, v)) and torch.is_grad_enabled():
        return "gradients are wanted, which the kernels do not compute"
    if any(t.dim() != 4 if skip_reshape else t.dim() not in (3, 4) for t in (q, k, v)):
        return f"q, k and v do not all have {4 if skip_reshape else '3 or 4'} dimensions"
    if (q.shape[1] != heads) if skip_reshape else (_width(q) % heads != 0):
        return "q does not hold the number of heads that the model names"
    head_dim = q.shape[-1] if skip_reshape else _width(q) // heads
    if head_dim == 0:
        return "q has head_dim 0"
    if not skip_reshape and (_width(k) % head_dim != 0 or _width(v) != _width(k)):
        return "k and v do not hold the same number of whole heads of q's head_dim"
    kv_heads = k.shape[1] if skip_reshape else _width(k) // head_dim
    if kv_heads != heads and not kwargs.get("enable_gqa"):
        return "k has another number of heads than q without enable_gqa"
    return None


def _width(t) -> int:
    """h * d of [b, n, h * d], or of [b, n, h, d], which some models (SD3) mix with it."""
    return t.shape[-1] if t.dim() == 3 else t.shape[-2] * t.shape[-1]


def mask_4d(mask):
    """[nq, nk], [b, nq, nk] or [b, h, nq, nk], each broadcastable, as 4 dimensions: as ComfyUI's attention reads them."""
    if mask is None or mask.dim() == 4:
        return mask
    return mask[None, None] if mask.dim() == 2 else mask[:, None]


def views(qkv, heads, skip_reshape, layout) -> list:
    """q, k, v as views in `layout`: HND [b, h, n, d] or NHD [b, n, h, d]. Nothing is copied."""
    if skip_reshape:  # [b, h, n, d]
        return [t if layout == "HND" else t.transpose(1, 2) for t in qkv]
    head_dim = _width(qkv[0]) // heads  # [b, n, h * d]; with GQA k and v hold fewer heads
    split = [t if t.dim() == 4 else t.unflatten(-1, (t.shape[-1] // head_dim, head_dim)) for t in qkv]
    return split if layout == "NHD" else [t.transpose(1, 2) for t in split]


def unview(t, skip_reshape, layout):
    """Undo views for one tensor, again without a copy."""
    if skip_reshape:
        return t if layout == "HND" else t.transpose(1, 2)
    return (t if layout == "NHD" else t.transpose(1, 2)).flatten(2)


def to_comfy(out, skip_output_reshape):
    """[b, h, n, d] when the caller asks for it (HND was computed then), else NHD flattened to [b, n, h * d]."""
    return out if skip_output_reshape else out.flatten(2)
