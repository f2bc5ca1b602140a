"""The optimiser (Muon for matrices, AdamW for the rest), the moving average of the weights, and how both go into a checkpoint.

Muon (Keller Jordan et al. 2024, MIT licence) replaces the gradient's momentum M by the nearest matrix with orthonormal rows or columns, so that
all directions of a weight learn at one pace. After equal steps of short runs its loss is clearly lower than AdamW's (LOG.md).
"""
import contextlib, functools

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.distributed.tensor import DTensor

from common import use_bfloat16


def rows(x):
    """Of a tensor whose rows are cut over processes (shard.py), this one's rows; any other tensor as it is. They share memory."""
    return x.to_local() if isinstance(x, DTensor) else x


@functools.cache                                                     # by device
def precision(device) -> torch.dtype:
    """Of Newton-Schulz: bfloat16 where the device computes in it; where a CPU only imitates it, that takes 20 times as long as fp32 (LOG.md)."""
    return torch.bfloat16 if use_bfloat16("auto", device) else torch.float32


@torch.no_grad()
def orthogonalise(Ms):
    """Of each of a list of matrices about U V^T of its singular value decomposition, by five Newton-Schulz steps (Jordan's coefficients). Those of one
    shape go together: on a GPU a small network would wait for the launches of so many small products."""
    alike, out = {}, [None] * len(Ms)
    for i, M in enumerate(Ms):
        alike.setdefault((min(M.shape), max(M.shape)), []).append(i)
    for indices in alike.values():
        X = torch.stack([Ms[i] if Ms[i].shape[0] <= Ms[i].shape[1] else Ms[i].T for i in indices])   # (k, m, n), m the small side
        X = (X / (torch.linalg.vector_norm(X, dim=(1, 2), keepdim=True) + 1e-7)).to(precision(X.device))
        for _ in range(5):
            A = X @ X.mT                                             # (k, m, m)
            X = torch.baddbmm(X, torch.baddbmm(A, A, A, beta=-4.7750, alpha=2.0315), X, beta=3.4445)
        for i, x in zip(indices, X):
            out[i] = x if Ms[i].shape[0] <= Ms[i].shape[1] else x.T
    return out


def orthogonalise_all(grads):
    """orthogonalise() of each of a list of matrices. With several processes each does its share of them and sends it to the others."""
    world, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    order, out = sorted(range(len(grads)), key=lambda i: -grads[i].numel()), [None] * len(grads)
    mine = dict(zip(order[rank::world], orthogonalise([grads[i] for i in order[rank::world]])))
    for r in range(world):
        indices, sizes = order[r::world], [grads[i].numel() for i in order[r::world]]
        if world > 1:
            flat = torch.cat([mine[i].flatten() for i in indices]) if r == rank else torch.empty(sum(sizes), dtype=precision(grads[0].device), device=grads[0].device)
            dist.broadcast(flat.view(torch.uint8), r)       # as bytes: not every backend knows bfloat16
            mine |= {i: part.view_as(grads[i]) for i, part in zip(indices, flat.split(sizes))}
        for i in indices:
            out[i] = mine[i]
    return out


