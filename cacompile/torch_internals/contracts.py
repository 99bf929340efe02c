"""The contracts: each name of torch's that we take, with what we need of it and where it was seen to hold."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

TESTED = ("2.11", "2.13", "2.14", "2.15")
"""Releases of torch on which the suite, or its quick part, was run."""

COMPILE = "compiling"
"""Without it no graph can be masked: all are left to the inner compiler."""
LOOK = "explaining"
"""Without it `explain` cannot look at a model that is not compiled."""
RANKS = "agreeing"
"""Without it ranks that hold copies of parameters cannot agree on what to skip: they compute everything."""
SHARDS = "sharding"
"""Without it what `fully_shard` has spread over ranks stays dense."""
SCATTERS = "sending less of shards"
"""Without it `reduce_less` leaves what `fully_shard` sends as it is."""
CACHE = "starting from a cache"
"""Without it AOTAutograd's cache stays off for our graphs: each start traces them again."""
TRACED = "ending backwards under compiled autograd"
"""Without it forwards save all that they can, whatever is frozen: what traces the backward may read it."""
STANDALONE = "running passes standalone"
"""Without it `cacompile.passes` finds no parameters, or changes no graph, under plain `torch.compile`."""
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
    """What it must have, or of a class, what its source says that objects have."""
    parameters: tuple[str, ...] = ()
    """What it must take."""
    probe: Callable[[Any], object] | None = None
    """What is done with it, in small, where names do not tell: raises where that does not work any more."""
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
        try:
            found = self.resolve()
        except (ImportError, AttributeError) as error:
            return str(error)
        for path in self.attributes:
            held = found
            for step in path.split("."):
                if not (hasattr(held, step) or step in _declared(held)):
                    return f"{self.place} has no {path!r}"
                held = getattr(held, step, None)
        if self.parameters:
            taken = inspect.signature(found).parameters
            if not any(p.kind is p.VAR_KEYWORD for p in taken.values()):
                for wanted in self.parameters:
                    if wanted not in taken:
                        return f"{self.place} takes no {wanted!r}"
        try:
            if self.probe is not None:
                self.probe(found)
        except Exception as error:
            return f"{self.place} is not as it was: {type(error).__name__}: {error}"
        return None


def _at(place: str) -> Any:
    module, _, attribute = place.partition(":")
    found = importlib.import_module(module)
    return operator.attrgetter(attribute)(found) if attribute else found


