"""Keys in, entries in the store out: batches through a frozen encoder, the next one decoded meanwhile.

Every batch is filled up to the full size: kernels are chosen by shape, and another batch size gives other last bits
(2e-6 in float32 on a CPU). At one shape an entry does not depend on its place or its neighbours, so that one edited
picture gives the bytes that encoding everything anew would give; the first batch of each shape proves it.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Hashable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

from tqdm import tqdm

from stages.artifacts.store import Kind, Store
from stages.core.console import UserError, log
from stages.core.device import autocast

if TYPE_CHECKING:
    import torch

    from stages.core.params import ModelParams

NUM_READERS = 4  # threads that decode pictures

# What torch says where there is no exception of its own: the CPU's allocator, and MPS.
SHORTAGES = ("can't allocate memory", "not enough memory", "out of memory")

K = TypeVar("K", bound=Hashable)
T = TypeVar("T")
Tensors = dict[str, "torch.Tensor"]


class OutOfMemory(Exception):
    """A batch does not fit into the memory of the device."""


@dataclass(frozen=True)
class Encoder(Generic[T]):
    """One kind's way from a key to tensors."""

    kind: Kind
    read: Callable[[str], T]
    """What the entry of a key is made from; called in several threads."""
    encode: Callable[[list[T]], Tensors]
    """Batched: name -> [B, ...]."""
    blank: Callable[[T], T]
    """Padding of the same shape."""
    model: ModelParams
    """Its dtype is the one to compute in."""
    device: torch.device
    batch_size: int


def encode_all(encoder: Encoder[T], groups: list[list[str]], store: Store, log_every_n_steps: int) -> None:
    """Encode and store one entry per key; the keys of a group share one shape.

    At most three batches are in memory: the one at the encoder, and two that are read.

    Raises:
        OutOfMemory: a batch does not fit.
        UserError: entries depend on their neighbours on this device, or one is not finite.
    """
    size = encoder.batch_size
    batches = [group[start : start + size] for group in groups for start in range(0, len(group), size)]
    first_of_shape = {group[0] for group in groups}
    total = sum(map(len, groups))
    with ThreadPoolExecutor(NUM_READERS) as pool, progress(encoder.kind, total, log_every_n_steps) as advance:
        for keys, values in read_ahead(pool, encoder.read, batches):
            padding = encoder.blank(values[0])
            entries = forward(encoder, values + [padding] * (size - len(values)))
            for tensors in entries:
                require_finite(encoder.kind, tensors, encoder.model)
            if keys[0] in first_of_shape and size > 1:
                alone = forward(encoder, [padding] * (size - 1) + values[:1])[-1]
                require_independent(entries[0], alone, size)
            for key, tensors in zip(keys, entries, strict=False):  # what is left over is padding
                store.save(encoder.kind, key, tensors)
            advance(len(keys))


class Recent(Generic[K, T]):
    """The last few results of a slow function. A thread that asks for one in the making waits for it."""

    def __init__(self, make: Callable[[K], T], size: int) -> None:
        self.make, self.size = make, size
        self.lock = threading.Lock()
        self.results: dict[K, Future[T]] = {}

    def __call__(self, key: K) -> T:
        with self.lock:
            result = self.results.get(key)
            is_new = result is None
            if result is None:
                result = self.results[key] = Future()
                if len(self.results) > self.size:
                    del self.results[next(iter(self.results))]
        if is_new:
            try:
                result.set_result(self.make(key))
            except Exception as error:
                result.set_exception(error)
        return result.result()


def read_ahead(
    pool: ThreadPoolExecutor, read: Callable[[str], T], batches: list[list[str]]
) -> Iterator[tuple[list[str], list[T]]]:
    """Each batch with its values; the next one is being read while the caller works on this one."""
    reading = [pool.submit(read, key) for key in batches[0]] if batches else []
    for index, keys in enumerate(batches):
        values = [future.result() for future in reading]
        reading = [pool.submit(read, key) for key in batches[index + 1]] if index + 1 < len(batches) else []
        yield keys, values


def forward(encoder: Encoder[T], values: list[T]) -> list[Tensors]:
    """The tensors of each value, without the batch dimension."""
    try:
        with autocast(encoder.device, encoder.model):
            encoded = encoder.encode(values)
    except RuntimeError as error:
        if not is_shortage(error):
            raise
        raise OutOfMemory from None
    encoded = {name: tensor.cpu() for name, tensor in encoded.items()}
    return [{name: tensor[index].clone() for name, tensor in encoded.items()} for index in range(len(values))]


def is_shortage(error: RuntimeError) -> bool:
    import torch

    return isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in SHORTAGES)


def require_independent(first: Tensors, alone: Tensors, size: int) -> None:
    import torch

    if any(not torch.equal(first[name], alone[name]) for name in first):
        raise UserError(
            f"params.yaml cache.batch_size: with {size} on this device, what an entry is depends on its neighbours,"
            " and a partly filled store would not give the same bytes; use 1"
        )


def require_finite(kind: Kind, tensors: Tensors, model: ModelParams) -> None:
    if not all(bool(tensor.isfinite().all()) for tensor in tensors.values()):
        cure = "fetch model.pretrained again" if model.dtype == "float32" else "use float32"
        raise UserError(f"params.yaml model.dtype: {model.dtype} gives {kind} that are not finite; {cure}")


@contextlib.contextmanager
def progress(kind: Kind, total: int, log_every_n_steps: int) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal; elsewhere a line every n batches. Yields what to call with the number done."""
    done, num_calls, start = 0, 0, time.monotonic()
    with tqdm(total=total, desc=kind, disable=None, leave=False) as bar:

        def advance(count: int) -> None:
            nonlocal done, num_calls
            done, num_calls = done + count, num_calls + 1
            bar.update(count)
            if bar.disable and num_calls % log_every_n_steps == 0:
                rate = done / (time.monotonic() - start)
                log.info("%-8s %7d / %d  %8.1f /s  %6.0f s left", kind, done, total, rate, (total - done) / rate)

        yield advance
