"""Text to picture.

    python sample.py "three red cars left of a tree" -n 4 --seed 1 -o out.png
    python sample.py "a dog" "a blue cat" --ckpt runs/nano --steps 28 --cfg 4 --sampler dpmpp
    python sample.py "a dog" --base                      the model before step distillation
    python sample.py --prompts mine.txt --out-dir out    a prompt a line, a file a picture
    python sample.py --info out.png                      the command that draws it again
    python sample.py "a red car" --coreml bundle/        a bundle that export_coreml.py wrote
    python sample.py --list                              what the model knows

In Python: `from sample import load; draw = load("assets/fast"); draw("a red car").save("a.png")`.

Rectified flow (docs/PAPER.md, section 4): x_t = (1 - t) x0 + t eps. The network gives the velocity
v = eps - x0, so x0 = x_t - t v, and t = 1 is noise. A sampler is a pure function
(velocity, x, times) -> x0, with velocity(x, t) -> v and times from 1 down to 0.

B batch | C channels | H W latent rows, columns
"""
import argparse
import gc
import json
import math
import os
import sys
import time
from pathlib import Path

# threads that spin while they wait triple the time of a picture on a machine that is busy
os.environ.setdefault("OMP_WAIT_POLICY", "passive")      # read when torch is imported

import torch
from PIL import Image, PngImagePlugin
from tqdm import tqdm

from common import (
    ASSETS,
    UserError,
    autocast,
    command_line,
    friendly,
    provenance,
    setup,
    use_bfloat16,
)
from data import known_things
from decoder import autoencoder_of, to_pictures
from mmdit import MMDiTConfig
from model import load_model
from plots import grid
from text import Text, join_texts
from wording import all_known, unknown_things

def shift_time(t, s: float):
    """More time near the noise, for larger pictures (Esser et al. 2024, eq. 23); s = 1: none.
    SD3.5 takes 3 at 1024 px."""
    return s * t / (1 + (s - 1) * t)

def times(steps: int, shift: float) -> list[float]:
    """The schedule: 1 -> 1/steps evenly, shifted, then 0. adv_distill.py trains at these times; a
    checkpoint keeps only their number and shift, so a change here moves old few-step weights."""
    return [shift_time(1 - i / steps, shift) for i in range(steps)] + [0.0]

def euler(velocity, x, times):
    """One evaluation a step, first order."""
    for t, s in zip(times, times[1:]):
        x = x + (s - t) * velocity(x, t)
    return x

def heun(velocity, x, times):
    """Two evaluations a step, one in the last (Karras et al. 2022, algorithm 1 without churn)."""
    for t, s in zip(times, times[1:]):
        v = velocity(x, t)
        y = x + (s - t) * v
        if s > 0:
            y = x + (s - t) * (v + velocity(y, s)) / 2
        x = y
    return x

def log_snr(t: float) -> float:
    return math.log((1 - t) / t)

def dpmpp(velocity, x, times):
    """DPM-Solver++(2M) for alpha = 1 - t, sigma = t (Lu et al. 2022, algorithm 2).
    One evaluation a step, second order in the log signal-to-noise ratio. The first and the last
    step are of first order: there the ratio is 0 or infinite."""
    old = old_t = None
    for t, s in zip(times, times[1:]):
        x0 = x - t * velocity(x, t)
        D = x0
        if old is not None and 0 < s and old_t < 1:
            r = (log_snr(t) - log_snr(old_t)) / (log_snr(s) - log_snr(t))
            D = x0 + (x0 - old) / (2 * r)
        # sigma_s / sigma_t x - alpha_s (exp(-h) - 1) D, with h the step in log SNR
        x = s / t * x + (1 - s - s / t * (1 - t)) * D
        old, old_t = x0, t
    return x

def renoise(velocity, x, times, noise):
    """For few-step students: predict x0, noise it afresh to the next time.
    One evaluation a step; noise(k) is step k's (Song et al. 2023, algorithm 1)."""
    for k, (t, s) in enumerate(zip(times, times[1:])):
        x0 = x - t * velocity(x, t)
        x = (1 - s) * x0 + s * noise(k) if s > 0 else x0
    return x

