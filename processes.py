"""Work in other processes, as they are started on every system: forked or spawned."""
import contextlib
import math
import multiprocessing
import os
import tempfile
import threading
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from common import at_most_cores

BATCH = 64                      # scenes that a process draws or words at a time

@lru_cache(2)
def mapped_ring(path: str, shape: tuple, dtype: str) -> np.memmap:
    """A file as an array (slots, BATCH, ..) that processes share; each opens it once."""
    return np.memmap(path, dtype, "r+", shape=shape)

def slot_of(ring: np.ndarray, some: range) -> np.ndarray:
    """Where the rows of a batch are in a ring."""
    return ring[some.start // BATCH % len(ring), :len(some)]

def fill_slot(write, ring: tuple, some: range) -> range:
    write(some, slot_of(mapped_ring(*ring), some))
    return some

def in_processes(write, shape, dtype: str, todo: range, workers: int, folder, title: str = ""):
    """Yields the rows that write(scenes, rows) fills for `todo`, in order, BATCH scenes at a time.
    They are in one array that all processes share, and are overwritten when the next are asked for:
    a file in `folder`, since Docker's /dev/shm has room for no pictures.
    todo starts at a multiple of BATCH; shape, dtype: of a row; title: of a progress bar."""
    batches = [todo[k:k + BATCH] for k in range(0, len(todo), BATCH)]
    workers = min(at_most_cores(workers), len(batches) // 8)    # to start one takes up to seconds
    Path(folder).mkdir(parents=True, exist_ok=True)
    file, path = tempfile.mkstemp(prefix="ring", dir=folder)
    # a DataLoader has two batches a worker under way beside the one that is read
    ring = path, (2 * workers + 1, BATCH, *shape), dtype
    os.truncate(file, math.prod(ring[1]) * np.dtype(dtype).itemsize)
    os.close(file)
    rows = mapped_ring(*ring)
    loader = torch.utils.data.DataLoader(
        batches, None, collate_fn=partial(fill_slot, write, ring), num_workers=workers,
        generator=torch.Generator())                    # or it would draw from the global one
    try:
        with tqdm(total=todo.stop, initial=todo.start, desc=title, unit="scene", delay=1,
                  disable=not title) as bar:
            for n, some in enumerate(loader, 1):
                if n == max(1, workers):                # each worker has opened it: a killed
                    with contextlib.suppress(OSError):  # process leaves nothing (not on Windows)
                        os.unlink(path)
                yield torch.from_numpy(slot_of(rows, some))
                bar.update(len(some))
    finally:
        with contextlib.suppress(OSError):
            os.unlink(path)

def alone(function, *arguments):
    """function(..) in a process that ends with its parent, quietly: see meanwhile()."""
    def end_with_parent():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
    with contextlib.suppress(BaseException):
        function(*arguments)

@contextlib.contextmanager
def meanwhile(function, *arguments):
    """Inside, another process calls function(*arguments), for the files that it makes. They are
    there afterwards, or the caller who then makes them here meets the same error."""
    process = multiprocessing.get_context("spawn").Process(
        target=alone, args=(function, *arguments))
    process.start()
    try:
        yield
        process.join()
    finally:
        process.terminate()
