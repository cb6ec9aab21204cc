"""Nodes of the demo: digit conditioning and latent decoding.

demo/run.py links this folder into the custom_nodes of its own ComfyUI. A user's ComfyUI loads only the pack's
top-level __init__.py and never sees them.
"""


async def comfy_entrypoint():
    from .nodes import DigitsExtension  # imported here so that format.py works without ComfyUI

    return DigitsExtension()
