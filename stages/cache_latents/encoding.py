"""Keys in, entries in the store out: batches through a frozen encoder, the next one decoded meanwhile.

Every batch is filled up to the full size: kernels are chosen by shape, and another batch size gives other last bits
(2e-6 in float32 on a CPU). At one shape an entry does not depend on its place or its neighbours, so that one edited
picture gives the bytes that encoding everything anew would give. The first batch of each shape proves it, with a second
pass through the encoder; where that has been seen before, it is not done again. So one edited picture costs one batch.
"""

from __future__ import annotations

import math
import threading
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from lora_dag.artifacts.store import Kind
from lora_dag.core.console import UserError
from lora_dag.core.device import autocast
from lora_dag.core.files import from_json, sha256_json, write_json
from lora_dag.core.progress import Bar

if TYPE_CHECKING:
    import torch

    from lora_dag.core.params import ModelParams

NUM_READERS = 4  # threads that decode pictures

# What torch says where there is no exception of its own: the CPU's allocator, and MPS.
SHORTAGES = ("can't allocate memory", "not enough memory", "out of memory")

K = TypeVar("K", bound=Hashable)
T = TypeVar("T")
Tensors = dict[str, "torch.Tensor"]
Shape = tuple[int, ...]


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
    shape: Callable[[str], Shape]
    """Keys of one shape can share a batch; a larger product needs more memory."""
    model: ModelParams
    """Its dtype is the one to compute in."""
    device: torch.device
    batch_size: int


def encode_all(encoder: Encoder[T], keys: list[str], save: Callable[[str, Tensors], None], proofs: Proofs) -> None:
    """Encode and save one entry per key, read in their order as far as shapes allow.

    In memory are the batch at the encoder, once in parts and once stacked, the next batch, and what ``encoder.read``
    keeps: of pictures, the last NUM_READERS decoded in full and those being decoded, at 3 bytes per pixel.

    Raises:
        OutOfMemory: a batch does not fit.
        UserError: entries depend on their neighbours on this device, or one is not finite.
    """
    size = encoder.batch_size
    batches = batched(keys, encoder.shape, size)
    with ThreadPoolExecutor(NUM_READERS) as pool, Bar(encoder.kind, len(keys)) as bar:
        for batch, values in read_ahead(pool, encoder.read, batches):
            padding = encoder.blank(values[0])
            entries = forward(encoder, values + [padding] * (size - len(values)))
            for tensors in entries:
                require_finite(encoder.kind, tensors, encoder.model)
            if size > 1 and encoder.shape(batch[0]) not in proofs:
                alone = forward(encoder, [padding] * (size - 1) + values[:1])[-1]
                require_independent(entries[0], alone, size)
                proofs.add(encoder.shape(batch[0]))
            for key, tensors in zip(batch, entries, strict=False):  # what is left over is padding
                save(key, tensors)
            bar.add(len(batch))


def batched(keys: list[str], shape: Callable[[str], Shape], size: int) -> list[list[str]]:
    """Batches of one shape each, in the order in which they fill up, so that files are read nearly in order.

    A batch of the largest shape goes first: what does not fit into memory fails before anything else is done.
    """
    waiting: dict[Shape, list[str]] = defaultdict(list)
    found = []
    for key in keys:
        batch = waiting[shape(key)]
        batch.append(key)
        if len(batch) == size:
            found.append(waiting.pop(shape(key)))
    found += waiting.values()
    largest = max(range(len(found)), key=lambda index: math.prod(shape(found[index][0])), default=None)
    return found if largest is None else [found.pop(largest), *found]


class Proofs:
    """<state>/store/proven.json: where entries were seen not to depend on their neighbours. It decides no result.

    Args:
        conditions: all that a proof can depend on beside the shape: kind, setting, versions, device, threads.
    """

    def __init__(self, path: Path, conditions: Any) -> None:
        self.path, self.conditions = path, conditions
        self.known = self._load()

    def __contains__(self, shape: Shape) -> bool:
        return self._name(shape) in self.known

    def add(self, shape: Shape) -> None:
        self.known = self._load() | {self._name(shape)}
        write_json(self.path, sorted(self.known))

    def _name(self, shape: Shape) -> str:
        return sha256_json([self.conditions, shape])

    def _load(self) -> set[str]:
        """Empty where there is none, or it is damaged: the proof is made again."""
        try:
            return set(from_json(self.path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return set()


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
    import torch

    try:
        with torch.inference_mode(), autocast(encoder.device, encoder.model):
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