def orthogonalise_rows(parts, heights):
    """The same for matrices of heights[i] rows that are cut over the processes as FSDP2 cuts them, in chunks of ceil(height / world): parts[i] (m, n) are this
    process' rows. All rows of a matrix travel to the one process that does it, and the result's rows travel back, all matrices in one exchange each way."""
    world, rank = dist.get_world_size(), dist.get_rank()
    order = sorted(range(len(parts)), key=lambda i: -heights[i] * parts[i].shape[1])
    owned = [order[r::world] for r in range(world)]

    def count(i, r):                                                 # numbers of matrix i that lie on process r
        chunk = -(-heights[i] // world)
        return min(chunk, max(0, heights[i] - r * chunk)) * parts[i].shape[1]
    there = [sum(count(i, rank) for i in owned[r]) for r in range(world)]      # of my rows, those that r does
    here = [sum(count(i, r) for i in owned[rank]) for r in range(world)]       # of r's rows, those that I do
    sent = torch.cat([parts[i].flatten() for r in range(world) for i in owned[r]])
    received = sent.new_empty(sum(here))
    dist.all_to_all_single(received, sent, here, there)
    chunks = [dict(zip(owned[rank], c.split([count(i, r) for i in owned[rank]]))) for r, c in enumerate(received.split(here))]
    whole = orthogonalise([torch.cat([c[i] for c in chunks]).view(heights[i], -1) for i in owned[rank]])
    whole = {i: u.float().flatten() for i, u in zip(owned[rank], whole)}     # fp32: not every backend knows bfloat16
    pieces = {i: u.split([count(i, r) for r in range(world)]) for i, u in whole.items()}
    back = torch.cat([received[:0]] + [pieces[i][r] for r in range(world) for i in owned[rank]])
    dist.all_to_all_single(sent, back, there, here)
    out = dict(zip([i for r in range(world) for i in owned[r]], sent.split([count(i, rank) for r in range(world) for i in owned[r]])))
    return [out[i].view_as(p) for i, p in enumerate(parts)]


class Muon(torch.optim.Optimizer):
    """Matrices (pointwise and dense convolutions as (C_out, C_in*k*k), linears) by Muon with `muon_lr`; embeddings, depthwise kernels, norms and
    biases by AdamW with `lr`. muon_lr=0: AdamW for all. Decoupled weight decay on everything with two dimensions or more.
    Each group keeps its peak rate as group["peak"]: a schedule sets group["lr"] = group["peak"] * factor."""

    def __init__(self, module: nn.Module, lr: float, muon_lr: float = 0.0, weight_decay: float = 0.01, betas=(0.9, 0.99)):
        tables = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding)}
        groups = {"muon": [], "decay": [], "rest": []}
        for p in module.parameters():
            matrix = p.ndim > 1 and min(p.shape[0], p.numel() // p.shape[0]) >= 16 and id(p) not in tables
            groups["muon" if matrix and muon_lr else "decay" if p.ndim > 1 else "rest"].append(p)
        super().__init__([dict(params=ps, muon=name == "muon", lr=muon_lr if name == "muon" else lr, peak=muon_lr if name == "muon" else lr,
                               weight_decay=0.0 if name == "rest" else weight_decay) for name, ps in groups.items() if ps], dict(betas=betas))

    def schedule(self, factor: float):
        for group in self.param_groups:
            group["lr"] = group["peak"] * factor

    def states(self, group, params):
        """The moments of parameters, zeros at first; those of a sharded one are sharded as it is."""
        for p in params:
            if ("momentum" if group["muon"] else "step") not in self.state[p]:
                self.state[p].update({"momentum": torch.zeros_like(p)} if group["muon"] else {"step": torch.tensor(0.0), "m": torch.zeros_like(p), "v": torch.zeros_like(p)})
        return [self.state[p] for p in params]

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            lr, (b1, b2), states = group["lr"], group["betas"], self.states(group, params)
            values, grads = [rows(p) for p in params], [rows(p.grad) for p in params]
            torch._foreach_mul_(values, 1 - lr * group["weight_decay"])
            if group["muon"]:
                momenta = [rows(s["momentum"]) for s in states]
                torch._foreach_lerp_(momenta, grads, 0.05)
                ahead = [x.flatten(1) for x in torch._foreach_lerp(grads, momenta, 0.95)]     # Nesterov's look ahead
                heights = [p.shape[0] for p in params]
                directions = orthogonalise_rows(ahead, heights) if isinstance(params[0], DTensor) else orthogonalise_all(ahead)
                for v, g, u, height in zip(values, ahead, directions, heights):
                    v.add_(u.view_as(v), alpha=-lr * max(1, height / g.shape[1]) ** 0.5)
                continue
            ms, vs = [rows(s["m"]) for s in states], [rows(s["v"]) for s in states]
            for s in states:
                s["step"] += 1
            t = states[0]["step"].item()
            torch._foreach_lerp_(ms, grads, 1 - b1)
            torch._foreach_mul_(vs, b2)
            torch._foreach_addcmul_(vs, grads, grads, 1 - b2)
            root = torch._foreach_sqrt(vs)
            torch._foreach_div_(root, (1 - b2**t) ** 0.5)
            torch._foreach_add_(root, 1e-8)
            torch._foreach_addcdiv_(values, ms, root, -lr / (1 - b1**t))

    def tensors(self) -> dict:
        """{"3.momentum": tensor, ...}: the state as safetensors takes it."""
        return {f"{i}.{k}": v for i, s in self.state_dict()["state"].items() for k, v in s.items()}

    def allocate(self):
        """Moments for all parameters, for shard.load to fill."""
        for group in self.param_groups:
            self.states(group, group["params"])
        return self.tensors()

    def load_tensors(self, tensors: dict):
        state = {}
        for key, value in tensors.items():
            index, name = key.split(".")
            state.setdefault(int(index), {})[name] = value
        self.load_state_dict({"state": state, "param_groups": self.state_dict()["param_groups"]})


class EMA:
    """Exponential moving average of a module's parameters in fp32, sharded where they are. The decay warms up, so that short runs are averaged over their own length."""

    def __init__(self, module: torch.nn.Module, decay: float):
        self.decay, self.steps = decay, 0
        self.names = [n for n, _ in module.named_parameters()]
        self.source = [p for _, p in module.named_parameters()]
        self.shadow = [p.detach().float().clone() for p in self.source]

    @torch.no_grad()
    def update(self):
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        torch._foreach_lerp_([rows(s) for s in self.shadow], [rows(p.detach()).float() for p in self.source], 1 - decay)

    def state_dict(self) -> dict:
        return dict(zip(self.names, self.shadow))

    def load_state_dict(self, state: dict, steps: int):
        self.steps = steps
        for name, shadow in zip(self.names, self.shadow):
            shadow.copy_(state[name])

    @contextlib.contextmanager
    def swapped(self):
        """Inside, the module holds the averaged weights; afterwards its own again."""
        raw = [p.detach().clone() for p in self.source]
        with torch.no_grad():
            for p, s in zip(self.source, self.shadow):
                p.copy_(s)
            try:
                yield
            finally:
                for p, r in zip(self.source, raw):
                    p.copy_(r)
