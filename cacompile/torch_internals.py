"""Every private or moving part of torch that we touch, each with what we need of it and where it was seen to hold.

Other files take these names from here. They are looked up when they are first asked for, so that a name which has moved
is a contract that does not hold, not an import that fails: `broken_contracts` lists those before a graph is touched.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib
import inspect
import sys
import types
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

if TYPE_CHECKING:
    from torch._C import _DisableAutocast as DisableAutocast
    from torch._C import _will_engine_execute_node as will_engine_execute_node
    from torch._C._dynamo import eval_frame as eval_frame
    from torch._C._profiler import _RecordFunctionFast as Range
    from torch._dynamo import config as dynamo_config
    from torch._dynamo import exc as dynamo_exc
    from torch._dynamo.backends.common import AotAutograd as AotAutograd
    from torch._dynamo.backends.common import aot_autograd as aot_autograd
    from torch._dynamo.backends.debugging import boxed_nop as boxed_nop
    from torch._dynamo.backends.registry import lookup_backend as lookup_backend
    from torch._dynamo.convert_frame import compile_lock as compile_lock
    from torch._dynamo.convert_frame import register_bytecode_hook as register_bytecode_hook
    from torch._dynamo.exc import ShortenTraceback as ShortenTraceback
    from torch._dynamo.source import ConstantSource as ConstantSource
    from torch._dynamo.utils import counters as counters
    from torch._functorch import config as aot_cache_config
    from torch._functorch import config as functorch_config
    from torch._functorch._aot_autograd.autograd_cache import BypassAOTAutogradCache as AOTAutogradCacheBypass
    from torch._functorch._aot_autograd.descriptors import GradAOTOutput as GradAOTOutput
    from torch._functorch._aot_autograd.descriptors import ParamAOTInput as ParamAOTInput
    from torch._functorch._aot_autograd.descriptors import PlainAOTInput as PlainAOTInput
    from torch._functorch._aot_autograd.descriptors import TangentAOTInput as TangentAOTInput
    from torch._guards import CompileContext as CompileContext
    from torch._guards import TracingContext as TracingContext
    from torch._guards import compile_context as compile_context
    from torch._guards import detect_fake_mode as detect_fake_mode
    from torch._guards import tracing as tracing
    from torch._inductor import config as inductor_config
    from torch._inductor import cudagraph_trees as cudagraph_trees
    from torch._inductor import graph as inductor_graph
    from torch._inductor import inductor_prims as inductor_prims
    from torch._inductor import list_mode_options as list_mode_options
    from torch._inductor.codecache import FxGraphCache as FxGraphCache
    from torch._inductor.compile_fx import compile_fx as compile_fx
    from torch._inductor.compile_fx import compile_fx_inner as compile_fx_inner
    from torch._inductor.cpp_builder import get_cpp_compiler as get_cpp_compiler
    from torch._inductor.output_code import CompiledFxGraph as CompiledFxGraph
    from torch._inductor.output_code import CompiledFxGraphConstants as CompiledFxGraphConstants
    from torch._inductor.output_code import OutputCode as OutputCode
    from torch._logging import trace_structured as trace_structured
    from torch._logging import warning_once as warning_once
    from torch._subclasses import FakeTensor as FakeTensor
    from torch._subclasses import FakeTensorMode as FakeTensorMode
    from torch.autograd import profiler as autograd_profiler
    from torch.autograd.graph import get_gradient_edge as get_gradient_edge
    from torch.distributed.distributed_c10d import _get_process_group_store as process_group_store
    from torch.fx._graph_pickler import GraphPickler as GraphPickler
    from torch.fx._graph_pickler import Options as GraphPicklerOptions
    from torch.fx.experimental.symbolic_shapes import DimDynamic as DimDynamic
    from torch.fx.experimental.symbolic_shapes import ShapeEnv as ShapeEnv
    from torch.nn.parallel.distributed import DistributedDataParallel as DDP
    from torch.nn.parallel.distributed import _DDPJoinHook as DDPJoinHook
    from torch.nn.utils import clip_grad as clip_grad
    from torch.utils import swap_tensors as swap_tensors
    from torch.utils._python_dispatch import _disable_current_modes as disable_current_modes
    from torch.utils._python_dispatch import is_traceable_wrapper_subclass as is_traceable_subclass
    from torch.utils._pytree import tree_leaves as tree_leaves
    from torch.utils._pytree import tree_map_only as tree_map_only
    from torch.utils._triton import has_triton as has_triton

TESTED = ("2.11", "2.13", "2.14", "2.15")
"""Releases of torch on which the suite, or its quick part, was run."""

COMPILE = "compiling"
"""Without it no graph can be masked: all are left to the inner compiler."""
LOOK = "explaining"
"""Without it `explain` cannot look at a model that is not compiled."""
RANKS = "agreeing"
"""Without it ranks that hold copies of parameters cannot agree on what to skip: they compute everything."""
CACHE = "starting from a cache"
"""Without it AOTAutograd's cache stays off for our graphs: each start traces them again."""
SEE = "doctor"
"""Without it a check of `cacompile doctor` is left out."""


