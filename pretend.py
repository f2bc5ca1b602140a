"""A GPU that is none, for test_all.py: its tensors lie in this machine's memory and compute as the CPU does, but say that they are on cuda:0, and refuse to meet those of the CPU
as a GPU's would. So what would stop on a GPU is found where there is none. Of kernels, memory and speed it tells nothing.

    with pretend.cuda():
        train.train(cfg)                # device = "cuda", or auto
"""
import contextlib
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

GPU = torch.device("cuda:0")
MEET = {"to", "copy_", "__set__", "_has_compatible_shallow_copy_type"}     # may see tensors of both
Generator, of_gpu = torch.Generator, {}                                    # generators made for the GPU, by address: kept, so that no address comes twice


class Pretended(torch.Tensor):
    """Its own functions, and those of the mode below, go through called()."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return called(func, args, dict(kwargs or {}))

    def __deepcopy__(self, memo):
        out = torch.Tensor._make_subclass(Pretended, self.detach().clone(), self.requires_grad)
        out._is_param = isinstance(self, torch.nn.Parameter)
        return memo.setdefault(id(self), out)


class Mode(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return called(func, args, dict(kwargs or {}))


def pretended(x):
    if type(x) not in (torch.Tensor, torch.nn.Parameter):
        return x
    return torch.Tensor._make_subclass(Pretended, x, True) if x.is_leaf and x.requires_grad else x.as_subclass(Pretended)     # a leaf stays one


def on_cpu(x):
    return torch.device("cpu") if isinstance(x, (str, torch.device)) and str(x).startswith("cuda") else x


def tensors_in(x):
    if isinstance(x, torch.Tensor):
        yield x
    elif isinstance(x, (list, tuple)):
        for y in x:
            yield from tensors_in(y)


def called(func, args, kwargs):
    """Any function of torch: asks on which devices its tensors are, computes on the CPU, and says where the result is."""
    name, tensors = getattr(func, "__name__", ""), [*tensors_in(args), *tensors_in([*kwargs.values()])]
    ours = [isinstance(x, Pretended) for x in tensors]
    if any(ours) and name == "__get__" and func.__self__.__name__ in ("device", "is_cuda"):
        return {"device": GPU, "is_cuda": True}[func.__self__.__name__]
    if any(ours) and name in ("numpy", "__array__"):
        raise TypeError("can't convert cuda:0 device type tensor to numpy")
    if name in ("__getitem__", "__setitem__"):
        wrong = any(ours) and not ours[0]                       # a GPU's tensor takes indices of the CPU, not the other way round
    else:
        wrong = any(ours) and name not in MEET and any(x.ndim and x.device.type == "cpu" for x, own in zip(tensors, ours) if not own)
    if wrong:
        raise RuntimeError(f"{name}: tensors on cuda:0 and on cpu: " + ", ".join(f"{'cuda' if own else 'cpu'} {tuple(x.shape)}" for x, own in zip(tensors, ours)))

    asked = "cpu" if name == "cpu" else next((x for x in args[1:] if isinstance(x, (str, torch.device))), kwargs.get("device")) if name == "to" else kwargs.get("device")
    gpu = str(asked).startswith("cuda") if asked is not None else ours[0] if ours and name in MEET else any(ours)
    drawn = next((x for x in (*args, *kwargs.values()) if isinstance(x, Generator)), None)
    if drawn is not None and gpu != (drawn._cdata in of_gpu):
        raise RuntimeError(f"{name}: a generator of the {'CPU' if gpu else 'GPU'} draws for the other")
    args, kwargs = [on_cpu(x) for x in args] if name == "to" else args, {k: on_cpu(x) for k, x in kwargs.items()}
    with torch._C.DisableTorchFunctionSubclass():
        out = func(*args, **kwargs)
    where = pretended if gpu else lambda x: x.as_subclass(torch.Tensor) if type(x) is Pretended else x
    return tree_map(where, out) if isinstance(out, (list, tuple)) else where(out)


def generator(device="cpu"):
    g = Generator()
    if str(device).startswith("cuda"):
        of_gpu[g._cdata] = g
    return g


@contextlib.contextmanager
def cuda():
    autocast, before = torch.autocast, torch.__future__.get_overwrite_module_params_on_conversion()
    there = {"is_available": lambda: True, "get_device_name": lambda *_: "none", "memory_allocated": lambda *_: 0, "max_memory_allocated": lambda *_: 0,
             **{name: lambda *_, name=name: None for name in ("set_device", "synchronize", "reset_peak_memory_stats", "empty_cache")}}
    with contextlib.ExitStack() as stack:
        for name, f in there.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, f))
        stack.enter_context(mock.patch.object(torch, "Generator", generator))
        stack.enter_context(mock.patch.object(torch, "autocast", lambda kind, *a, **kw: autocast("cpu", *a, **kw)))
        stack.callback(torch.__future__.set_overwrite_module_params_on_conversion, before)
        torch.__future__.set_overwrite_module_params_on_conversion(True)    # net.to(..) sets new parameters, or they would stay the CPU's
        stack.enter_context(Mode())
        yield
