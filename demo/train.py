"""Train the digit model: a small text-to-video Wan, class-conditional, by flow matching.

    python demo/train.py --comfyui DIR --minutes 7 --out demo/weights

The network is ComfyUI's own WanModel, so its weights load through UNETLoader. Needs a ComfyUI checkout, torch,
einops, safetensors, pillow and scikit-learn, and a GPU to finish in minutes. Trains the classifier first, then the
model until the time is up, then samples videos as ComfyUI would and writes what the classifier made of them:
digits_wan.safetensors, digit_classifier.safetensors, evaluation.json and samples.png.
"""

import argparse
import copy
import hashlib
import json
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.nn.functional as F
from classifier import Classifier
from data import load_digits, render
from digit_nodes.format import DIGITS, LATENT_SHAPE, TEXT_DIM, conditioning, frames_to_latent, latent_to_frames
from safetensors.torch import load_file, save_file

HERE = Path(__file__).parent
DIM, HEADS = 256, 2  # head_dim 128
SHIFT = 8.0  # ComfyUI's sampling_settings of Wan 2.1
DROP_CLASS = 0.1  # share of videos trained without their class, for guidance
# (steps, cfg, videos) evaluated; the first is what workflows/demo.json asks for.
SETTINGS = ((20, 2.0, 100), (20, 1.0, 100), (20, 3.0, 100), (12, 2.0, 100), (20, 2.0, 1000))


def log(start, *what):
    print(f"{time.monotonic() - start:6.1f} s", *what, flush=True)


def build(comfyui, device, blocks, ffn):
    """ComfyUI's WanModel with fresh weights, float32."""
    sys.path.insert(0, str(comfyui))
    from comfy.cli_args import args

    args.cpu = device.type == "cpu"
    args.use_pytorch_cross_attention = True
    import comfy.ops
    from comfy.ldm.wan.model import WanModel

    model = WanModel(
        model_type="t2v",
        in_dim=LATENT_SHAPE[0],
        out_dim=LATENT_SHAPE[0],
        dim=DIM,
        ffn_dim=ffn,
        text_dim=TEXT_DIM,
        num_heads=HEADS,
        num_layers=blocks,
        device=device,
        dtype=torch.float32,
        operations=comfy.ops.disable_weight_init,
    )
    for name, weight in model.named_parameters():  # ComfyUI leaves weights unset
        if name.endswith("modulation"):
            torch.nn.init.normal_(weight, std=DIM**-0.5)
        elif weight.ndim == 1:
            torch.nn.init.constant_(weight, 1.0 if "norm" in name and name.endswith("weight") else 0.0)
        elif name.startswith("head."):
            torch.nn.init.zeros_(weight)
        else:
            torch.nn.init.xavier_uniform_(weight.view(len(weight), -1))
    return model


