"""The Dynamo backend: ``torch.compile(model, backend="headinfer")``."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch._inductor.compile_fx import compile_fx
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from headinfer_compile.activations import activation_model
from headinfer_compile.auto_settings import AutoSettings, known_machine
from headinfer_compile.cache_protocol import CACHE_ARGUMENTS
from headinfer_compile.config import HeadInferConfig
from headinfer_compile.errors import HeadInferError, OptionError
from headinfer_compile.executor import CompiledGraph, GraphReport
from headinfer_compile.graph_facts import graph_facts
from headinfer_compile.machine import Machine
from headinfer_compile.passes.context import META, AttentionSite, PassContext
from headinfer_compile.passes.graph_utils import node_value, writes_inputs
from headinfer_compile.passes.lower import lower_regions
from headinfer_compile.passes.pipeline import Dump, run_graph_passes

log = logging.getLogger(__name__)

_INPUTS = ("input_ids", "position_ids", "attention_mask", "inputs_embeds")
_RECOMPILE_LIMIT = 64


def configure_dynamo() -> Callable[[], None]:
    """Let lengths be symbols from the start, and let several models share transformers' code.

    Without this, each new prompt length compiles again, and at 8 graphs Dynamo silently runs
    eagerly. The settings are process-wide: ``torch.compiler.config.dynamic_sources`` gets the cache
    length and the token inputs, ``torch._dynamo.config.recompile_limit`` is raised to 64, and
    ``torch._dynamo.config.specialize_float`` is set: the softmax scale of a second model would
    otherwise become a variable, since it differs from the first one's.

    Returns:
        A function that restores what was set before.
    """
    before = torch.compiler.config.dynamic_sources, torch._dynamo.config.recompile_limit
    sources = [
        *(f"['{name}'].length" for name in CACHE_ARGUMENTS),
        *(f"['{name}']" for name in _INPUTS),
    ]
    # The token ids of a decorated forward, after its ``self`` or not.
    names = ["L['args'][0]", "L['args'][1]"]
    names += [f"L{at}{source}" for source in sources for at in ("", "['kwargs']")]
    present = [name for name in before[0].split(",") if name]
    undo = [
        _set_everywhere(torch.compiler.config, "dynamic_sources", ",".join(
            dict.fromkeys([*present, *names])
        )),
        _set_everywhere(torch._dynamo.config, "recompile_limit", max(before[1], _RECOMPILE_LIMIT)),
        _set_everywhere(torch._dynamo.config, "specialize_float", True),
    ]  # fmt: skip

    def restore() -> None:
        for step in undo:
            step()

    return restore


def _set_everywhere(config: Any, name: str, value: Any) -> Callable[[], None]:
    """Set an option of torch for all threads; returns what restores it.

    In newer torch, what is assigned holds in the current thread alone, and every other one,
    that of a ``TextIteratorStreamer`` say, reads the defaults.
    """
    entry, assigned = config._config[name], getattr(config, name)
    defaults = {at: getattr(entry, at) for at in ("default", "env_value_default")}
    for at, held in defaults.items():
        if at == "default" or type(held) is type(value):
            setattr(entry, at, value)
    setattr(config, name, value)

    def restore() -> None:
        for at, held in defaults.items():
            setattr(entry, at, held)
        setattr(config, name, assigned)

    return restore


def headinfer(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """Compile one Dynamo graph.

    Args:
        gm: Torch-level graph.
        example_inputs: Its inputs: tensors, SymInts, numbers.
        options: ``HeadInferConfig`` fields.
        mode: ``"reduce-overhead"`` is ``cuda_graphs=True``; ``"max-autotune"`` and
            ``"max-autotune-no-cudagraphs"`` set Inductor's patch for the regions.

    Returns:
        A callable over the graph's flat inputs. It raises, so that the caller meets the error as it
        is and not wrapped by Dynamo, ``OptionError`` where an option or mode is invalid, and what
        ``compile_graph`` raises.
    """
    try:
        config = _config(options, mode)
        return compile_graph(gm, example_inputs, config, machine=known_machine(config))
    except HeadInferError as error:
        return _refuse(error)


def compile_graph(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    config: HeadInferConfig,
    *,
    graph_type: type[CompiledGraph] = CompiledGraph,
    keep_text: bool = False,
    machine: Machine | None = None,
) -> Callable[..., Any]:
    """Compile one Dynamo graph under ``config``; ``headinfer`` with what reports need besides.

    Args:
        gm: Torch-level graph.
        example_inputs: Its inputs.
        config: The options.
        graph_type: What runs the graph.
        keep_text: Keep the text of the graph after every pass.
        machine: By whose rates open options are chosen; None: they take their defaults.

    Raises:
        DeclinedError: An attention is not supported and ``config.strict`` is set.
        HeadInferError: Gradients are enabled, the weights are on several devices, or the graph
            uses two caches.
    """
    updates = _updates(gm)
    if not updates:
        log.warning(
            "this graph uses no HeadInferCache, so nothing is offloaded and it is compiled as it "
            "is: pass cache=HeadInferCache(model.config) to the call or to generate "
            "(past_key_values=... before transformers 5.24)"
        )
        return _without_sites(gm, example_inputs, config)
    if torch.is_grad_enabled() and any(
        isinstance(value, torch.Tensor) and value.requires_grad for value in example_inputs
    ):
        message = (
            "this call has gradients enabled, and HeadInferCache is for inference only: call the "
            "model under torch.no_grad() or torch.inference_mode(), or use generate()"
        )
        raise HeadInferError(message)
    devices = {str(v.device) for v in example_inputs if isinstance(v, torch.nn.Parameter)}
    if len(devices) > 1:
        message = (
            f"the model's weights are on {', '.join(sorted(devices))}: layers on several devices "
            "(a split device_map) can be planned (headinfer plan --gpus) and not yet run; load the "
            "model on one device"
        )
        raise HeadInferError(message)
    if len({update.args[0] for update in updates}) > 1:
        message = "one call uses two HeadInferCaches: a graph serves one cache at a time"
        raise HeadInferError(message)
    return _compile(gm, example_inputs, config, updates, graph_type, keep_text, machine)


def _config(options: Mapping[str, Any] | None, mode: str | None) -> HeadInferConfig:
    config = HeadInferConfig.from_options(options)
    if mode is None or mode == "default":
        return config
    if mode == "reduce-overhead":
        return replace(config, cuda_graphs=True)
    if mode in ("max-autotune", "max-autotune-no-cudagraphs"):
        return replace(config, inductor={"max_autotune": True, "coordinate_descent_tuning": True})
    raise OptionError(
        f"mode={mode!r}: expected 'default', 'reduce-overhead', 'max-autotune' or "
        "'max-autotune-no-cudagraphs'"
    )


def _updates(gm: GraphModule) -> list[Node]:
    update_kv = (torch.ops.headinfer.update_kv, torch.ops.headinfer.update_kv.default)
    return [node for node in gm.graph.nodes if node.target in update_kv]


def _without_sites(
    gm: GraphModule, example_inputs: Sequence[Any], config: HeadInferConfig
) -> Callable[..., Any]:
    if config.lowering == "eager":
        return gm.forward
    compiled = compile_fx(gm, list(example_inputs))
    assert callable(compiled)
    return compiled


def _refuse(error: HeadInferError) -> Callable[..., Any]:
    # Raised by the call and not by the compiler, so that Dynamo does not wrap it.
    def refuse(*_: Any) -> Any:
        raise type(error)(*error.args)

    return refuse


def _compile(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    config: HeadInferConfig,
    updates: Sequence[Node],
    graph_type: type[CompiledGraph],
    keep_text: bool,
    machine: Machine | None,
) -> CompiledGraph:
    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    handle_index = placeholders.index(updates[0].args[0])
    # Read now: the passes replace the updates.
    last_layer = max(int(update.args[3]) for update in updates)  # type: ignore[arg-type]
    parameters = [
        index for index, value in enumerate(example_inputs) if isinstance(value, torch.nn.Parameter)
    ]
    positions = [
        index
        for index, (node, value) in enumerate(zip(placeholders, example_inputs, strict=True))
        if isinstance(value, torch.Tensor) and "position_ids" in node.name
    ]
    batch_inputs = [] if writes_inputs(gm) else _batch_inputs(placeholders, example_inputs, updates)
    context = PassContext(config, example_inputs)
    dump = Dump(config.debug_dir)
    split, pass_reports = run_graph_passes(gm, context, dump, keep_text)
    activations = activation_model(split, config.lowering)
    attentions = [
        node
        for node in split.graph.nodes
        if isinstance(node.meta.get(META), AttentionSite)
        and node.target is torch.ops.headinfer.attention.default
    ]
    facts = None
    if machine is not None and attentions:
        facts = graph_facts(split, example_inputs, attentions)
    regions = lower_regions(
        split,
        example_inputs,
        lowering=config.lowering,
        inductor={**_tuning(config, attentions), **config.inductor},
    )
    sites = [node.meta[META] for node in attentions]
    sites.sort(key=lambda site: site.index)
    report = GraphReport(tuple(sites), tuple(context.declines), tuple(pass_reports), regions)
    log.info(
        "%d sites, %d declined, %d regions (%d unique) in %.1f s",
        len(sites), len(context.declines), regions.num_regions, regions.num_unique, regions.seconds,
    )  # fmt: skip
    return graph_type(
        graph_module=split,
        config=config,
        sites=sites,
        report=report,
        handle_index=handle_index,
        parameter_index=parameters[0] if parameters else handle_index,
        positions_index=positions[0] if positions else None,
        last_layer=last_layer,
        dump=dump,
        activations=activations,
        auto=AutoSettings(machine, facts),
        batch_inputs=batch_inputs,
    )


def _tuning(config: HeadInferConfig, attentions: Sequence[Node]) -> dict[str, Any]:
    """Inductor's patches for a graph that will be replayed as a CUDA graph.

    Its products are of one row, bound by reading the weights; cuBLAS reads them at two thirds of
    the memory's rate for the smaller ones, a reduction that Inductor tunes at most of it. Tuning
    takes a minute, once: its choices are kept on disk.
    """
    queries = [node_value(node.args[1]) for node in attentions if isinstance(node.args[1], Node)]
    if not config.cuda_graphs or not queries:
        return {}
    one_token = all(
        q.is_cuda and all(statically_known_true(q.shape[i] == 1) for i in (0, 2)) for q in queries
    )
    return {"coordinate_descent_tuning": True} if one_token else {}


def _batch_inputs(
    placeholders: Sequence[Node], example_inputs: Sequence[Any], updates: Sequence[Node]
) -> list[tuple[int, int]]:
    """Inputs that have the batch of K as a dim, the model's own tensors apart, with that dim."""
    k = updates[0].args[1]
    batch = node_value(k).shape[0] if isinstance(k, Node) else None
    found = []
    for index, (node, value) in enumerate(zip(placeholders, example_inputs, strict=True)):
        fake = node_value(node)
        if isinstance(fake, torch.Tensor) and not _is_state(node, value):
            # As text, which tells symbols apart without a guard.
            found += [(index, d) for d, size in enumerate(fake.shape) if str(size) == str(batch)]
    return found


def _is_state(placeholder: Node, value: Any) -> bool:
    """Whether an input is a parameter or a buffer of the model, by the name that Dynamo gives."""
    name = placeholder.name
    return isinstance(value, torch.nn.Parameter) or ("_modules_" in name and "_buffers_" in name)


# Before the first call is traced: Dynamo reads these settings when it builds the first guards.
restore_dynamo = configure_dynamo()
