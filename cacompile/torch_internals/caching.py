"""How torch keeps what it has compiled, as far as we take part in it: entries are torch's, and torch reads them."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import pickle
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from .contracts import CACHE
from .lookup import broken_contracts, resolve

KEY = "_convaware_key"
"""Attribute of Dynamo's graph; its attributes are part of the key of AOTAutograd's cache, and passes are not."""

CAN_COMPILE_ASIDE = torch.__version__ >= "2.12"
"""Whether a thread may have settings of Inductor of its own; in torch 2.11 they are the process's."""

_LEFT_OUT = ("from_node", "source_fn_stack", "nn_module_stack", "fwd_source_fn_stack", "stack_trace")
"""Entries of `node.meta` that nothing after AOTAutograd needs to compile."""


def caches_are_on() -> bool:
    """Whether AOTAutograd's cache is on, as by default, and entries of ours are read where they are written."""
    return bool(
        resolve("functorch_config").enable_autograd_cache
        and resolve("inductor_config").fx_graph_cache
        and not torch.compiler.config.force_disable_caches
        # loads backwards without asking the backend
        and not getattr(resolve("dynamo_config"), "caching_precompile", False)
        and not broken_contracts(CACHE)
    )


def add_to_key(gm: fx.GraphModule, key: str) -> None:
    """Make the entry of this graph of Dynamo's in AOTAutograd's cache one for `key` only."""
    setattr(gm, KEY, key)


@contextlib.contextmanager
def entries_hold_code() -> Iterator[None]:
    """AOTAutograd's entries hold whatever OutputCode the compiler returns, not keys of Inductor's cache."""
    # an entry is saved with its backward: at once, for this is over when a backward would be compiled lazily
    with resolve("functorch_config").patch(bundled_autograd_cache=True, force_non_lazy_backward_lowering=True):
        yield


def in_own_cache(compile_inner: Callable[..., Any]) -> Callable[..., Any]:
    """Inductor's last step, with Inductor's own cache on, which it leaves where AOTAutograd's entries hold code."""

    def compile_graph(gm: fx.GraphModule, inputs: Sequence[Any], **settings: Any) -> Any:
        with resolve("functorch_config").patch(bundled_autograd_cache=False):
            return compile_inner(gm, inputs, **settings)

    return compile_graph


def storable(code: Any) -> Any:
    """A copy of Inductor's code without what lives in one process only. Raises TypeError for what is no such code."""
    if not isinstance(code, resolve("StorableFxGraph")):
        raise TypeError("Inductor made no code of it")
    copied = copy.copy(code)
    copied.prepare_for_serialization()
    return copied


def key_of(code: Any) -> tuple[str, Any] | None:
    """Under what Inductor's own cache holds code, and the guards on its sizes; None for what it does not hold."""
    key = getattr(code, "_fx_graph_cache_key", None)
    return None if key is None else (key, code.guards_expr)


def load_code(code: Any, inputs: Sequence[Any], settings: Mapping[str, Any]) -> Any:
    """Bring code that was read from a cache to life. Raises RuntimeError where torch cannot."""
    constants = resolve("CompiledFxGraphConstants")()
    loaded, _ = resolve("FxGraphCache").cache_hit_post_compile(code, {}, constants)
    if loaded is None:
        raise RuntimeError("the code of a cached graph is gone")
    loaded.post_compile(inputs, constants, settings)
    return loaded


def find_code(key: str, settings: Mapping[str, Any]) -> Any:
    """Code that was saved under a key of ours in Inductor's cache, brought to life; None on a miss."""
    constants = resolve("CompiledFxGraphConstants")()
    with resolve("tracing")(resolve("TracingContext")(_fake_mode())):
        found, _ = resolve("FxGraphCache").load_with_key(key, [], [], True, None, True, constants, lambda *_: True)
        if found is not None:
            found.post_compile([], constants, {"is_backward": False, **settings})  # not said of a forward
    return found


def save_code(key: str, code: Any) -> None:
    """Save code in Inductor's cache, under a key of ours. Where that fails, torch logs it."""
    with resolve("tracing")(resolve("TracingContext")(_fake_mode())):
        resolve("FxGraphCache")._save_graph(key, code, [], True, None)


def config_digest() -> str:
    """Inductor's whole configuration as it is now."""
    portable = resolve("inductor_config").save_config_portable(ignore_private_configs=False)
    return hashlib.sha256(pickle.dumps(sorted(portable.items()))).hexdigest()


def pickle_graph(found: Any) -> bytes:
    """Graphs, and fake tensors and sizes that belong to them."""
    options = resolve("GraphPicklerOptions")(ops_filter=None, node_metadata_key_filter=lambda key: key not in _LEFT_OUT)
    return resolve("GraphPickler").dumps(found, options)


def unpickle_graph(content: bytes) -> tuple[Any, Any]:
    """What `pickle_graph` was given, and the fake mode that its tensors are of. Only for what torch itself has read."""
    mode = _fake_mode()
    return resolve("GraphPickler").loads(content, mode), mode


def late_context(mode: Any, donated: list[int] | None) -> Any:
    """The surroundings of a forward that was compiled in another process. donated: inputs that a backward may write."""
    context = resolve("TracingContext")(mode)
    context.fw_metadata = types.SimpleNamespace(bw_donated_idxs=donated, static_input_indices=[])
    return context


def _fake_mode() -> Any:
    return resolve("FakeTensorMode")(allow_non_fake_inputs=True, shape_env=resolve("ShapeEnv")())
