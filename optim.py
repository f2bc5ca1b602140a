"""Muon and AdamW in one optimizer, the average of the weights, and a training step for both.

Muon (Keller Jordan et al. 2024, MIT licence) replaces a matrix gradient's momentum by the nearest
matrix with orthonormal rows or columns, so that all directions of a weight learn at one pace.
After equal steps of short runs its loss is clearly lower than AdamW's (LOG.md).

Nothing here waits for the device: whether a gradient is finite is a tensor `ok` on the device, and
where it is False all weights, moments and counts keep their values.
"""
import contextlib
import functools
import math

import torch
import torch.distributed as dist
import torch.nn as nn

from common import UserError, use_bfloat16

def rate(cfg, step: int) -> float:
    """Share of the peak learning rate: linear warm-up over cfg.warmup steps, cosine to 1e-4."""
    cosine = 0.5 * (1 + math.cos(math.pi * step / cfg.steps)) + 1e-4
    return min((step + 1) / cfg.warmup, cosine)

@functools.cache
def muon_precision(device: torch.device) -> torch.dtype:
    """bfloat16 where the device computes in it; imitated, it takes 20 times as long (LOG.md)."""
    return torch.bfloat16 if use_bfloat16("auto", device) else torch.float32

def newton_schulz(X, precision: torch.dtype):
    """Each matrix U S V^T of X (k, m, n), m <= n, becomes about U V^T; Jordan's coefficients."""
    X = X / (torch.linalg.vector_norm(X, dim=(1, 2), keepdim=True) + 1e-7)
    X = X.to(precision)
    for _ in range(5):
        A = X @ X.mT                                            # (k, m, m)
        B = torch.baddbmm(A, A, A, beta=-4.7750, alpha=2.0315)
        X = torch.baddbmm(X, B, X, beta=3.4445)                 # (k, m, n)
    return X

def compile_many():
    """Lets PyTorch compile a function for as many shapes as a network has; it gives up after 8."""
    torch._dynamo.config.recompile_limit = 256
    torch._dynamo.config.accumulated_recompile_limit = 4096

@torch.no_grad()
def orthogonalise(matrices: list, iterate=newton_schulz) -> list:
    """Each matrix U S V^T becomes about U V^T. Matrices of one shape go through together: on a GPU
    a small network would otherwise wait for the launches of many small products."""
    out = [None] * len(matrices)
    alike = {}
    for i, M in enumerate(matrices):
        alike.setdefault((min(M.shape), max(M.shape)), []).append(i)
    for indices in alike.values():
        tall = [matrices[i].shape[0] > matrices[i].shape[1] for i in indices]
        wide = [matrices[i].T if t else matrices[i] for i, t in zip(indices, tall)]
        X = iterate(torch.stack(wide), muon_precision(wide[0].device))  # (k, m, n), m <= n
        turned = X.mT.contiguous() if any(tall) else X          # contiguous: see Muon.muon_update
        for k, (i, t) in enumerate(zip(indices, tall)):
            out[i] = turned[k] if t else X[k]
    return out

def orthogonalise_shared(matrices: list, iterate=newton_schulz) -> list:
    """orthogonalise(); of several processes each does its share and sends it to the others."""
    if not dist.is_initialized():
        return orthogonalise(matrices, iterate)
    world, rank = dist.get_world_size(), dist.get_rank()
    largest_first = sorted(range(len(matrices)), key=lambda i: -matrices[i].numel())
    shares = [largest_first[r::world] for r in range(world)]
    mine = orthogonalise([matrices[i] for i in shares[rank]], iterate)
    out = [None] * len(matrices)
    for r, share in enumerate(shares):
        sizes = [matrices[i].numel() for i in share]
        if r == rank:
            flat = torch.cat([u.flatten() for u in mine])
        else:
            device = matrices[0].device
            flat = torch.empty(sum(sizes), dtype=muon_precision(device), device=device)
        dist.broadcast(flat.view(torch.uint8), r)   # as bytes: not every backend knows bfloat16
        for i, part in zip(share, flat.split(sizes)):
            out[i] = part.view_as(matrices[i])
    return out

def clear_unless(ok: torch.Tensor, grads: list):
    """Zeros in all gradients where `ok` () is False, in one kernel. NaN times 0 would be NaN: it is
    their bits that are multiplied, as integers."""
    kinds = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    torch._foreach_mul_([g.view(kinds[g.element_size()]) for g in grads], ok.int())

