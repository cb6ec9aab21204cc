"""Two nodes: a digit becomes CONDITIONING, a sampled latent becomes frames."""

from comfy.latent_formats import Wan21
from comfy_api.latest import ComfyExtension, io

from .format import DIGITS, conditioning, latent_to_frames


class DemoDigitConditioning(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DemoDigitConditioning",
            display_name="Digit Conditioning (demo)",
            category="sage attention demo",
            description="Stands in for a text encoder: tells the demo's digit model which digit to draw.",
            inputs=[
                io.Combo.Input(
                    "digit",
                    options=list(DIGITS),
                    default="3",
                    tooltip="The digit to draw; none is the negative prompt that cfg needs.",
                ),
            ],
            outputs=[io.Conditioning.Output()],
        )

    @classmethod
    def execute(cls, digit) -> io.NodeOutput:
        return io.NodeOutput([[conditioning([digit]), {}]])


class DemoDigitDecode(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DemoDigitDecode",
            display_name="Digit Decode (demo)",
            category="sage attention demo",
            description="Stands in for a VAE: turns the digit model's latent into grey frames.",
            inputs=[io.Latent.Input("samples", tooltip="A latent of 16 channels, as KSampler returns it.")],
            outputs=[io.Image.Output()],
        )

    @classmethod
    def execute(cls, samples) -> io.NodeOutput:
        frames = latent_to_frames(Wan21().process_in(samples["samples"].float()))  # [b, t, h, w]
        return io.NodeOutput(frames.flatten(0, 1).unsqueeze(-1).repeat(1, 1, 1, 3))


class DigitsExtension(ComfyExtension):
    async def get_node_list(self):
        return [DemoDigitConditioning, DemoDigitDecode]
