"""What the pack registers with ComfyUI: its node and the route that serves the reports."""

from comfy_api.latest import ComfyExtension

from . import report
from .patch import SageAttentionPatch


class SageAttentionExtension(ComfyExtension):
    async def get_node_list(self):
        report.serve_reports()  # here, because 0.3.75 never calls on_load
        return [SageAttentionPatch]