class Muon(torch.optim.Optimizer):
    """Muon with `muon_lr` for matrices, AdamW with `lr` for everything else.
    Matrices are linears and convolutions, as (C_out, C_in*k*k). Embeddings, depthwise kernels,
    norms and biases are the rest. With muon_lr=0 AdamW does all. Weights with two dimensions or
    more decay (decoupled). Each group keeps its peak rate as group["peak"]. slow: parameters whose
    rates are `share` of the others'. compile: newton_schulz by torch.compile."""
    def __init__(self, module: nn.Module, lr, muon_lr=0.0, weight_decay=0.01, betas=(0.9, 0.99),
                 slow=(), share=1.0, compile=False):
        self.iterate = newton_schulz
        if compile:
            compile_many()
            self.iterate = torch.compile(newton_schulz, dynamic=False)      # for each shape anew
        embeddings = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding)}
        slow = {id(p) for p in slow}
        params = {(kind, own): [] for own in (1.0, share) for kind in ("muon", "decay", "rest")}
        for p in module.parameters():
            matrix = p.ndim > 1 and min(p.shape[0], p[0].numel()) >= 16 and id(p) not in embeddings
            kind = "muon" if matrix and muon_lr else "decay" if p.ndim > 1 else "rest"
            params[kind, share if id(p) in slow else 1.0].append(p)
        groups = []
        for kind, own in [key for key in params if params[key]]:
            peak = own * (muon_lr if kind == "muon" else lr)
            decay = 0.0 if kind == "rest" else weight_decay
            group = {"params": params[kind, own], "muon": kind == "muon", "lr": peak, "peak": peak}
            groups.append({**group, "weight_decay": decay})
        super().__init__(groups, {"betas": betas})
        device = next(module.parameters()).device
        self.count = torch.zeros((), device=device)             # steps that were not skipped

    def schedule(self, factor: float):
        """Sets the learning rates to this share of their peaks."""
        for group in self.param_groups:
            group["lr"] = group["peak"] * factor

    def moments(self, group, params) -> list[dict]:
        """The parameters' moments, zero at first."""
        for p in params:
            for name in ("momentum",) if group["muon"] else ("m", "v"):
                if name not in self.state[p]:
                    self.state[p][name] = torch.zeros_like(p)
        return [self.state[p] for p in params]

    @torch.no_grad()
    def step(self, ok: torch.Tensor | None = None):
        """One step; `ok` () bool on the device: where it is False, nothing changes."""
        keep = torch.ones_like(self.count) if ok is None else ok.float()
        self.count += keep
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            grads = [p.grad for p in params]
            if ok is not None:
                clear_unless(ok, grads)
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"] * keep)
            update = self.muon_update if group["muon"] else self.adam_update
            update(group, params, grads, keep)

    def muon_update(self, group, params, grads, keep):
        momenta = [s["momentum"] for s in self.moments(group, params)]
        torch._foreach_mul_(momenta, 1 - 0.05 * keep)
        torch._foreach_add_(momenta, grads, alpha=0.05)         # grads are 0 where keep is 0
        ahead = torch._foreach_lerp(grads, momenta, 0.95)       # Nesterov's look ahead
        matrices = [x.flatten(1) for x in ahead]                # (C_out, C_in*k*k)
        found = orthogonalise_shared(matrices, self.iterate)
        # one kernel for all matrices, where they are laid out as the weights are
        torch._foreach_copy_(ahead, [U.view_as(x) for x, U in zip(ahead, found)])
        torch._foreach_mul_(ahead, [max(1, M.shape[0] / M.shape[1]) ** 0.5 for M in matrices])
        torch._foreach_mul_(ahead, keep)
        torch._foreach_add_(params, ahead, alpha=-group["lr"])

    def adam_update(self, group, params, grads, keep):
        states = self.moments(group, params)
        first, second = [s["m"] for s in states], [s["v"] for s in states]
        b1, b2 = group["betas"]
        torch._foreach_mul_(first, 1 - (1 - b1) * keep)
        torch._foreach_add_(first, grads, alpha=1 - b1)
        torch._foreach_mul_(second, 1 - (1 - b2) * keep)
        torch._foreach_addcmul_(second, grads, grads, 1 - b2)
        n = self.count.clamp(min=1)
        root = torch._foreach_sqrt(second)
        torch._foreach_div_(root, (1 - b2**n).sqrt())
        torch._foreach_add_(root, 1e-8)
        change = torch._foreach_mul(first, -group["lr"] * keep / (1 - b1**n))
        torch._foreach_addcdiv_(params, change, root)

    def tensors(self) -> dict[str, torch.Tensor]:
        """{"count": .., "3.momentum": .., ...}: the state as safetensors takes it."""
        for group in self.param_groups:
            self.moments(group, group["params"])                # makes those that are not there yet
        state = self.state_dict()["state"]
        flat = {f"{i}.{name}": x for i, moments in state.items() for name, x in moments.items()}
        return {"count": self.count, **flat}

    def load_tensors(self, tensors: dict, what: str = "optimizer"):
        """The reverse of tensors(). UserError where keys or shapes are another network's."""
        own = self.tensors()
        forms = [{k: (x.shape, x.dtype) for k, x in some.items()} for some in (own, tensors)]
        if forms[0] != forms[1]:
            raise UserError(f"{what} belongs to another network or optimizer: resume with the "
                            "settings that the run began with, or give another out=")
        for key, x in own.items():
            x.copy_(tensors[key])

