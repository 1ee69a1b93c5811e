"""How much memory a call will take, found before anything is computed: the arrays that are alive along its graph.

MLX notes what is to be computed before it computes it. That graph is walked in the order in which it is computed: an
array comes to life where it is made, and its memory is free again once its last reader is done. What an operation needs
beside its output is told by the CPU's kernels, and else added by rule.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict, deque
from collections.abc import Callable
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from . import ops
from .cpu import planning

# Operations that take no memory: their output is another way to look at their input, in steps of its own for `STRIDED`
STRIDED = {"AsStrided", "Broadcast", "Slice", "Split", "Transpose"}
VIEWS = STRIDED | {"ExpandDims", "Flatten", "Reshape", "Squeeze", "StopGradient", "Unflatten"}
KERNEL = "Depends"  # of the CPU, see `planning`: its second output is what it takes beside the first
# Operations that need an array of their own; all others write to their input's place if nothing else reads it
NEW = {
    "AddMM",
    "Concatenate",
    "Convolution",
    "Gather",
    "Matmul",
    "QuantizedMatmul",
    "ScaledDotProductAttention",
    KERNEL,
}
# Python runs ahead of a GPU, and what it has asked for is held until that is done with it: ten command buffers, as
# large maps fill one each
AHEAD = 20
WIDTH = 20  # operations that MLX looks at side by side
COST = {"Convolution": 5, "Concatenate": 3}
INDICES = 2**31  # more than that an array's side cannot have in MLX


class Footprint(NamedTuple):
    """Bytes. weights: a module's; most: what a call takes beside them at its peak; least: the same if each operation
    waits for the one before, as they do when memory is short; output: of the call's results."""

    weights: int
    most: int
    least: int
    output: int


ENDLESS = 2**62


def footprint(module: nn.Module, call: Callable[..., Any], *inputs: mx.array) -> Footprint:
    """What `call(*inputs)` of a module takes; neither its weights nor the inputs are looked at, only their shapes.

    It is `ENDLESS` if an array would have more elements along a side than MLX can count. The module is of no use
    afterwards.
    """
    names, weights = zip(*tree_flatten(module.parameters()), strict=True)
    records: list[dict] = []

    def traced(*arrays: mx.array) -> list[mx.array]:
        module.update(tree_unflatten(list(zip(names, arrays, strict=False))))
        return [array for _, array in tree_flatten(call(*arrays[len(names) :])) if isinstance(array, mx.array)]

    weight_bytes = sum(weight.nbytes for weight in weights)
    empty = [mx.zeros(weight.shape, weight.dtype) for weight in weights]
    try:
        with ops.recording() if ops.on_gpu() else planning():
            mx.export_function(records.append, traced, *empty, *inputs)
    except (ValueError, OverflowError, TypeError):  # no shape that MLX can have
        return Footprint(weight_bytes, ENDLESS, ENDLESS, 0)
    made = [given for record in records if record["type"] == "primitive" for given in record["outputs"]]
    if any(side >= INDICES for _, shape, _ in made for side in shape):
        return Footprint(weight_bytes, ENDLESS, ENDLESS, 0)
    most, least = (_peak(records, len(weights), ahead) for ahead in (AHEAD if ops.on_gpu() else 0, 0))
    results = [given for record in records if record["type"] == "outputs" for given in record["outputs"]]
    return Footprint(weight_bytes, most, least, sum(map(_bytes, results)))


def _bytes(described: tuple) -> int:
    """Of an array as a record describes it: its name, shape and type."""
    _, shape, dtype = described
    return math.prod(shape) * dtype.size


