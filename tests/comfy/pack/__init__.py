"""Nodes for the tests alone: conditioning without a text encoder, a tiny Flux, and a record of attention calls."""

import json

import torch
from comfy_api.latest import ComfyExtension, io

_calls: list[dict] = []  # every attention call a recorder saw, in order
_block: list = [None]  # the block that runs now, by a hook on the block itself
_graphs: list[int] = []  # for each graph that torch.compile made, the number of our attention ops in it


class TestConditioning(io.ComfyNode):
    """Random text: [1, tokens, width], a pooled vector, and optionally a mask that hides the last tokens."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TestConditioning",
            category="test",
            inputs=[
                io.Int.Input("tokens", default=16),
                io.Int.Input("width", default=64),
                io.Int.Input("pooled", default=0),
                io.Int.Input("hidden_tokens", default=0),
                io.Int.Input("random_seed", default=0),
            ],
            outputs=[io.Conditioning.Output()],
        )

    @classmethod
    def execute(cls, tokens, width, pooled, hidden_tokens, random_seed):
        generator = torch.Generator().manual_seed(random_seed)
        extra = {"guidance": 3.5}
        if pooled:
            extra["pooled_output"] = torch.randn(1, pooled, generator=generator)
        if hidden_tokens:
            extra["attention_mask"] = torch.ones(1, tokens)
            extra["attention_mask"][:, -hidden_tokens:] = 0
        return io.NodeOutput([[torch.randn(1, tokens, width, generator=generator), extra]])


class TinyFlux(io.ComfyNode):
    """Flux with hidden size 256, two double and three single blocks; UNETLoader of 0.3.75 only knows 3072."""

    @classmethod
    def define_schema(cls):
        return io.Schema(node_id="TinyFlux", category="test", inputs=[], outputs=[io.Model.Output()])

    @classmethod
    def execute(cls):
        import comfy.model_patcher
        import comfy.supported_models

        torch.manual_seed(0)
        config = comfy.supported_models.Flux(
            dict(
                image_model="flux", in_channels=16, out_channels=16, vec_in_dim=32, context_in_dim=64,
                hidden_size=256, mlp_ratio=4.0, num_heads=2, depth=2, depth_single_blocks=3, axes_dim=[16, 56, 56],
                theta=10000, patch_size=2, qkv_bias=True, guidance_embed=True, dtype=torch.float32,
            )
        )  # fmt: skip
        config.set_inference_dtype(torch.float32, None)
        model = config.get_model({}, "")
        for name, value in model.diffusion_model.state_dict().items():
            if value.ndim > 1:
                value.normal_(std=value[0].numel() ** -0.5)
            elif "norm" in name and name.endswith(("scale", "weight")):
                value.fill_(1)
            else:
                value.zero_()
        cpu = torch.device("cpu")
        return io.NodeOutput(comfy.model_patcher.ModelPatcher(model, load_device=cpu, offload_device=cpu))


class RecordCalls(io.ComfyNode):
    """An attention override that notes each call it sees and hands it to the one before it, or to ComfyUI.

    Before Sage Attention Patch it sees the calls passed on; after it, all of them. `factor` scales the output, so
    that a chain shows in the result. Chains as good neighbours do.
    """

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="RecordCalls",
            category="test",
            inputs=[
                io.Model.Input("model"),
                io.String.Input("name"),
                io.Float.Input("factor", default=1.0, min=-10.0, max=10.0),
                io.Int.Input("clones", default=0),
            ],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(cls, model, name, factor, clones):
        patched = model.clone()
        options = patched.model_options["transformer_options"]
        before = options.get("optimized_attention_override")

        def record(func, q, k, v, *args, **kwargs):
            where = kwargs.get("transformer_options", {})
            _calls.append({
                "recorder": name,
                "block": _block[0],
                "told": [where.get("block_type"), where.get("block_index"), where.get("total_blocks")],
                "sigma": float(where["sigmas"][0]),
                "tokens": [q.shape[2 if kwargs.get("skip_reshape") else 1], k.shape[2 if kwargs.get("skip_reshape") else 1]],
                "mask": None if kwargs.get("mask") is None else list(kwargs["mask"].shape),
            })  # fmt: skip
            out = func(q, k, v, *args, **kwargs) if before is None else before(func, q, k, v, *args, **kwargs)
            return out * factor

        options["optimized_attention_override"] = record
        _watch_blocks(patched.get_model_object("diffusion_model"))
        for _ in range(clones):
            patched = patched.clone()
        return io.NodeOutput(patched)


def _watch_blocks(model) -> None:
    """Hooks that tell which block really runs, independent of what transformer_options says."""
    if hasattr(model, "_test_watched"):
        return
    model._test_watched = True
    blocks = [*getattr(model, "double_blocks", ()), *getattr(model, "single_blocks", ()), *getattr(model, "blocks", ())]
    for number, block in enumerate(blocks):
        block.register_forward_pre_hook(lambda *_, number=number: _block.__setitem__(0, number))
        block.register_forward_hook(lambda *_: _block.__setitem__(0, None))


class CompileModel(io.ComfyNode):
    """ComfyUI's own torch.compile wrapper with a backend that only counts; a graph break is an error."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="CompileModel", category="test", inputs=[io.Model.Input("model")], outputs=[io.Model.Output()]
        )

    @classmethod
    def execute(cls, model):
        from comfy_api.torch_helpers import set_torch_compile_wrapper

        def backend(graph, _inputs):
            _graphs.append(sum("sage_kernels" in str(node.target) for node in graph.graph.nodes))
            return graph.forward

        torch._dynamo.reset()
        patched = model.clone()
        set_torch_compile_wrapper(patched, backend=backend, fullgraph=True)
        return io.NodeOutput(patched)


class TestExtension(ComfyExtension):
    async def get_node_list(self):
        from aiohttp import web
        from server import PromptServer

        @PromptServer.instance.routes.get("/test/calls")
        async def calls(_request):
            """The calls recorded since the last time this was asked."""
            taken = json.dumps(_calls)
            _calls.clear()
            return web.json_response(text=taken)

        @PromptServer.instance.routes.get("/test/graphs")
        async def graphs(_request):
            """The graphs compiled since the last time this was asked."""
            taken = json.dumps(_graphs)
            _graphs.clear()
            return web.json_response(text=taken)

        return [TestConditioning, TinyFlux, RecordCalls, CompileModel]


async def comfy_entrypoint():
    return TestExtension()
