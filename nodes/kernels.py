"""The one place where the nodes meet sage_kernels.

Inside ComfyUI the pack is one package whose name is its folder, so sage_kernels is its sibling. In tests the
checkout is on sys.path and both are top-level names. torch allows each of our ops to be registered once a process,
so a process must use one of the two, never both.
"""

if "." in __package__:
    from ..sage_kernels import AttentionConfig, attention, attention_consuming, explain
    from ..sage_kernels.config import INTENTS, PV_MODES, QK_GRANULARITIES
    from ..sage_kernels.dispatch import too_few
else:
    from sage_kernels import AttentionConfig, attention, attention_consuming, explain
    from sage_kernels.config import INTENTS, PV_MODES, QK_GRANULARITIES
    from sage_kernels.dispatch import too_few

__all__ = [
    "INTENTS",
    "PV_MODES",
    "QK_GRANULARITIES",
    "AttentionConfig",
    "attention",
    "attention_consuming",
    "explain",
    "too_few",
]
