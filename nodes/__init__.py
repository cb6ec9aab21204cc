"""The ComfyUI nodes: one node a file, and what they share."""
