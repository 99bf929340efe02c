"""Every private or moving part of torch that we touch, each with what we need of it and where it was seen to hold.

Other files take from here objects of torch's, by the names of `contracts`, and functions that do what needs more than
one name. Objects are looked up when they are first asked for, so that a name which has moved is a contract that does
not hold, not an import that fails: `broken_contracts` lists those before a graph is touched.
"""

from __future__ import annotations

from typing import Any

from .caching import (
    CAN_COMPILE_ASIDE,
    add_to_key,
    caches_are_on,
    config_digest,
    entries_hold_code,
    find_code,
    in_own_cache,
    key_of,
    late_context,
    load_code,
    pickle_graph,
    save_code,
    storable,
    unpickle_graph,
)
from .contracts import (
    CACHE,
    COMPILE,
    CONTRACTS,
    LOOK,
    RANKS,
    SCATTERS,
    SEE,
    SHARDS,
    STANDALONE,
    TESTED,
    TRACED,
    Contract,
)
from .distributed import (
    FullySharded,
    ShardedParam,
    follow_joins,
    fully_sharded,
    group_store,
    is_fsdp1,
    is_zero1,
    joins,
    may_be_sharded,
    running_ddp,
    steps_within_backward,
    wrap_reduce_scatters,
)
from .dynamo import (
    captured_backwards,
    compiled_function,
    copy_dynamo_graph,
    dynamo_source,
    forget_code,
    in_a_module,
    is_compiled,
    is_compiled_code,
    is_control_flow,
    may_be_compiling,
    name_input,
    source_path,
    symbolic_int,
    trace_as,
    traced_as,
    uncompiled,
)
from .graphs import (
    boxed,
    copy_graph,
    erase_output,
    expression_of,
    hint_of,
    is_boxed,
    kernel_of,
    opname,
    put_in_part_of,
    rename,
    root,
    traced_parameters,
)
from .inductor import (
    aligned_host_inputs,
    check_inductor_option,
    compiling_backward,
    donated_inputs,
    donating,
    inductor_alone,
    insert_output_stride,
    output_strides,
    reported_strides,
    wrap_compiled,
)
from .lookup import broken_contracts, imported, release, resolve, taken_away
from .tensors import (
    forward_hooks,
    has_hooks,
    is_profiling,
    is_view,
    replace_swap_tensors,
    replace_total_norm,
    storage_id,
    tensor_stores,
    writes,
)


def __getattr__(name: str) -> Any:
    return resolve(name)