def _declared(kind: Any) -> set[str]:
    classes = inspect.getmro(kind) if inspect.isclass(kind) else ()
    return {name for each in classes for name in inspect.get_annotations(each)}


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
    Contract("eval_frame", "torch._C._dynamo.eval_frame", ("_debug_get_cache_entry_list", "reset_code"), purpose=LOOK),
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
    Contract(
        "DDPJoinHook",
        "torch.nn.parallel.distributed:_DDPJoinHook",
        ("main_hook", "post_hook"),
        purpose=RANKS,
        seen=TRIED,
    ),
    Contract(
        "DDP",
        "torch.nn.parallel.distributed:DistributedDataParallel",
        ("_active_ddp_module",),
        purpose=RANKS,
        seen=TRIED,
    ),
    Contract(
        "process_group_store",
        "torch.distributed.distributed_c10d:_get_process_group_store",
        parameters=("pg",),
        purpose=RANKS,
        seen=TRIED,
    ),
    Contract(
        "OptimizedModule",
        "torch._dynamo.eval_frame:OptimizedModule",
        probe=lambda module: module.__init__.__code__.co_names.index("_orig_mod"),
    ),
    Contract("Module", "torch.nn:Module", ("_parameters", "_buffers", "_compiled_call_impl"), purpose=LOOK),
    Contract("Tensor", "torch:Tensor", ("_version", "_is_view", "_backward_hooks")),
    Contract("UntypedStorage", "torch:UntypedStorage", ("_cdata",), purpose=STANDALONE),
    Contract(
        "FakeTensorConverter", "torch._subclasses.fake_tensor:FakeTensorConverter", ("_get_memo",), purpose=STANDALONE
    ),
    Contract("Graph", "torch.fx:Graph", probe=lambda graph: graph()._codegen, purpose=STANDALONE),
    Contract("Node", "torch.fx:Node", ("_rename",)),
    Contract("OpOverload", "torch:ops.aten.convolution_backward.default", ("_op", "_opname", "overloadpacket")),
    Contract("SymNode", "torch.fx.experimental.sym_node:SymNode", ("expr", "hint")),
    Contract("grouped_mm", "torch:_grouped_mm"),
    Contract("flop_registry", "torch.utils.flop_counter:flop_registry", ("get",)),
    Contract("CompiledFxGraph", "torch._inductor.output_code:CompiledFxGraph", ("current_callable",)),
    Contract(
        "make_boxed_func",
        "torch._functorch._aot_autograd.utils:make_boxed_func",
        probe=lambda make: make(len)._boxed_call,
    ),
    Contract(
        "is_backward",  # tells a joint graph's nodes apart by the key under which we tell as well
        "torch._functorch.partitioners:_has_tag_is_backward",
        probe=lambda has_tag: has_tag.__code__.co_consts.index("partitioner_tag"),
    ),
    Contract(
        "module_states",
        "torch.distributed._composable_state:_module_state_mapping",
        ("values",),
        purpose=SHARDS,
        seen=("2.11", "2.13", "2.14"),
    ),
    Contract(
        "FSDPParamGroup",
        "torch.distributed.fsdp._fully_shard._fsdp_param_group:FSDPParamGroup",
        probe=lambda group: [
            group.__init__.__code__.co_names.index(of) for of in ("_reduce_scatter_comm", "fsdp_params")
        ],
        purpose=SCATTERS,
        seen=("2.13",),
    ),
    Contract(
        "FSDPParam",
        "torch.distributed.fsdp._fully_shard._fsdp_param:FSDPParam",
        ("padded_sharded_param_size", "sharded_param"),
        purpose=SCATTERS,
        seen=("2.13",),
    ),
    Contract("swap_tensors", "torch.utils:swap_tensors", parameters=("t1", "t2")),
    Contract("extract_bw_module", "torch._dynamo.compiled_autograd:extract_bw_module", purpose=TRACED, seen=("2.13",)),
    Contract(
        "CachedBackward",
        "torch._functorch._aot_autograd.runtime_wrappers:CachedAutogradLazyBackwardCompileInfo",
        parameters=("bw_module_fn",),
        purpose=TRACED,
        seen=("2.13",),
    ),
    Contract(
        "OutputCode",
        "torch._inductor.output_code:OutputCode",
        ("post_compile", "prepare_for_serialization"),
        purpose=CACHE,
        seen=CACHED,
    ),
    Contract(
        "StorableFxGraph",
        "torch._inductor.output_code:CompiledFxGraph",
        ("post_compile", "prepare_for_serialization", "guards_expr", "_fx_graph_cache_key"),
        purpose=CACHE,
        seen=CACHED,
    ),
    Contract(
        "CompiledFxGraphConstants",
        "torch._inductor.output_code:CompiledFxGraphConstants",
        purpose=CACHE,
        seen=CACHED,
    ),
    Contract(
        "FxGraphCache",
        "torch._inductor.codecache:FxGraphCache",
        ("cache_hit_post_compile", "load_with_key", "_save_graph"),
        purpose=CACHE,
        seen=CACHED,
    ),
    Contract(
        "AOTAutogradCacheBypass",
        "torch._functorch._aot_autograd.autograd_cache:BypassAOTAutogradCache",
        purpose=CACHE,
        seen=CACHED,
    ),
    Contract(
        "aot_cache_config",
        "torch._functorch.config",
        ("bundled_autograd_cache", "force_non_lazy_backward_lowering"),
        purpose=CACHE,
        seen=CACHED,
    ),
    Contract(
        "GraphPickler",
        "torch.fx._graph_pickler:GraphPickler",
        ("dumps", "loads"),
        purpose=CACHE,
        seen=CACHED,
    ),
    Contract(
        "GraphPicklerOptions",
        "torch.fx._graph_pickler:Options",
        parameters=("ops_filter", "node_metadata_key_filter"),
        purpose=CACHE,
        seen=CACHED,
    ),
)
