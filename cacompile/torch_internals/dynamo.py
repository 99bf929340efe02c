"""Dynamo: its graphs and their inputs, the code it has compiled, the modules it wraps."""

from __future__ import annotations

import copy
import re
import types
from collections.abc import Callable
from typing import Any

from torch import fx

from .lookup import resolve

_STEP = re.compile(r"\['([^']+)'\]|\[(\d+)\]|\.(\w+)")
_PLUMBING = {"_modules", "_parameters", "_buffers", "_orig_mod", "__self__", "__dict__", "__func__"}


def is_control_flow(error: BaseException) -> bool:
    """Whether Dynamo raises it to go on in another way, rather than to tell of a fault."""
    exc = resolve("dynamo_exc")
    return isinstance(error, (exc.RestartAnalysis, exc.SkipFrame, exc.Unsupported))


def captured_backwards() -> int:
    """Backward passes that compiled autograd has traced."""
    return resolve("counters")["compiled_autograd"]["captures"]


def compiled_function(output: Any) -> Any:
    """The autograd node that runs a compiled backward for this output of a graph; None where none is found."""
    node = getattr(output, "grad_fn", None)
    for each in (node, *(following for following, _ in getattr(node, "next_functions", ()))):  # it may be a view
        if hasattr(getattr(each, "_forward_cls", None), "_lazy_backward_info"):
            return each
    return None


def traced_as(node: Any, edit: Callable[[fx.GraphModule], fx.GraphModule]) -> Any:
    """A class like that of a compiled function's node, of whose backward compiled autograd traces what `edit` makes."""
    function = node._forward_cls
    info = resolve("CachedBackward")(lambda: edit(resolve("extract_bw_module")(function)))
    return type(function.__name__, (function,), {"_lazy_backward_info": info})


def trace_as(node: Any, function: Any) -> None:
    """Let compiled autograd trace the backward of this node as that of `function`, which `traced_as` has made."""
    node._forward_cls = function


def dynamo_source(node: fx.Node) -> Any:
    """Dynamo's source of a placeholder of its graph, or None."""
    return getattr(node, "_dynamo_source", None)


def source_path(source: Any) -> list[str]:
    """Where one of Dynamo's sources is in the user's model: `["up", "weight"]`; empty where it has no name.

    Of `L['self']._modules['up']._parameters['weight']`, as Dynamo calls it.
    """
    steps = [a or b or c for a, b, c in _STEP.findall(_source_text(source))]
    return [step for step in steps[1:] if step not in _PLUMBING]


def in_a_module(source: Any) -> bool:
    """Whether one of Dynamo's sources is something that a module inside the user's model holds."""
    return "_modules[" in _source_text(source)


def _source_text(source: Any) -> str:
    name = getattr(source, "name", None)
    return (name() if callable(name) else name) or ""  # a method before torch 2.12, a property since


def copy_dynamo_graph(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy of Dynamo's graph with all that the compilers behind it read of it.

    A copy, because Dynamo reads its own graph's placeholders again after the backend returns.
    """
    made = copy.copy(gm)
    made.graph = copy.deepcopy(gm.graph)
    for extra in ("_param_name_to_source", "_source_to_user_stacks"):
        if hasattr(gm, extra):
            setattr(made, extra, getattr(gm, extra))
    for ours, theirs in zip(made.graph.nodes, gm.graph.nodes, strict=True):
        if hasattr(theirs, "_dynamo_source"):
            ours._dynamo_source = theirs._dynamo_source
    for node in made.graph.find_nodes(op="placeholder"):
        node.meta.pop("grapharg", None)  # a weak reference to the input, which Dynamo takes out of its own graph too
    return made


def symbolic_int(example: int, name: str, fake_mode: Any) -> Any:
    """An int that graphs take for any: a size of its own. The example itself where nothing is symbolic yet."""
    shape_env = getattr(fake_mode, "shape_env", None)
    if shape_env is None:
        return example
    source = resolve("ConstantSource")(name)
    # dynamic: equal to no other size, whatever the example
    symbol = shape_env.create_unspecified_symbol(example, source, dynamic_dim=resolve("DimDynamic").DYNAMIC)
    return shape_env.create_symintnode(symbol, hint=example, source=source)


def name_input(node: fx.Node, example: Any) -> None:
    """Make a new placeholder of Dynamo's graph one that has no source."""
    node.meta["example_value"] = example
    node._dynamo_source = None


def uncompiled(model: Any) -> Any:
    """The module that `torch.compile(model)` wraps; another module itself."""
    return getattr(model, "_orig_mod", model)


def is_compiled(model: Any) -> bool:
    """Whether the module as a whole is compiled, by `torch.compile` or in place."""
    return uncompiled(model) is not model or getattr(model, "_compiled_call_impl", None) is not None


def may_be_compiling(frame: types.FrameType | None) -> bool:
    """Whether a frame or one of its callers runs in something that Dynamo compiles, or is kept from it.

    `frame` itself does not count where it is what keeps something from Dynamo.
    """
    wraps = resolve("OptimizedModule").__module__
    if frame is not None and frame.f_globals.get("__name__") == wraps:
        frame = frame.f_back
    while frame is not None:
        if frame.f_globals.get("__name__") == wraps:
            return True
        frame = frame.f_back
    return False


def is_compiled_code(code: types.CodeType) -> bool:
    """Whether Dynamo holds something compiled of this code."""
    return bool(resolve("eval_frame")._debug_get_cache_entry_list(code))


def forget_code(code: types.CodeType) -> None:
    """Have Dynamo forget what it has compiled of this code."""
    resolve("eval_frame").reset_code(code)