SAMPLERS = {"euler": euler, "heun": heun, "dpmpp": dpmpp, "renoise": renoise}

def sampling(config: dict, steps=None, cfg=None, sampler=None, shift=None) -> dict:
    """How a checkpoint is sampled, as keyword arguments of generate().
    What is asked for, else what config.json says under few_steps, else 28 guided steps. A student
    of K steps that is asked for fewer takes them at times that it was trained at."""
    if sampler == "pndm":
        raise UserError("--sampler pndm is an app's: it draws bundles of --target sd alone")
    few = config.get("few_steps") or {}
    K = few.get("steps", 28)
    n = steps or K
    shift = shift or few.get("shift") or config["flow"]["shift"]
    if few and n <= K:                      # 3 steps of 4: the trained times 0, 1, 2 of 0 1 2 3
        trained = times(K, shift)
        chosen = [trained[i * K // n] for i in range(n)] + [0.0]
    else:
        chosen = times(n, shift)
    return {
        "steps": chosen,
        "cfg": few.get("cfg", 4.0) if cfg is None else cfg,
        "sampler": sampler or few.get("sampler", "dpmpp"),
    }

def guided(net, text: Text, empty: Text | None, cfg: float, interval=(0.0, 1.0)):
    """velocity(x, t) with classifier-free guidance: v = v_empty + cfg (v_text - v_empty).
    Both halves go through the network in one batch. Outside the interval of t, or at cfg = 1, the
    text alone is asked, at half the cost (Kynkäänniemi et al. 2024). Texts are projected to keys
    and values once, not in each step."""
    def projected(text: Text) -> Text:
        if not hasattr(net, "keys_values"):
            return text
        return text._replace(emb=net.keys_values(text.emb))

    def ask(x, t, text: Text):
        t = torch.full((len(x),), t, device=x.device)
        return net(x, t, text.emb, text.mask, pooled=text.pooled)

    both = projected(join_texts([text, empty])) if cfg != 1 else None
    alone = projected(text)

    def velocity(x, t):
        if cfg == 1 or not interval[0] <= t <= interval[1]:
            return ask(x, t, alone)
        v, v_empty = ask(torch.cat([x, x]), t, both).chunk(2)       # (B, C, H, W) each
        return v_empty + cfg * (v - v_empty)
    return velocity

def latents_noise(seeds, shape, device):
    """(B, C, H, W), one seed a picture: a picture is the same in any batch, on any device."""
    parts = [torch.randn(shape, generator=torch.Generator().manual_seed(s % 2**63)) for s in seeds]
    return torch.stack(parts).to(device)

def repeated(text: Text, n: int) -> Text:
    """One caption's states (1, ...) for n pictures."""
    return Text(*(None if x is None else x.expand(n, *x.shape[1:]) for x in text))

@torch.inference_mode()
def generate(net, ae, captions, seeds, size=64, steps=28, cfg=4.0, sampler="dpmpp", shift=1.0,
             interval=(0.0, 1.0), batch=16, progress=False):
    """Captions and seeds, one of each a picture -> list of uint8 (H, W, 3).
    Without an autoencoder: list of latents. size: pixels, or (height, width); steps: a number, or
    the times themselves (then shift is not used). UserError where a picture is not finite."""
    height, width = (size, size) if isinstance(size, int) else size
    shape = (net.denoiser.cfg.in_channels, height // 8, width // 8)
    schedule = times(steps, shift) if isinstance(steps, int) else steps
    pictures = []
    with tqdm(total=len(captions), unit="picture", disable=not progress) as bar:
        for i in range(0, len(captions), batch):
            own = seeds[i:i + batch]
            text = net.encode(captions[i:i + batch])
            empty = repeated(net.encode([""]), len(own)) if cfg != 1 else None
            velocity = guided(net.denoiser, text, empty, cfg, interval)
            x = latents_noise(own, shape, net.device)           # (B, C, H, W)
            extra = {}
            if sampler == "renoise":
                extra["noise"] = fresh_noise(own, shape, net.device)
            latents = SAMPLERS[sampler](velocity, x, schedule, **extra)
            images = latents if ae is None else ae.decode(latents)
            if not images.isfinite().all():
                raise UserError("what the network draws is not finite: use an older checkpoint, "
                                "or less guidance")
            pictures += list(images) if ae is None else to_pictures(images)
            bar.update(len(own))
    return pictures

def fresh_noise(seeds, shape, device):
    """noise(k) of step k: for each picture a stream of its own."""
    def noise(k: int):
        return latents_noise([s + ((k + 1) << 40) for s in seeds], shape, device)
    return noise

# ---------------------------------------------------------------------------- a model in memory
def shipped() -> str:
    """The student of few steps, where there is one."""
    return "assets/fast" if (ASSETS / "fast").is_dir() else "assets/scenes"

def load_networks(ckpt: str, ae: str, coreml: str, device):
    """(network, autoencoder, config)."""
    if coreml:
        from coreml.bundle import load_bundle
        bundle = load_bundle(coreml)
        return bundle, bundle, bundle.config
    net, config = load_model(ckpt, device)
    return net, autoencoder_of(config, ae, device), config

def drawing(net, ae, size, how: dict, interval=(0.0, 1.0)):
    """A function (captions, seeds, progress) -> list of uint8 (H, W, 3)."""
    app = hasattr(net, "draw")                  # a bundle for apps, as they draw it
    # on a CPU that has bfloat16: 40 dB or more from fp32, in 0.7 of the time
    quick = net.device.type == "cpu" and ae is not net and use_bfloat16("auto", net.device)

    def draw(captions, seeds, progress=False):
        if app:
            return net.draw(captions, seeds, **how, progress=progress)
        with autocast(net.device, quick):
            return generate(net, ae, captions, seeds, size, **how, interval=interval,
                            progress=progress)
    return draw

def how_to_sample(net, config: dict, *asked) -> dict:
    """sampling(), or a bundle's own."""
    return net.sampling(*asked) if hasattr(net, "sampling") else sampling(config, *asked)

def load(ckpt: str = "", ae: str = "", device: str = "auto"):
    """A function (prompt, seed=0, steps=None, cfg=None, size=None, sampler=None) -> PIL image,
    the picture that the command line draws. size: pixels, or (height, width)."""
    net, ae, config = load_networks(ckpt or shipped(), ae, "", setup(device)[0])

    def draw(prompt: str, seed: int = 0, steps=None, cfg=None, size=None, sampler=None):
        wanted = [size] if isinstance(size, int) else list(size or [])
        pixels = picture_size(wanted, config["data"]["size"], net.denoiser.cfg)
        how = how_to_sample(net, config, steps, cfg, sampler)
        return Image.fromarray(drawing(net, ae, pixels, how)([prompt], [seed])[0])
    return draw

# ---------------------------------------------------------------------------- the command line
def utf8(word: str) -> str:
    """An argument whose bytes are UTF-8, in whatever locale Python took it apart."""
    return word.encode("utf-8", "surrogateescape").decode("utf-8", "replace")

def parse(argv):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("prompts", nargs="*", type=utf8,
                   help="what to draw, one picture or more for each")
    p.add_argument("--list", action="store_true", help="tell what the model knows, draw nothing")
    p.add_argument("--ckpt", default="", help="checkpoint or run; default: assets/fast")
    p.add_argument("--base", action="store_true", help="assets/scenes: before step distillation")
    p.add_argument("--ae", default="", help="autoencoder; default: the checkpoint's own")
    p.add_argument("--coreml", default="", metavar="BUNDLE", help="draw with this Core ML bundle")
    p.add_argument("--steps", type=int, help="default: the checkpoint's few_steps, else 28")
    p.add_argument("--cfg", type=float, help="guidance, 1 = none; default: few_steps', else 4")
    p.add_argument("--interval", type=float, nargs=2, default=(0.0, 1.0), metavar=("FROM", "TO"),
                   help="times t at which guidance acts")
    p.add_argument("--sampler", choices=[*SAMPLERS, "pndm"],
                   help="default: few_steps', else dpmpp; pndm: of bundles for apps")
    p.add_argument("--shift", type=float, default=0.0, help="shift of time; 0 = as in training")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("-n", type=int, default=1, help="pictures a prompt")
    p.add_argument("--size", type=int, nargs="+", default=[],
                   help="pixels, or height and width; default: as in training")
    p.add_argument("--device", default="auto")
    p.add_argument("-o", "--out", default="out.png")
    p.add_argument("--separate", action="store_true", help="a file a picture: out_0.png, ..")
    p.add_argument("--out-dir", default="", metavar="DIR", help="makes DIR, separate files in it")
    p.add_argument("--prompts", dest="file", default="", metavar="FILE", help="a prompt a line")
    p.add_argument("--info", default="", metavar="PNG", help="print what drew it, draw nothing")
    return p.parse_args(argv)

def read_prompts(path: str) -> list[str]:
    try:
        lines = Path(path).expanduser().read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"--prompts {path}: {e}; it wants a text file, a prompt a line") from None
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UserError(f"--prompts {path}: the file has no line with a prompt")
    return prompts

def check_request(a) -> Path:
    """The file to write. UserError, before anything is loaded, where the request cannot be met."""
    if not all(prompt.strip() for prompt in a.prompts or [""]):
        raise UserError("the prompt is empty: say what to draw, such as \"a red car\", or --list")
    if not 1 <= (1 if a.steps is None else a.steps) <= 1000 or not 1 <= a.n <= 10000:
        raise UserError(f"--steps wants 1 to 1000 and -n 1 to 10000, got {a.steps} and {a.n}")
    numbers = [a.shift, *a.interval] + ([] if a.cfg is None else [a.cfg])
    if not all(math.isfinite(v) for v in numbers):
        raise UserError("--cfg, --shift and --interval must be finite numbers")
    if a.shift < 0 or a.interval[0] > a.interval[1]:
        raise UserError("--shift wants 0 (as in training) or more, --interval its smaller "
                        "time first")
    if a.base and a.ckpt:
        raise UserError(f"--base is assets/scenes: leave it or --ckpt {a.ckpt} out")
    out = Path(a.out).expanduser()
    if a.out_dir:
        out, a.separate = Path(a.out_dir).expanduser() / out.name, True
        out.parent.mkdir(parents=True, exist_ok=True)
    if not out.parent.is_dir():
        raise UserError(f"the directory {out.parent} does not exist: create it, or give another -o")
    if out.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise UserError(f"-o {a.out}: name a .png, .jpg or .webp file")
    return out

def picture_size(asked: list[int], trained: int, network) -> int | tuple[int, int]:
    """Pixels, or (height, width). UserError where a network of this config cannot draw them."""
    size = asked or [trained]
    if isinstance(network, MMDiTConfig):
        grain = 8 * network.patch
        largest = grain * network.position_max              # where its position table ends
    else:
        grain = 8 * 2 ** (len(network.widths) - 1)
        largest = 8 * trained                               # beyond, minutes for no more detail
    if len(size) > 2 or any(s < grain or s % grain or s > largest for s in size):
        raise UserError(f"--size {asked}: one or two multiples of {grain} pixels up to {largest}, "
                        f"such as {4 * grain} or {4 * grain} {2 * grain}")
    return size[0] if len(size) == 1 else tuple(size)

def tell_known(a, config: dict, net):
    """With --list all that a network of scenes knows, else the things of the prompts that it
    does not. It draws all the same."""
    known = [] if a.coreml or net.text is None else known_things(config)
    if a.list:
        print(all_known(known) if known else "it learned from your pictures: see their captions")
    for prompt in a.prompts if known else ():
        for word, near in unknown_things(prompt, known).items():
            nearest = f"nearest: {', '.join(near)}" if near else "--list shows them"
            print(f"{word}: not among the {len(known)} things it knows; {nearest}")

RECORD = "nanosnapgen"          # key of the text chunk

def record(a, how: dict, size) -> dict:
    """What a picture's file says of how it was drawn."""
    return {
        **provenance(a.seed), "prompts": a.prompts, "n": a.n, "ckpt": a.ckpt, "ae": a.ae,
        "coreml": a.coreml, "size": [size] if isinstance(size, int) else list(size),
        "steps": len(how["steps"]) - 1, "cfg": how["cfg"], "sampler": how["sampler"],
        "shift": a.shift, "interval": list(a.interval)}

def command_of(about: dict) -> str:
    """The command that draws it again."""
    words = ["python", "sample.py", *about["prompts"]]
    for key in ("ckpt", "coreml", "ae", "size", "steps", "cfg", "sampler", "shift", "interval",
                "seed"):
        value = about[key]
        unset = value == "" or (key, value) in (("shift", 0.0), ("interval", [0.0, 1.0]))
        if not unset and not (about["coreml"] and key in ("ae", "size")):
            words += [f"--{key}", *(value if isinstance(value, list) else [value])]
    return command_line([*words, "-n", about["n"]])

def tell_info(path: str):
    try:
        with Image.open(Path(path).expanduser()) as image:
            about = json.loads(image.info[RECORD])
        line = (f"{command_of(about)}\n(commit {about['commit']}, {about['machine']}, torch "
                f"{about['torch']}, {about['date']})")
    except (OSError, LookupError, RecursionError, TypeError, ValueError):
        raise UserError(f"{path} does not say how it was drawn: PNG files of sample.py do, "
                        "unless another program saved them anew") from None
    print(line)

def save_picture(image, path: Path, about: dict):
    text = PngImagePlugin.PngInfo()
    text.add_text(RECORD, json.dumps(about))
    image.save(path, **({"pnginfo": text} if path.suffix.lower() == ".png" else {}))

def save_pictures(a, out: Path, about: dict, pictures, captions, seeds) -> str:
    """One sheet, or a file a picture -> their names."""
    if not a.separate:
        sheet = Image.fromarray(pictures[0])
        if len(pictures) > 1:
            columns = a.n if a.n > 1 and len(a.prompts) > 1 else 0      # a prompt a row
            sheet = grid(pictures, captions, columns, max(1, 256 // pictures[0].shape[0]))
        save_picture(sheet, out, about)
        return str(out)
    digits = len(str(len(pictures) - 1))
    names = [out.with_name(f"{out.stem}_{i:0{digits}}{out.suffix}") for i in range(len(pictures))]
    for name, picture, caption, seed in zip(names, pictures, captions, seeds, strict=True):
        own = {"prompts": [caption], "seed": seed, "n": 1}
        save_picture(Image.fromarray(picture), name, about | own)
    return str(names[0]) if len(names) == 1 else f"{names[0]} .. {names[-1].name}"

def main(argv):
    a = parse(argv)
    if a.info:
        return tell_info(a.info)
    a.prompts += read_prompts(a.file) if a.file else []
    out = None if a.list else check_request(a)
    device, _, _ = setup(a.device)
    if not a.coreml:
        a.ckpt = "assets/scenes" if a.base else a.ckpt or shipped()
    net, ae, config = load_networks(a.ckpt, a.ae, a.coreml, device)
    if a.coreml and a.size not in ([], [net.size]):
        raise UserError(f"{a.coreml} draws {net.size} pixels: export another for --size")
    tell_known(a, config, net)
    if a.list:
        return
    size = picture_size(a.size, config["data"]["size"], net.denoiser.cfg)
    captions = [c for c in a.prompts for _ in range(a.n)]
    seeds = [a.seed + i for _ in a.prompts for i in range(a.n)]
    how = how_to_sample(net, config, a.steps, a.cfg, a.sampler, a.shift)
    if hasattr(net, "draw") and tuple(a.interval) != (0.0, 1.0):
        raise UserError("--interval: an app's guidance acts at all times, leave it out")
    begin = time.time()
    pictures = drawing(net, ae, size, how, a.interval)(captions, seeds, progress=True)
    seconds = (time.time() - begin) / len(pictures)

    names = save_pictures(a, out, record(a, how, size), pictures, captions, seeds)
    height, width = pictures[0].shape[:2]
    at = [f"{t:.2f}" for t in how["steps"][:-1]]
    if len(at) > 8:
        at[4:-1] = [".."]
    print(f"{names}: {len(pictures)} pictures of {height}x{width}, {seconds:.2f} s each ("
          f"{how['sampler']}, guidance {how['cfg']:g}, {len(how['steps']) - 1} steps at t = "
          f"{' '.join(at)})")

if __name__ == "__main__":
    gc.freeze()     # torch's 160,000 objects stay: a search for garbage among them costs 0.1 s
    with friendly():
        main(sys.argv[1:])
