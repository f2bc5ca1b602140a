"""How apps that load Stable Diffusion draw: Apple's tokenizer and schedulers, in Python, from what
apple/ml-stable-diffusion does (commit e12202c). With them a bundle of coreml/sd.py is driven as an
app drives it, on any machine (bundle.SDBundle).
"""
import json
from pathlib import Path

import numpy as np
import torch

START, END, LAST = "<|startoftext|>", "<|endoftext|>", "</w>"
SD_SCALE = 0.18215

def sd_schedule() -> tuple[torch.Tensor, torch.Tensor]:
    """(a, s) (1000,): signal and noise of SD's scaled-linear betas from 0.00085 to 0.012."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    kept = (1 - betas).cumprod(0)
    return kept.sqrt(), (1 - kept).sqrt()

class AppleTokenizer:
    """BPETokenizer.swift: lower case, words between blanks, merges by rank, all places at once."""
    def __init__(self, folder):
        folder = Path(folder)
        self.vocabulary = json.loads((folder / "vocab.json").read_text("utf-8"))
        self.ranks = {}
        for rank, line in enumerate((folder / "merges.txt").read_text("utf-8").split("\n")):
            if line and line[0] != "#":
                self.ranks[tuple(line.split(" "))] = rank

    def ids(self, prompt: str, length: int) -> list[int]:
        """length ids: a prompt that is too long loses its end."""
        pieces = [piece for word in prompt.strip().lower().split(" ") if word
                  for piece in self.cut(word)]
        names = [START, *pieces, END]
        names += [END] * (length - len(names))
        unknown = self.vocabulary[END]
        return [self.vocabulary.get(name, unknown) for name in names][:length]

    def cut(self, word: str) -> list[str]:
        pieces = [*word[:-1], word[-1] + LAST]
        while True:
            pairs = [pair for pair in zip(pieces, pieces[1:]) if pair in self.ranks]
            if not pairs:
                return pieces
            best, joined, i = min(pairs, key=self.ranks.get), [], 0
            while i < len(pieces):
                n = 2 if tuple(pieces[i:i + 2]) == best else 1
                joined.append("".join(pieces[i:i + n]))
                i += n
            pieces = joined

def dpm_times(steps: int) -> list[int]:
    """Even from 999 down, 0 left out: TimeStepSpacing.linspace, in its fp32."""
    return [int(np.float32(i) * (np.float32(999) / np.float32(steps)) + np.float32(0.5))
            for i in range(steps, 0, -1)]

def apple_dpmpp(noise_of, x, steps: int):
    """DPMSolverMultistepScheduler.swift: second order, the first step and under 15 steps the last
    two of first order. noise_of(x, k): the network's answer at timestep k, guided.
    Returns the last prediction of x0, which is what the app decodes."""
    a, s = (table.numpy() for table in sd_schedule())
    snr, times, old = np.log(a) - np.log(s), dpm_times(steps), None
    for i, k in enumerate(times):
        after = times[i + 1] if i + 1 < steps else 0
        x0 = (x - s[k] * noise_of(x, k)) / a[k]
        D = x0
        if old is not None and not (steps < 15 and i >= steps - 2):
            r = (snr[k] - snr[times[i - 1]]) / (snr[after] - snr[k])
            D = x0 + (x0 - old) / (2 * r)
        x = s[after] / s[k] * x + a[after] * (1 - np.exp(snr[k] - snr[after])) * D
        old = x0
    return old

def pndm_times(steps: int) -> list[int]:
    times = [i * (1000 // steps) + 1 for i in range(steps - 1, -1, -1)]
    return [times[0], *times[1:2], *times[1:]]

def apple_pndm(noise_of, x, steps: int):
    """PNDMScheduler.swift without Runge-Kutta steps: steps + 1 evaluations, the second time twice.
    Returns the last prediction of x0."""
    a, s = (table.numpy() for table in sd_schedule())
    width, times = 1000 // steps, pndm_times(steps)
    first, seen = x, []
    for i, k in enumerate(times):
        noise, after = noise_of(x, k), k - width
        if i != 1:
            seen = [*seen[-3:], noise]
        else:                               # the first step again, with the mean of both answers
            k, after, x = k + width, k, first
        mixed = sum(weight * e for weight, e in zip(PLMS[len(seen)], reversed(seen)))
        if i == 1:
            mixed = (noise + seen[-1]) / 2
        x0 = (x - s[k] * mixed) / a[k]
        b, c = a[k] ** 2, a[max(0, after)] ** 2
        slope = b * np.sqrt(1 - c) + np.sqrt(b * (1 - b) * c)
        x = np.sqrt(c / b) * x - (c - b) / slope * mixed
    return x0

PLMS = {1: (1,), 2: (3 / 2, -1 / 2), 3: (23 / 12, -16 / 12, 5 / 12),
        4: (55 / 24, -59 / 24, 37 / 24, -9 / 24)}
SCHEDULERS = {"dpmpp": apple_dpmpp, "pndm": apple_pndm}

def sd_noise(velocity):
    """velocity(x_t, t) -> noise_of(x_k, k): a flow model asked as if it were SD (coreml/sd.py)."""
    a, s = sd_schedule()

    def noise_of(x, k):
        size, t = float(a[k] + s[k]), float(s[k] / (a[k] + s[k]))
        return x / size + (1 - t) * velocity(x / size, t)
    return noise_of

def flow_times(scheduler: str, steps: int) -> list[float]:
    """Our times of a scheduler's steps, then 0."""
    a, s = sd_schedule()
    of = {"dpmpp": dpm_times, "pndm": pndm_times}[scheduler]
    return [float(s[k] / (a[k] + s[k])) for k in sorted(set(of(steps)), reverse=True)] + [0.0]