CACHED = ("2.11", "2.13", "2.14")
"""Releases on which training has started from AOTAutograd's cache."""

TRIED = ("2.13",)
"""Releases on which several processes have trained."""


@dataclass(frozen=True)
class Contract:
    """One name of torch's, and what we need of it."""

    name: str
    """As it is called here."""
    place: str
    """Where torch has it: `module:attribute`, or a module; several after each other where it has moved: `new | old`."""
    attributes: tuple[str, ...] = ()
    """What it must have."""
    parameters: tuple[str, ...] = ()
    """What it must take."""
    purpose: str = COMPILE
    seen: tuple[str, ...] = TESTED
    """Releases on which it was seen to hold."""

    def resolve(self) -> Any:
        """The object. Raises ImportError or AttributeError where torch has none of that name."""
        *others, last = self.place.split(" | ")
        for place in others:
            with contextlib.suppress(ImportError, AttributeError):
                return _at(place)
        return _at(last)

    def fault(self) -> str | None:
        """What does not hold, in words; None while all does."""
        if self.name in _forced:
            return "was taken away for a test"
        try:
            found = self.resolve()
        except (ImportError, AttributeError) as error:
            return str(error)
        for path in self.attributes:
            held = found
            for step in path.split("."):
                if not hasattr(held, step):
                    return f"{self.place} has no {path!r}"
                held = getattr(held, step)
        if self.parameters:
            taken = inspect.signature(found).parameters
            if not any(p.kind is p.VAR_KEYWORD for p in taken.values()):
                for wanted in self.parameters:
                    if wanted not in taken:
                        return f"{self.place} takes no {wanted!r}"
        return None


def _at(place: str) -> Any:
    module, _, attribute = place.partition(":")
    found = importlib.import_module(module)
    return getattr(found, attribute) if attribute else found


_DESCRIPTORS = "torch._functorch._aot_autograd.descriptors"