def train_classifier(device, seconds, start):
    """Returns (classifier, accuracy on videos of the test scans)."""
    glyphs, labels = load_digits(test=False, device=device)
    generator = torch.Generator(device).manual_seed(1)
    model = Classifier().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    began, step, progress = time.monotonic(), 0, 0.0
    while progress < 1:
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * (1 - progress) + 1e-5
        pick = torch.randint(len(glyphs), (512,), generator=generator, device=device)
        frames = render(glyphs[pick], generator, frames=1)
        noise = 0.1 * torch.rand(len(pick), 1, 1, 1, generator=generator, device=device)
        frames = (frames + noise * torch.randn(frames.shape, generator=generator, device=device)).clamp(0, 1)
        loss = F.cross_entropy(model(frames), labels[pick], label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        step += 1
        progress = (time.monotonic() - began) / seconds
        if step % 500 == 0:
            log(start, f"classifier step {step} loss {loss.item():.3f}")
    model.eval()
    glyphs, labels = load_digits(test=True, device=device)
    found, _ = model.recognise(render(glyphs, generator))
    accuracy = (found == labels).float().mean().item()
    log(start, f"classifier: {accuracy:.3f} of {len(labels)} videos of test digits")
    return model, accuracy


def noise_level(b, generator, device):
    """Sigmas [b], spread as the sampler visits them, and one in five spread more evenly."""
    t = (torch.arange(b, device=device) + torch.rand(b, generator=generator, device=device)) / b
    shift = torch.where(torch.rand(b, generator=generator, device=device) < 0.8, SHIFT, 2.0)
    return shift * t / (1 + (shift - 1) * t)


def train(model, args, device, start, export):
    """Flow matching until args.minutes are over. Returns (averaged weights' model, facts for the report)."""
    glyphs, labels = load_digits(test=False, device=device)
    prompts = conditioning(DIGITS).to(device)  # row 0 has no class
    generator = torch.Generator(device).manual_seed(0)
    average = copy.deepcopy(model).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.98), weight_decay=0.01)
    if args.compile:
        torch._dynamo.config.recompile_limit = 2 * len(model.blocks)
        for block in model.blocks:
            block.compile()
    model.train()
    autocast = torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext()
    began, seconds, step, progress, running, exported = time.monotonic(), args.minutes * 60, 0, 0.0, None, False
    while progress < 1:
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(1.0, (step + 1) / 300) * (1 - progress) + 1e-6
        pick = torch.randint(len(glyphs), (args.batch,), generator=generator, device=device)
        keep = torch.rand(args.batch, generator=generator, device=device) >= DROP_CLASS
        context = prompts[torch.where(keep, labels[pick] + 1, 0)]
        clean = frames_to_latent(render(glyphs[pick], generator))
        noise = torch.randn(clean.shape, generator=generator, device=device)
        sigma = noise_level(args.batch, generator, device)
        blend = sigma.view(-1, 1, 1, 1, 1)
        with autocast:
            flow = model(blend * noise + (1 - blend) * clean, sigma * 1000, context)
        loss = F.mse_loss(flow.float(), noise - clean)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        decay = min(0.9995, step / (step + 20))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)
        running = loss.detach() if running is None else running.lerp(loss.detach(), 0.02)
        if step % args.every == 0 or step == 1:
            log(
                start,
                f"step {step} loss {running.item():.4f} {step * args.batch / (time.monotonic() - began):.0f} videos/s",
            )
            if progress > 0.6 and not exported:  # so that a run cut short leaves something
                export(average)
                exported = True
        if step % 5 == 0 or device.type == "cpu":
            if device.type == "cuda":
                torch.cuda.synchronize()
            progress = (time.monotonic() - began) / seconds
    return average, {
        "steps": step,
        "batch": args.batch,
        "videos": step * args.batch,
        "seconds": round(time.monotonic() - began),
        "loss": round(running.item(), 4),
    }


def sigmas(steps):
    """ComfyUI's "simple" schedule over Wan's shifted flow."""
    t = torch.arange(1, 1001) / 1000
    table = SHIFT * t / (1 + (SHIFT - 1) * t)
    return [table[-(1 + int(i * len(table) / steps))].item() for i in range(steps)] + [0.0]


@torch.no_grad()
def sample(model, digits, steps, cfg, seeds, device, batch=50):
    """Euler sampling as KSampler does it. digits: entries of DIGITS; seeds as many. Returns frames on the CPU."""
    videos = []
    for i in range(0, len(digits), batch):
        some = digits[i : i + batch]
        x = torch.cat(
            [
                torch.randn(1, *LATENT_SHAPE, generator=torch.Generator().manual_seed(seed))
                for seed in seeds[i : i + batch]
            ]
        ).to(device)
        context = torch.cat([conditioning(some), conditioning(["none"] * len(some))]).to(device)
        schedule = sigmas(steps)
        for sigma, following in zip(schedule, schedule[1:]):
            t = torch.full((len(x),), sigma * 1000, device=device)
            if cfg == 1:
                flow = model(x, t, context[: len(x)])
            else:
                given, plain = model(x.repeat(2, 1, 1, 1, 1), t.repeat(2), context).chunk(2)
                flow = plain + cfg * (given - plain)
            x = x + (following - sigma) * flow
        videos.append(latent_to_frames(x).cpu())
    return torch.cat(videos)


