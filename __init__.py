"""ComfyUI-side entry of the pack. Importing this file needs neither ComfyUI nor torch."""

WEB_DIRECTORY = "web"


async def comfy_entrypoint():
    from .nodes.extension import SageAttentionExtension

    return SageAttentionExtension()