CONTRACTS = (
    Contract("compile_fx", "torch._inductor.compile_fx:compile_fx", parameters=("inner_compile", "config_patches")),
    Contract("compile_fx_inner", "torch._inductor.compile_fx:compile_fx_inner"),
    Contract("inductor_config", "torch._inductor.config", ("patch", "get_config_copy", "triton.cudagraphs")),
    Contract("inductor_graph", "torch._inductor.graph"),
    Contract("inductor_prims", "torch._inductor.inductor_prims"),  # registers operations
    Contract("list_mode_options", "torch._inductor:list_mode_options"),
    Contract("cudagraph_trees", "torch._inductor.cudagraph_trees", ("reset_cudagraph_trees",)),
    Contract("get_cpp_compiler", "torch._inductor.cpp_builder:get_cpp_compiler", purpose=SEE),
    Contract("functorch_config", "torch._functorch.config", ("patch", "joint_custom_pass", "enable_autograd_cache")),
    Contract("GradAOTOutput", f"{_DESCRIPTORS}:GradAOTOutput", parameters=("grad_of",)),
    Contract("PlainAOTInput", f"{_DESCRIPTORS}:PlainAOTInput", parameters=("idx",)),
    Contract("ParamAOTInput", f"{_DESCRIPTORS}:ParamAOTInput", parameters=("target",)),
    Contract("TangentAOTInput", f"{_DESCRIPTORS}:TangentAOTInput", parameters=("output",), purpose=LOOK),
    Contract("CompileContext", "torch._guards:CompileContext", ("try_get", "current_compile_id")),
    Contract("TracingContext", "torch._guards:TracingContext", ("try_get",)),
    Contract("compile_context", "torch._guards:compile_context"),
    Contract("tracing", "torch._guards:tracing"),
    Contract("detect_fake_mode", "torch._guards:detect_fake_mode"),
    Contract("AotAutograd", "torch._dynamo.backends.common:AotAutograd"),
    Contract("aot_autograd", "torch._dynamo.backends.common:aot_autograd"),
    Contract("boxed_nop", "torch._dynamo.backends.debugging:boxed_nop"),
    Contract("lookup_backend", "torch._dynamo.backends.registry:lookup_backend"),
    Contract("compile_lock", "torch._dynamo.convert_frame:compile_lock", ("__enter__", "__exit__")),
    Contract("register_bytecode_hook", "torch._dynamo.convert_frame:register_bytecode_hook", purpose=LOOK),
    Contract("dynamo_config", "torch._dynamo.config", ("patch", "compiled_autograd")),
    Contract("dynamo_exc", "torch._dynamo.exc", ("RestartAnalysis", "SkipFrame", "Unsupported")),
    Contract("ShortenTraceback", "torch._dynamo.exc:ShortenTraceback", parameters=("first_useful_frame",)),
    Contract("counters", "torch._dynamo.utils:counters", ("__getitem__",)),
    Contract("eval_frame", "torch._C._dynamo.eval_frame", purpose=LOOK),
    Contract("DisableAutocast", "torch._C:_DisableAutocast"),
    Contract("Range", "torch._C._profiler:_RecordFunctionFast", ("__enter__", "__exit__")),
    Contract("FakeTensor", "torch._subclasses:FakeTensor"),
    Contract("FakeTensorMode", "torch._subclasses:FakeTensorMode", ("from_tensor",)),
    Contract("trace_structured", "torch._logging:trace_structured", parameters=("metadata_fn", "payload_fn")),
    Contract("warning_once", "torch._logging:warning_once"),
    Contract("autograd_profiler", "torch.autograd.profiler", ("_is_profiler_enabled",)),
    Contract("ConstantSource", "torch._dynamo.source:ConstantSource"),
    Contract("DimDynamic", "torch.fx.experimental.symbolic_shapes:DimDynamic", ("DYNAMIC",)),
    Contract(
        "ShapeEnv",
        "torch.fx.experimental.symbolic_shapes:ShapeEnv",
        ("create_unspecified_symbol", "create_symintnode"),
    ),
    Contract("clip_grad", "torch.nn.utils.clip_grad", ("clip_grad_norm_",)),
    Contract("disable_current_modes", "torch.utils._python_dispatch:_disable_current_modes", purpose=LOOK),
    Contract("is_traceable_subclass", "torch.utils._python_dispatch:is_traceable_wrapper_subclass"),
    Contract("tree_leaves", "torch.utils._pytree:tree_leaves"),
    Contract("tree_map_only", "torch.utils._pytree:tree_map_only", purpose=LOOK),
    Contract("has_triton", "torch.utils._triton:has_triton", purpose=SEE),
    Contract("will_engine_execute_node", "torch._C:_will_engine_execute_node"),
    Contract("get_gradient_edge", "torch.autograd.graph:get_gradient_edge", parameters=("tensor",)),
    Contract("DDPJoinHook", "torch.nn.parallel.distributed:_DDPJoinHook", ("main_hook", "post_hook"), (), RANKS, TRIED),
    Contract("DDP", "torch.nn.parallel.distributed:DistributedDataParallel", ("_active_ddp_module",), (), RANKS, TRIED),
    Contract(
        "process_group_store",
        "torch.distributed.distributed_c10d:_get_process_group_store",
        parameters=("pg",),
        purpose=RANKS,
        seen=TRIED,
    ),
    Contract("swap_tensors", "torch.utils:swap_tensors", parameters=("t1", "t2")),
    Contract(
        "OutputCode",
        "torch._inductor.output_code:OutputCode",
        ("post_compile", "prepare_for_serialization"),
        (),
        CACHE,
        CACHED,
    ),
    Contract(
        "CompiledFxGraph",
        "torch._inductor.output_code:CompiledFxGraph",
        ("post_compile", "prepare_for_serialization"),
        (),
        CACHE,
        CACHED,
    ),
    Contract("CompiledFxGraphConstants", "torch._inductor.output_code:CompiledFxGraphConstants", (), (), CACHE, CACHED),
    Contract(
        "FxGraphCache",
        "torch._inductor.codecache:FxGraphCache",
        ("cache_hit_post_compile", "load_with_key", "_save_graph"),
        (),
        CACHE,
        CACHED,
    ),
    Contract(
        "AOTAutogradCacheBypass",
        "torch._functorch._aot_autograd.autograd_cache:BypassAOTAutogradCache",
        (),
        (),
        CACHE,
        CACHED,
    ),
    Contract(
        "aot_cache_config",
        "torch._functorch.config",
        ("bundled_autograd_cache", "force_non_lazy_backward_lowering"),
        (),
        CACHE,
        CACHED,
    ),
    Contract("GraphPickler", "torch.fx._graph_pickler:GraphPickler", ("dumps", "loads"), (), CACHE, CACHED),
    Contract(
        "GraphPicklerOptions",
        "torch.fx._graph_pickler:Options",
        (),
        ("ops_filter", "node_metadata_key_filter"),
        CACHE,
        CACHED,
    ),
)

