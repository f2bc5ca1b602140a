"""One network cut over several processes (FSDP2), and its checkpoints: `shard = true` in a config of train.py or distill.py that torchrun starts.

Every weight, gradient, average and optimiser moment lies on the processes by rows, an equal share on each. A layer's weights are gathered when it runs and
dropped behind it, its gradients are averaged and cut again. A checkpoint holds a file a process; it resumes on any number of them, 1 included,
and whatever reads a checkpoint reads it (checkpoint.py joins the rows).
"""
import contextlib
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn as nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

import mmdit, text
from checkpoint import check_file, check_fit, crc32, files_of, load_checkpoint, read_description, replacing, resolve, sync, write_config
from common import UserError, anywhere, is_disk_full
from model import Layer
from optim import rows

UNITS = (Layer, mmdit.Block, text.Block)        # gathered one at a time; what lies between them belongs to the whole


def shard(objective: nn.Module, device, bfloat16: bool, compiled: bool):
    """In place, before the optimiser and the average are made. The weights must be the same on all processes."""
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    # On CUDA the weights travel in bfloat16, as autocast would cast them anyhow; masters, gradients and their sums stay in fp32, and so do the inputs:
    # x0 and eps are what the loss is measured against. On a CPU norms want the weights in fp32.
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False) if bfloat16 and device.type == "cuda" else MixedPrecisionPolicy()
    for m in [m for m in objective.modules() if isinstance(m, UNITS)]:
        if compiled:
            m.compile()                         # layer by layer: the gathering stays outside of the graphs
        fully_shard(m, mesh=mesh, mp_policy=policy)
    fully_shard(objective, mesh=mesh, mp_policy=policy)
    if list(objective.buffers(recurse=False)):  # running means, such as distill.py's: the first process' count, as in DDP
        objective.register_forward_pre_hook(lambda m, _: [dist.broadcast(b, 0) for b in m.buffers(recurse=False)] and None)


def gathered(state: dict) -> dict:
    """By all processes: whole tensors on the first one's CPU, one after the other, so that a GPU never holds more than one; {} elsewhere."""
    out = {}
    for k, v in state.items():
        v = v.full_tensor() if isinstance(v, DTensor) else v
        if not dist.is_initialized() or dist.get_rank() == 0:
            out[k] = v.detach().cpu()
    return out


def whole(make, state: dict, device):
    """By all processes: on the first one a whole copy of the network that make() builds, frozen; None elsewhere."""
    if not (state := gathered(state)):
        return None
    with torch.device("meta"):
        net = make()
    net.load_state_dict(state, assign=True)
    return net.to(device).eval().requires_grad_(False)


# ---------------------------------------------------------------------------- checkpoints
def save_shards(path, tensors: dict[str, dict], config: dict):
    """By all processes, for {name: {key: tensor}}: save_checkpoint, all or nothing like it, but each name is a folder with a safetensors file a process."""
    path, rank, world = Path(path), dist.get_rank(), dist.get_world_size()
    with replacing(path) if rank == 0 else contextlib.nullcontext(path.with_name(path.name + ".tmp")) as tmp:
        dist.barrier()                          # it is there
        try:
            for name, state in tensors.items():
                dcp.save(state, storage_writer=dcp.HuggingFaceStorageWriter(str(tmp / name), save_distributed=True))
        except dcp.CheckpointException as e:    # the same on all; no Exception, so that it would pass by everything
            errors = [error for error, _ in e.failures.values()]
            raise next((x for x in errors if is_disk_full(x)), errors[0]) if rank == 0 else UserError(f"{path} was not written: {errors[0]}")
        own = [f for name in tensors for f in (tmp / name).glob(f"shard-{rank + 1:05d}-*.safetensors")]
        for f in own:
            sync(f)
        sums = [None] * world
        dist.all_gather_object(sums, {f.relative_to(tmp).as_posix(): crc32(f) for f in own})
        if rank == 0:
            for name in tensors:
                sync(tmp / name)
            write_config(tmp, config, {k: v for part in sums for k, v in part.items()})


def load_shards(path, tensors: dict[str, dict]) -> dict:
    """Fills the tensors of a sharded run in place, {name: {key: tensor}}, and returns the config. Of a sharded checkpoint each process reads its own rows,
    whoever wrote them; a whole one is read by all. An entry that the checkpoint lacks stays as it is."""
    path, rank, world, bad = resolve(path), dist.get_rank(), dist.get_world_size(), None
    config = read_description(path)
    try:                                        # the check sums: the files in turn
        for file in [f for name in tensors for f in files_of(path, config, name)][rank::world]:
            check_file(path, config, file)
    except UserError as e:
        bad = e
    if anywhere(bad is not None, world):
        raise bad or UserError(f"{path} is damaged (another process says where): use an older checkpoint of the run")
    for name, state in tensors.items():
        files = files_of(path, config, name)
        if not files:
            continue
        folder = files[0].parent
        theirs = load_checkpoint(path, (name,))[1][name] if folder == path else dcp.HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
        if name == "optimizer":                 # moments of parameters that have had no gradient yet were not saved: they stay zero
            state = {k: v for k, v in state.items() if k in theirs}
        check_fit({k: v.shape for k, v in state.items()}, {k: v.size if folder != path else v.shape for k, v in theirs.items()}, f"{path} ({name})")
        if folder != path:
            dcp.load(state, storage_reader=dcp.HuggingFaceStorageReader(str(folder)))
            continue
        with torch.no_grad():
            for k, v in state.items():
                cut = distribute_tensor(theirs[k].to(v.device), v.device_mesh, v.placements, src_data_rank=None) if isinstance(v, DTensor) else theirs[k]
                rows(v).copy_(rows(cut))
    return config
