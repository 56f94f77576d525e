"""Compile the regions of a partitioned graph, each structure once.

Given::

    region_0 = self.region_0(x, w, s0)      # region_0: GraphModule
    ...

Result: the same graph, whose ``region_i`` submodules are compiled callables. Regions that are
equal share one: parameters are arguments, so equal layers differ in what they are called with.

Requires: a graph made by ``partition``; the example inputs that Dynamo gave the backend, and its
tracing context.

Ensures: two regions share code only where the compiler would have been asked the same question:
same operations, arguments and Python scalars; inputs of the same dtype, device, symbolic sizes,
strides and offset, ``requires_grad`` and aliasing. Symbols are compared as expressions, which only
means something within one ShapeEnv, and the global state (grad mode, autocast) is that of the
call: nothing is shared between calls.
"""

from __future__ import annotations

import copy
import hashlib
import logging
import re
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo.utils import to_fake_tensor
from torch._guards import TracingContext, detect_fake_mode, tracing
from torch._inductor import config as inductor_config
from torch._inductor.compile_fx import compile_fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import GraphModule, Interpreter, Node
from torch.fx.experimental.symbolic_shapes import PropagateUnbackedSymInts
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from headinfer_compile.errors import OptionError

log = logging.getLogger(__name__)

#: Options of Inductor that regions cannot have, and why.
_FIXED = {
    "triton.cudagraphs": (False, "a replay would copy all weights and overwrite live outputs"),
    "freezing": (False, "equal layers share one region, so weights cannot be constants of it"),
}


@dataclass(frozen=True)
class RegionInfo:
    """One region of a lowered graph."""

    name: str
    key: str
    """Digest of the structure; equal within one report means shared code."""
    shared_with: str
    """The first region of this structure; its own name if it is that one."""
    num_nodes: int
    seconds: float
    """Compile time; 0 if shared."""


@dataclass(frozen=True)
class RegionReport:
    """What ``lower_regions`` did."""

    regions: tuple[RegionInfo, ...]
    seconds: float

    @property
    def num_regions(self) -> int:
        return len(self.regions)

    @property
    def num_unique(self) -> int:
        return len({region.shared_with for region in self.regions})


def lower_regions(
    split: GraphModule,
    example_inputs: Sequence[Any],
    *,
    lowering: Literal["inductor", "eager"],
    inductor: Mapping[str, Any],
) -> RegionReport:
    """Replace the regions of ``split``, in place, by compiled callables.

    Args:
        split: A graph made by ``partition``.
        example_inputs: Its arguments: real or fake tensors, SymInts, Python numbers.
        lowering: ``"eager"`` leaves the regions as they are and only reports.
        inductor: Inductor config patches.

    Returns:
        Which regions share code, and the time it took.

    Raises:
        OptionError: ``inductor`` has an unknown key, or sets what regions cannot have.
    """
    start = time.perf_counter()
    patches = _patches(inductor)
    fake_mode = detect_fake_mode(example_inputs) or FakeTensorMode()
    infos: list[RegionInfo] = []
    compiled: dict[Hashable, tuple[str, torch.nn.Module]] = {}
    replaced: dict[str, torch.nn.Module] = {}

    def visit(name: str, region: GraphModule, inputs: Sequence[Any]) -> None:
        began = time.perf_counter()
        key = region_key(region, inputs)
        if key not in compiled:
            module: torch.nn.Module = region
            if lowering == "inductor":
                module = _CompiledRegion(region, _compile(region, inputs, fake_mode, patches))
            compiled[key] = (name, module)
        first, replaced[name] = compiled[key]
        seconds = time.perf_counter() - began if first == name else 0.0
        text = re.sub(r" at 0x[0-9a-f]+", "", repr(key))  # equal in every process
        digest = hashlib.sha256(text.encode()).hexdigest()[:12]
        infos.append(RegionInfo(name, digest, first, _num_nodes(region), seconds))
        log.debug("lower: %s (%d nodes) -> %s, %.2f s", name, _num_nodes(region), first, seconds)

    with torch.set_grad_enabled(torch.is_grad_enabled()):  # the graph may end in another state
        _Propagate(split, fake_mode, visit).run(*example_inputs)
    for name, module in replaced.items():
        setattr(split, name, module)
    report = RegionReport(tuple(infos), time.perf_counter() - start)
    counts = report.num_regions, report.num_unique
    log.info("lower: %d regions, %d unique, %.1f s", *counts, report.seconds)
    return report


def region_key(region: GraphModule, inputs: Sequence[Any]) -> Hashable:
    """Return what the code of ``region`` depends on when called with (fakes of) ``inputs``."""
    storages: dict[int, int] = {}
    tensors: dict[int, int] = {}
    values = tuple(_freeze_value(value, storages, tensors) for value in inputs)
    return _freeze_graph(region), values


class _CompiledRegion(torch.nn.Module):
    """A module only because ``call_module`` wants one; ``forward`` is the callable itself."""

    _is_impure: bool
    """FX keeps the call although nothing uses its result."""

    def __init__(self, region: GraphModule, compiled: Callable[..., Any]) -> None:
        super().__init__()
        self._is_impure = bool(region._is_impure)
        self.forward = compiled