_by_name = {contract.name: contract for contract in CONTRACTS}
_forced: set[str] = set()


def __getattr__(name: str) -> Any:
    if name not in _by_name:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _by_name[name].resolve()


@dataclass(frozen=True)
class Broken:
    """A contract that does not hold on the torch that is there."""

    contract: Contract
    fault: str

    def __str__(self) -> str:
        return f"{self.contract.name} ({self.contract.place}): {self.fault}"


def broken_contracts(purpose: str | None = None) -> list[Broken]:
    """The contracts that do not hold here, of one purpose or of all."""
    return list(_broken(purpose, frozenset(_forced)))


@functools.cache  # asked for every graph; torch does not change while a process runs
def _broken(purpose: str | None, forced: frozenset[str]) -> tuple[Broken, ...]:
    wanted = [contract for contract in CONTRACTS if purpose in (None, contract.purpose)]
    return tuple(Broken(contract, fault) for contract in wanted if (fault := contract.fault()) is not None)


@contextlib.contextmanager
def taken_away(name: str) -> Iterator[None]:
    """Let one contract not hold, for a test of what happens then."""
    _forced.add(_by_name[name].name)
    try:
        yield
    finally:
        _forced.discard(name)


def release() -> str:
    """The release of torch that is there, such as "2.13"."""
    return ".".join(torch.__version__.split("+")[0].split(".")[:2])


def is_control_flow(error: BaseException) -> bool:
    """Whether Dynamo raises it to go on in another way, rather than to tell of a fault."""
    exc = __getattr__("dynamo_exc")
    return isinstance(error, (exc.RestartAnalysis, exc.SkipFrame, exc.Unsupported))


def dynamo_source(node: fx.Node) -> Any:
    """Dynamo's source of a placeholder of its graph, or None."""
    return getattr(node, "_dynamo_source", None)


def source_text(source: Any) -> str | None:
    """What one of Dynamo's sources is called: `L['self']._modules['up']._parameters['weight']`."""
    name = getattr(source, "name", None)
    return name() if callable(name) else name  # a method before torch 2.12, a property since


def root(desc: Any) -> Any:
    """What AOTAutograd's description of an inner tensor, size or stride of a subclass is a part of; else itself."""
    while hasattr(desc, "base"):
        desc = desc.base
    return desc


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
    source = __getattr__("ConstantSource")(name)
    # dynamic: equal to no other size, whatever the example
    symbol = shape_env.create_unspecified_symbol(example, source, dynamic_dim=__getattr__("DimDynamic").DYNAMIC)
    return shape_env.create_symintnode(symbol, hint=example, source=source)


def name_input(node: fx.Node, example: Any) -> None:
    """Make a new placeholder of Dynamo's graph one that has no source."""
    node.meta["example_value"] = example
    node._dynamo_source = None


def inductor_alone(gm: fx.GraphModule, example_inputs: Any, patches: dict[str, Any]) -> Callable[..., Any]:
    """The graph as `torch.compile` has it compiled, with nothing of ours. patches: of Inductor's configuration."""
    from torch._inductor.compile_fx import compile_fx  # whatever the table says: without it there is no Inductor

    return compile_fx(gm, example_inputs, config_patches=patches)


def check_inductor_option(name: str, value: Any) -> None:
    """Raise RuntimeError, as torch.compile does, for a value that an option of Inductor's cannot have."""
    torch._TorchCompileInductorWrapper(None, {name: value}, None)


def replace_total_norm(norm: Callable[..., Any]) -> bool:
    """Let `clip_grad_norm_` take its norm from `norm`; False in a torch where it does not look it up by that name."""
    module = __getattr__("clip_grad")
    if "_get_total_norm" not in inspect.unwrap(module.clip_grad_norm_).__code__.co_names:
        return False
    module._get_total_norm = norm
    return True