def _peak(records: list[dict], n_weights: int, ahead: int) -> int:
    """The most bytes alive at once, beside weights and inputs; ahead: see `AHEAD`."""
    inputs = [given[0] for record in records if record["type"] == "inputs" for given in record["inputs"]]
    results = [given[0] for record in records if record["type"] == "outputs" for given in record["outputs"]]
    made = [record for record in records if record["type"] == "primitive"]
    if ops.on_gpu():
        made = _in_order(made, results)
    last, kept = _last_uses(made, inputs[n_weights:])
    size: dict[str, int] = {}  # of each block of memory
    block = {name: name for name in inputs}  # where each array lies
    needed = defaultdict(set)  # the arrays that lie in a block and will be read
    strided: set[str] = set()
    being_read: set[str] = set()  # blocks
    freed: deque[tuple[int, int]] = deque()  # when, and how many bytes
    alive = most = now = 0
    for place, op in enumerate(made):
        given, kind, done = [name for name, *_ in op["inputs"] if name in block], op["name"], 0
        outputs = op["outputs"][:1] if kind == KERNEL else op["outputs"]
        copied = kind == "Reshape" and not strided.isdisjoint(given)
        if not given or (kind in VIEWS and not copied):  # without an input it is a constant, of hardly any size
            now += 1
            for name, *_ in outputs:
                block[name] = block[given[0]] if given else name
                needed[block[name]].add(name)
                if kind in STRIDED or not strided.isdisjoint(given):
                    strided.add(name)
        else:
            now += COST.get(kind, 2)
            for output in outputs:
                name, own = output[0], _bytes(output)
                taken = None
                for other in () if kind in NEW or copied else set(given):
                    free = last[other] == place and needed[block[other]] == {other} and given.count(other) == 1
                    if free and size.get(block[other]) == own and block[other] not in being_read:
                        taken = block[other]
                block[name] = name if taken is None else taken
                if taken is None:
                    size[name] = own
                    alive += own
                needed[block[name]].add(name)
            if ahead:
                being_read.update({block[name] for name in given} - {block[name] for name, *_ in outputs})
            if not ops.on_gpu():
                done = _beside(op)
                alive += done
        while freed and freed[0][0] < now - ahead:
            alive -= freed.popleft()[1]
        most = max(most, alive)
        for name in {*given, *(name for name, *_ in outputs)}:
            if last[name] == place and name not in results and name not in kept:
                needed[block[name]].discard(name)
                if not needed[block[name]]:
                    done += size.pop(block[name], 0)
        freed.append((now, done))
        while not ahead and freed:
            alive -= freed.popleft()[1]
    return most


def _in_order(made: list[dict], results: list[str]) -> list[dict]:
    """Operations in the order in which MLX runs them: found from the results backwards, breadth first, but depth first
    where more than `WIDTH` are waiting (eval_impl in MLX's transforms.cpp)."""
    maker = {output[0]: op for op, record in enumerate(made) for output in record["outputs"]}
    needs = {op: [maker[name] for name, *_ in record["inputs"] if name in maker] for op, record in enumerate(made)}
    needs[None] = [maker[name] for name in results if name in maker]
    readers = Counter(op for inputs in needs.values() for op in inputs)
    order, deeper, place = [None], [], 0
    while place < len(order) or deeper:
        if place < len(order):
            op, start, place = order[place], 0, place + 1
        else:
            op, start = deeper.pop()
        for number, before in enumerate(needs[op][start:], start):
            if len(order) - place >= WIDTH:
                deeper.append((op, number))
                break
            readers[before] -= 1
            if not readers[before]:
                order.append(before)
    return [made[op] for op in reversed(order[1:])]


def _last_uses(made: list[dict], inputs: list[str]) -> tuple[dict[str, int], set[str]]:
    """Where each array is read last, and which are made of weights alone and, on a GPU, stay for the next call."""
    last, kept, varies = {}, set(), set(inputs)
    for place, op in enumerate(made):
        given, outputs = ([name for name, *_ in op[side]] for side in ("inputs", "outputs"))
        if not varies.isdisjoint(given):
            varies.update(outputs)
            kept.update(name for name in given if name not in varies and ops.on_gpu())
        last.update(dict.fromkeys((*given, *outputs), place))
    return last, kept


def _beside(op: dict) -> int:
    """Bytes that an operation takes on the CPU beside its output: for a kernel what it says, for a convolution its
    input, padded, and all that its filters see of it."""
    if op["name"] == KERNEL:
        return _bytes(op["outputs"][1])
    if op["name"] != "Convolution":
        return 0
    (_, shape, dtype), (_, filters, _), (_, (*positions, _), _) = *op["inputs"][:2], op["outputs"][0]
    padded = math.prod(shape) if math.prod(filters[1:-1]) > 1 else 0
    return (math.prod(positions) * math.prod(filters[1:]) + padded) * dtype.size