def contact_sheet(videos, path):
    """Videos [n, t, h, w] -> one PNG, a row per video."""
    from PIL import Image

    rows = torch.cat([torch.cat(list(F.pad(v, (1, 1, 1, 1), value=0.3)), dim=1) for v in videos])
    Image.fromarray((rows * 255).round().to(torch.uint8).numpy()).save(path, optimize=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comfyui", type=Path, required=True, help="a ComfyUI checkout")
    parser.add_argument("--out", type=Path, default=HERE / "weights")
    parser.add_argument("--minutes", type=float, default=7, help="training time of the model")
    parser.add_argument("--classifier-seconds", type=float, default=40)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--blocks", type=int, default=6)
    parser.add_argument("--ffn", type=int, default=768)
    parser.add_argument("--samples", type=int, default=1000, help="at most so many videos in each evaluation")
    parser.add_argument("--every", type=int, default=100, help="steps between lines of progress")
    parser.add_argument("--compile", action="store_true", help="torch.compile the blocks")
    args = parser.parse_args()
    start = time.monotonic()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)

    classifier, accuracy = train_classifier(device, args.classifier_seconds, start)
    save_file(
        {k: v.half().cpu().contiguous() for k, v in classifier.state_dict().items()},
        str(args.out / "digit_classifier.safetensors"),
    )
    classifier = classifier.cpu()

    weights = args.out / "digits_wan.safetensors"
    model = build(args.comfyui, device, args.blocks, args.ffn)

    def export(trained):
        state = {k: v.half().cpu().contiguous() for k, v in trained.state_dict().items()}
        save_file(
            state, str(weights), metadata={"description": "Sage Attention Patch demo: moving digits, Wan 2.1 t2v"}
        )
        log(start, f"wrote {weights}: {weights.stat().st_size / 1e6:.1f} MB")

    average, training = train(model, args, device, start, export)
    export(average)
    average.load_state_dict({k: v.float() for k, v in load_file(str(weights)).items()})  # judge what was written

    rows = []
    for steps, cfg, count in SETTINGS:
        digits = [str(i % 10) for i in range(min(count, args.samples))]
        videos = sample(average, digits, steps, cfg, range(1000, 1000 + len(digits)), device)
        found, confidence = classifier.recognise(videos)
        right = found == torch.tensor([int(d) for d in digits])
        rows.append(
            {
                "steps": steps,
                "cfg": cfg,
                "sampler": "euler",
                "scheduler": "simple",
                "shift": SHIFT,
                "videos": len(digits),
                "recognised": int(right.sum()),
                "confidence": round(confidence.mean().item(), 3),
            }
        )
        log(start, rows[-1])
        if len(rows) == 1:
            contact_sheet(videos[:10], args.out / "samples.png")
    sources = ("train.py", "data.py", "classifier.py", "digit_nodes/format.py")
    report = {
        "machine": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "sources_sha256": {name: hashlib.sha256((HERE / name).read_bytes()).hexdigest() for name in sources},
        "model": {
            "dim": DIM,
            "heads": HEADS,
            "blocks": args.blocks,
            "ffn_dim": args.ffn,
            "parameters": sum(p.numel() for p in average.parameters()),
            "bytes": weights.stat().st_size,
            "sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
        },
        "training": training,
        "classifier": {"test_videos": len(load_digits(test=True)[1]), "test_accuracy": round(accuracy, 4)},
        "evaluation": rows,
    }
    (args.out / "evaluation.json").write_text(json.dumps(report, indent=2) + "\n")
    log(start, "done")


if __name__ == "__main__":
    main()
