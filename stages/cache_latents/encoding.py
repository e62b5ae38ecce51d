"""Batches through a frozen encoder: keys in, entries of the store out. The next batch is decoded meanwhile.

Every batch is padded to the full size: kernels are chosen by shape, and another batch size gives other last bits
(2e-6 in float32 on a CPU). At one shape, an entry does not depend on its position or its neighbors in the batch. So an
edited image that is encoded alone gives the same bytes as encoding everything again, at the cost of one batch.
The first batch of each shape verifies this with a second pass through the encoder; the result is remembered.
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
from lora_dag.core.console import Problem, UserError
from lora_dag.core.device import autocast
from lora_dag.core.files import from_json, sha256_json, write_json
from lora_dag.core.progress import Bar

if TYPE_CHECKING:
    import torch

    from lora_dag.core.params import ModelParams

NUM_READERS = 4  # threads that decode images

# Messages of torch's plain RuntimeErrors: the CPU's allocator, and MPS.
OUT_OF_MEMORY_TEXTS = ("can't allocate memory", "not enough memory", "out of memory")

K = TypeVar("K", bound=Hashable)
T = TypeVar("T")
Tensors = dict[str, "torch.Tensor"]
Shape = tuple[int, ...]


class OutOfMemory(Exception):
    """A batch does not fit into the memory of the device."""


@dataclass(frozen=True)
class Encoder(Generic[T]):
    """Functions that lead from a key to tensors, for one kind of entries."""

    kind: Kind
    read: Callable[[str], T]
    """Key -> the encoder's input, such as an image; called in several threads."""
    encode: Callable[[list[T]], Tensors]
    """Batched: name -> [B, ...]."""
    blank: Callable[[T], T]
    """An input -> padding of the same shape."""
    shape: Callable[[str], Shape]
    """Key -> shape; keys of one shape can share a batch. A larger product needs more memory."""
    model: ModelParams
    """Section ``model``; its dtype is the encoder's."""
    device: torch.device
    batch_size: int


def encode_all(
    encoder: Encoder[T], keys: list[str], save: Callable[[str, Tensors], None], verified_shapes: VerifiedBatchShapes
) -> None:
    """Encode and save one entry per key, in the order of the keys as far as shapes allow.

    Memory holds the current batch twice (in parts and stacked), the next batch, and the cache of ``encoder.read``: the
    last NUM_READERS decoded images and those being decoded, at 3 bytes per pixel.

    Raises:
        OutOfMemory: a batch does not fit.
        UserError: entries depend on their neighbors on this device, or an entry is not finite.
    """
    size = encoder.batch_size
    batches = make_batches(keys, encoder.shape, size)
    with ThreadPoolExecutor(NUM_READERS) as pool, Bar(encoder.kind, len(keys)) as bar:
        for batch, values in read_ahead(pool, encoder.read, batches):
            padding = encoder.blank(values[0])
            entries = encode_batch(encoder, values + [padding] * (size - len(values)))
            for tensors in entries:
                require_finite(encoder.kind, tensors, encoder.model)
            if size > 1 and encoder.shape(batch[0]) not in verified_shapes:
                alone = encode_batch(encoder, [padding] * (size - 1) + values[:1])[-1]
                require_independent(entries[0], alone, encoder)
                verified_shapes.add(encoder.shape(batch[0]))
            for key, tensors in zip(batch, entries, strict=False):  # entries beyond the batch are padding
                save(key, tensors)
            bar.add(len(batch))


def make_batches(keys: list[str], shape: Callable[[str], Shape], size: int) -> list[list[str]]:
    """Return batches of one shape each, in the order in which they fill up, so that files are read nearly in order.

    A batch of the largest shape comes first: one that does not fit into memory fails before anything else is done.
    """
    waiting: dict[Shape, list[str]] = defaultdict(list)
    batches = []
    for key in keys:
        batch = waiting[shape(key)]
        batch.append(key)
        if len(batch) == size:
            batches.append(waiting.pop(shape(key)))
    batches += waiting.values()
    largest = max(range(len(batches)), key=lambda index: math.prod(shape(batches[index][0])), default=None)
    return batches if largest is None else [batches.pop(largest), *batches]


class VerifiedBatchShapes:
    """<state>/store/proven.json: shapes of batches whose entries do not depend on their neighbors.

    The file affects no result, only whether a shape is verified again.

    Args:
        conditions: facts other than the shape that can matter: kind, setting, versions, device, threads.
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
        """Return the digests of verified shapes; empty for a missing or damaged file: shapes are verified again."""
        try:
            return set(from_json(self.path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return set()


class FutureCache(Generic[K, T]):
    """Cache of a slow function's last results. A thread that needs a result in progress waits for it."""

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
    """Yield each batch with its inputs, and read the next batch while the caller works on this one."""
    reading = [pool.submit(read, key) for key in batches[0]] if batches else []
    for index, keys in enumerate(batches):
        values = [future.result() for future in reading]
        reading = [pool.submit(read, key) for key in batches[index + 1]] if index + 1 < len(batches) else []
        yield keys, values


def encode_batch(encoder: Encoder[T], values: list[T]) -> list[Tensors]:
    """Return the tensors of each input, without the batch dimension.

    Raises:
        OutOfMemory: the batch does not fit.
    """
    import torch

    try:
        with torch.inference_mode(), autocast(encoder.device, encoder.model):
            encoded = encoder.encode(values)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory from None
    encoded = {name: tensor.cpu() for name, tensor in encoded.items()}
    return [{name: tensor[index].clone() for name, tensor in encoded.items()} for index in range(len(values))]


def is_out_of_memory(error: RuntimeError) -> bool:
    import torch

    return isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in OUT_OF_MEMORY_TEXTS)


def require_independent(first: Tensors, alone: Tensors, encoder: Encoder[T]) -> None:
    import torch

    if any(not torch.equal(first[name], alone[name]) for name in first):
        raise UserError(
            Problem(
                "batch-dependent",
                f"{encoder.model.setting('cache.batch_size')}: got {encoder.batch_size}, but on this device an entry "
                "then depends on the other entries of its batch, so results would not be reproducible. "
                "Set cache.batch_size: 1.",
            )
        )


def require_finite(kind: Kind, tensors: Tensors, model: ModelParams) -> None:
    if not all(bool(tensor.isfinite().all()) for tensor in tensors.values()):
        fix = "Fetch model.pretrained again." if model.dtype == "float32" else "Set model.dtype: float32."
        raise UserError(
            Problem(
                "encoding-not-finite",
                f"{model.setting('dtype')}: {model.dtype} gives {kind} that are not finite. {fix}",
            )
        )