def replace_swap_tensors(
    around: Callable[..., contextlib.AbstractContextManager[None]], before: Callable[[Any], None]
) -> None:
    """Let `torch.utils.swap_tensors`, which refuses tensors that have weak references, run inside `around(t1, t2)`.

    before(tensor) is called where the function was imported by name before, when it looks for weak references.
    """
    swap = __getattr__("swap_tensors")

    class Weakref(types.ModuleType):
        @staticmethod
        def getweakrefs(tensor: Any) -> list[Any]:
            before(tensor)
            return weakref.getweakrefs(tensor)

        def __getattr__(self, name: str) -> Any:
            return getattr(weakref, name)

    if isinstance(swap, types.FunctionType) and swap.__globals__.get("weakref") is weakref:
        swap.__globals__["weakref"] = Weakref("weakref")

    @functools.wraps(swap)
    def swap_tensors(t1: Any, t2: Any) -> Any:
        with around(t1, t2):
            return swap(t1, t2)

    torch.utils.swap_tensors = swap_tensors


def running_ddp() -> Any:
    """The DistributedDataParallel whose module runs forward now; None where there is none."""
    # one that nobody has made is not imported either: a dictionary is asked, and no process group
    module = sys.modules.get("torch.nn.parallel.distributed")
    wrapper = getattr(module, "DistributedDataParallel", None)
    return getattr(wrapper, "_active_ddp_module", None)


def group_store(group: Any) -> Any:
    """The key-value store that the ranks of a process group have met in."""
    return __getattr__("process_group_store")(group)


@functools.cache
def follow_joins(joined: Callable[[Any], None], together: Callable[[Any, bool], None]) -> None:
    """Call `joined(ddp)` on a rank that has joined, for each forward pass of the others under `Join`, and
    `together(ddp, is_last_joiner)` on all ranks once all have."""
    hook = __getattr__("DDPJoinHook")
    main_hook, post_hook = hook.main_hook, hook.post_hook

    @functools.wraps(main_hook)
    def main(self: Any) -> None:
        joined(self.ddp)
        main_hook(self)

    @functools.wraps(post_hook)
    def post(self: Any, is_last_joiner: bool) -> None:
        post_hook(self, is_last_joiner)
        together(self.ddp, is_last_joiner)

    hook.main_hook, hook.post_hook = main, post


def is_zero1(optimizer: Any) -> bool:
    """Whether it is a ZeroRedundancyOptimizer, within which each rank steps its own parameters: `optimizer.optim`."""
    module = sys.modules.get("torch.distributed.optim.zero_redundancy_optimizer")
    return module is not None and isinstance(optimizer, module.ZeroRedundancyOptimizer)


def captured_backwards() -> int:
    """Backward passes that compiled autograd has traced."""
    return __getattr__("counters")["compiled_autograd"]["captures"]


@contextlib.contextmanager
def donating(context: Any, donated: list[int] | None) -> Iterator[None]:
    """Tell Inductor which inputs of a backward it may overwrite. context: the forward's TracingContext."""
    if context is None or donated is None:
        yield
        return
    metadata = context.fw_metadata
    before, metadata.bw_donated_idxs = metadata.bw_donated_idxs, donated
    try:
        yield
    finally:
        metadata.bw_donated_idxs = before


def donated_inputs(context: Any) -> list[int] | None:
    """Which inputs of the backward Inductor may overwrite, as AOTAutograd has found; None where it has not."""
    metadata = context.fw_metadata if context is not None else None
    return None if metadata is None else metadata.bw_donated_idxs


@contextlib.contextmanager
def aligned_host_inputs(wanted: bool) -> Iterator[None]:
    """Inductor takes inputs in CPU memory for unaligned, and what is computed with them too: slow reads of every dW.

    Our flags touch no alignment: results of masked operations are memory of their own.
    """
    module = __getattr__("inductor_graph")
    before = getattr(module, "should_assume_input_aligned", None)
    if not wanted or before is None:
        yield
        return
    module.should_assume_input_aligned = lambda tensor: tensor.device.type == "cpu" or before(tensor)
    try:
        yield
    finally:
        module.should_assume_input_aligned = before


@contextlib.contextmanager
def compiling_backward(context: Any, compile_id: Any) -> Iterator[None]:
    """The surroundings, beside the lock, in which AOTAutograd compiles a backward lazily."""
    with (
        __getattr__("tracing")(context),
        __getattr__("compile_context")(compile_id),
        __getattr__("DisableAutocast")(),
    ):
        yield


def insert_output_stride(context: Any, position: int, outputs: int) -> None:
    """Say that a forward has one more output, of no known stride. outputs: how many it had before.

    Raises RuntimeError where torch's list of strides is not of these outputs.
    """
    strides = context.output_strides if context is not None else None
    if not strides:
        return
    if len(strides) != outputs:
        raise RuntimeError(f"{len(strides)} strides were reported for {outputs} outputs of a forward graph")
    strides.insert(position, None)