class EMA:
    """Exponential moving average of a module's parameters, in fp32 and without bias.
    After n updates it is sum_k decay^(n-k) w_k over the sum of these weights, as Adam's moments
    are corrected: the first update already gives w_1, and the window is min(n, 1 / (1 - decay))."""
    def __init__(self, module: nn.Module, decay: float):
        self.decay = decay
        self.source = dict(module.named_parameters())
        self.average = {k: p.detach().float().clone() for k, p in self.source.items()}
        self.count = torch.zeros((), device=next(module.parameters()).device)

    @torch.no_grad()
    def update(self, ok: torch.Tensor | None = None):
        """Moves towards the module's weights; `ok`: see Muon.step."""
        keep = torch.ones_like(self.count) if ok is None else ok.float()
        self.count += keep
        log_decay = math.log(self.decay or 1e-30)
        total = -torch.expm1(log_decay * self.count.clamp(min=1))       # 1 - decay^n
        share = keep * (1 - self.decay) / total
        average = list(self.average.values())
        torch._foreach_mul_(average, 1 - share)
        now = [p.detach().float() for p in self.source.values()]
        torch._foreach_add_(average, torch._foreach_mul(now, share))

    def state_dict(self) -> dict[str, torch.Tensor]:
        return self.average

    def load_state_dict(self, state: dict):
        for name, average in self.average.items():
            average.copy_(state[name])

    @contextlib.contextmanager
    def swapped(self):
        """Inside, the module holds the averaged weights; afterwards its own again."""
        own = {k: p.detach().clone() for k, p in self.source.items()}
        try:
            self.put(self.average)
            yield
        finally:
            self.put(own)

    @torch.no_grad()
    def put(self, values: dict):
        for name, p in self.source.items():
            p.copy_(values[name])

class Learner:
    """A module and its optimizer: one clipped step, skipped where the gradient is not finite.
    Skips are counted on the device and read by trouble(), which the log calls when it is due."""
    def __init__(self, module: nn.Module, opt: Muon, clip: float, ema: EMA | None = None):
        self.module, self.opt, self.ema = module, opt, ema
        self.clip = clip
        self.names = []                                         # of parameters with a gradient
        device = next(module.parameters()).device
        self.skipped = torch.zeros((), dtype=torch.long, device=device)
        self.in_a_row = torch.zeros_like(self.skipped)
        self.culprit = torch.full_like(self.skipped, -1)        # the first parameter that was bad
        self.reported = 0

    def step(self) -> torch.Tensor:
        """Clips the gradient's norm, steps, averages, clears the gradient. Returns the norm ()."""
        grads = {n: p.grad for n, p in self.module.named_parameters() if p.grad is not None}
        self.names = list(grads)
        norms = torch.stack(torch._foreach_norm(list(grads.values())))          # (parameters,)
        norm = torch.linalg.vector_norm(norms)
        ok = torch.isfinite(norm)
        scale = (self.clip / (norm + 1e-6)).clamp(max=1)
        torch._foreach_mul_(list(grads.values()), scale)
        self.opt.step(ok)
        if self.ema:
            self.ema.update(ok)
        self.opt.zero_grad(set_to_none=True)

        self.skipped += ~ok
        self.in_a_row.add_(1).mul_(~ok)
        bad = (~torch.isfinite(norms)).long().argmax()
        self.culprit = torch.where(ok, self.culprit, bad)
        return norm

    def trouble(self) -> str:
        """What was skipped since the last call, in one line, or "".
        UserError after 20 steps in a row without a finite gradient."""
        skipped = int(self.skipped)
        if skipped == self.reported:
            return ""
        new, self.reported = skipped - self.reported, skipped
        line = (f"{new} steps skipped, their gradient was not finite (first in "
                f"{self.names[int(self.culprit)]}); {skipped} so far")
        if int(self.in_a_row) >= 20:
            raise UserError(f"{line}, the last {int(self.in_a_row)} in a row: lower lr, or set "
                            "amp=float32; the last good checkpoint is kept")
        return line

def average_gradients(module: nn.Module):
    """Gradients become their mean over the processes."""
    grads = [p.grad for p in module.parameters() if p.grad is not None]
    if not dist.is_initialized() or not grads:
        return
    flat = torch.cat([g.flatten() for g in grads])
    dist.all_reduce(flat)
    for g, part in zip(grads, flat.split([g.numel() for g in grads])):
        g.copy_(part.view_as(g) / dist.get_world_size())