class _Propagate(Interpreter):
    """Run a split graph on fakes, showing each region to ``visit`` before it runs."""

    def __init__(
        self,
        split: GraphModule,
        fake_mode: FakeTensorMode,
        visit: Callable[[str, GraphModule, Sequence[Any]], None],
    ) -> None:
        super().__init__(split)
        self._fake_mode = fake_mode
        self._visit = visit

    def run_node(self, n: Node) -> Any:
        if n.op == "call_module":
            args, _ = self.fetch_args_kwargs_from_env(n)
            # Outside the fake mode: the compiler makes real tensors.
            self._visit(str(n.target), self.fetch_attr(str(n.target)), args)
        with self._fake_mode, enable_python_dispatcher():
            return super().run_node(n)

    def placeholder(self, target: Any, args: Any, kwargs: Any) -> Any:
        return self._fake(super().placeholder(target, args, kwargs))

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        return self._fake(super().get_attr(target, args, kwargs))

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        return PropagateUnbackedSymInts(self.fetch_attr(target)).run(*args)

    def _fake(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor) and not isinstance(value, FakeTensor):
            # Finds the symbols that Dynamo gave the sizes, which a bare from_tensor would not.
            return to_fake_tensor(value, self._fake_mode)
        return value


def _compile(
    region: GraphModule,
    inputs: Sequence[Any],
    fake_mode: FakeTensorMode,
    patches: dict[str, Any],
) -> Callable[..., Any]:
    owned = GraphModule(region, copy.deepcopy(region.graph))  # the compiler changes what it gets
    # A context of its own: the outer one describes the parameters and outputs of the whole graph.
    with tracing(TracingContext(fake_mode)):
        compiled = compile_fx(owned, list(inputs), config_patches=patches)
    assert callable(compiled)
    return compiled


def _patches(inductor: Mapping[str, Any]) -> dict[str, Any]:
    known = inductor_config.get_config_copy()
    for key, value in inductor.items():
        if key not in known:
            raise OptionError(f"inductor: torch {torch.__version__} has no option {key!r}")
        if key in _FIXED and value != _FIXED[key][0]:
            raise OptionError(f"inductor: {key}={value!r} is not possible: {_FIXED[key][1]}")
    return {**inductor, **{key: value for key, (value, _) in _FIXED.items()}}


def _num_nodes(region: GraphModule) -> int:
    return sum(node.op not in ("placeholder", "output") for node in region.graph.nodes)


def _freeze_graph(gm: GraphModule) -> Hashable:
    position = {node: i for i, node in enumerate(gm.graph.nodes)}

    def target(node: Node) -> Hashable:
        if node.op == "placeholder":
            return None
        if node.op in ("get_attr", "call_module"):
            module = gm.get_submodule(str(node.target))
            return _freeze_graph(module) if isinstance(module, GraphModule) else id(module)
        return node.target

    return tuple(
        (node.op, target(node), _freeze(node.args, position), _freeze(node.kwargs, position))
        for node in gm.graph.nodes
    )


def _freeze(arg: Any, position: Mapping[Node, int]) -> Hashable:
    """``arg`` as a hashable that is equal only for equal code: 1, 1.0 and True all differ."""
    if isinstance(arg, Node):
        return Node, position[arg]
    if isinstance(arg, (tuple, list)):
        return type(arg), tuple(_freeze(item, position) for item in arg)
    if isinstance(arg, Mapping):
        return type(arg), tuple((key, _freeze(arg[key], position)) for key in sorted(arg, key=str))
    if isinstance(arg, slice):
        return slice, tuple(_freeze(item, position) for item in (arg.start, arg.stop, arg.step))
    if isinstance(arg, float):
        return float, repr(arg)  # tells -0.0 from 0.0, and NaN equals itself
    return type(arg), arg if isinstance(arg, Hashable) else id(arg)


def _freeze_value(value: Any, storages: dict[int, int], tensors: dict[int, int]) -> Hashable:
    """The properties of a region's input; equal numbers mean the same storage or tensor."""
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return type(value), value.node.expr
    if not isinstance(value, torch.Tensor):
        return _freeze(value, {})
    identity = tensors.setdefault(id(value), len(tensors))
    common = (type(value), value.dtype, value.device, value.requires_grad, identity)
    sizes = tuple(_freeze_value(size, storages, tensors) for size in value.size())
    if is_traceable_wrapper_subclass(value):
        names, context = value.__tensor_flatten__()
        inner = tuple(_freeze_value(getattr(value, n), storages, tensors) for n in names)
        return *common, sizes, _freeze(context, {}), inner
    if value.layout is not torch.strided:
        return *common, sizes, value.layout
    storage = storages.setdefault(value.untyped_storage()._cdata, len(storages))
    strides = tuple(_freeze_value(stride, storages, tensors) for stride in value.stride())
    offset = _freeze_value(value.storage_offset(), storages, tensors)
    flags = (value.is_conj(), value.is_neg(), value.is_inference())
    return *common, sizes, strides, offset, storage, flags
