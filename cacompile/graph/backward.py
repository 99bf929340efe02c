"""One backward graph, compiled in versions; which one runs is decided each time by the mask of its module."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from cacompile.layout import MaskLayout
from cacompile.passes.marks import MARK
from cacompile.passes.plan import Plan, without_nodes
from cacompile.state.binding import GraphBinding
from cacompile.torch_internals import (
    TracingContext,
    boxed,
    compile_lock,
    donated_inputs,
    donating,
    is_profiling,
)

from .aside import Aside
from .facts import BackwardFacts
from .fallback import warn_of_fault
from .handle import erase_handle, without, without_input
from .inner import Compile
from .lean import Cut
from .log import CompileLog, profiled
from .masked import MaskedMaker
from .places import GradPlaces
from .reading import is_read
from .source import BackwardSource, StoredSource, identity_of, plain_settings
from .truncated import TruncatedVersions
from .version import Choice, Run, Version
from .version_cache import VersionCache

log = logging.getLogger(__name__)


class BackwardVersions:
    """The callable that AOTAutograd gets for a backward graph.

    dense:  the graph as it came, without our handle: Inductor's own. Runs whenever all groups are on.
    masked: products replaced by masked ones, with one more input, the flags. Compiled the first time a group is off.
            On a GPU the flags come twice, so that the host may choose how to compute; under CUDA graphs it may not.
    truncated: either, without what only frozen parameters need; compiled for each set of them, see `truncated`.
    """

    # torch's wrappers copy an instance's __dict__, and would go on holding what is released here
    __slots__ = (
        "__dict__",
        "__weakref__",
        "_aside",
        "_dense",
        "_find_binding",
        "_find_cut",
        "_handle",
        "_identity",
        "_layout",
        "_log",
        "_maker",
        "_masked",
        "_on_masked",
        "_places",
        "_plan",
        "_source",
        "host",
        "slot",
        "truncated",
    )

    def __init__(
        self,
        gm: fx.GraphModule,
        inputs: Sequence[Any],
        settings: dict[str, Any],
        *,
        handle: int,
        plan: Plan,
        layout: MaskLayout,
        compile_inner: Compile,
        on_masked: Callable[[Plan], MaskLayout],
        find_binding: Callable[[Any], GraphBinding | None],
        compile_log: CompileLog,
        max_truncated: int = 0,
        find_cut: Callable[[Any], Cut | None] = lambda handle: None,
        aside: Aside | None = None,
        cache: Callable[[str], VersionCache] | None = None,
    ) -> None:
        """aside: where later versions are compiled, if no step is to wait for them.

        cache: where they are kept, given a hash of what they are made of; None: nowhere.
        """
        self._find_cut = find_cut
        self._aside = aside
        self._handle = handle
        self.slot = erase_handle(gm, handle)
        inputs = [value for i, value in enumerate(inputs) if i != handle]
        settings = without_input(settings, handle)
        context = TracingContext.try_get()
        donated = donated_inputs(context)
        donated = None if donated is None else without(donated, handle)
        source = BackwardSource(
            gm, inputs, settings, donated=donated, compile_inner=compile_inner, compile_log=compile_log
        )
        self._places = GradPlaces.of_graph(gm.graph)
        device = next((g.param.placeholder.meta["val"].device for g in plan.grads), torch.device("cpu"))
        self._prepare(source, MaskedMaker(source, plan, device), layout, on_masked, find_binding, max_truncated)
        compile_log.version("dense")
        with donating(context, donated):
            self._dense = Version(compile_inner(gm, inputs, **settings))
        marks = [(node.name, mark) for node in source.module.graph.nodes if (mark := node.meta.get(MARK))]
        self._keep_versions(cache, identity_of(source, self._dense.run, marks, layout) if cache is not None else None)

    @classmethod
    def load(
        cls,
        facts: BackwardFacts,
        dense: Run,
        settings: dict[str, Any],
        *,
        compile_inner: Compile,
        on_masked: Callable[[Plan], MaskLayout],
        find_binding: Callable[[Any], GraphBinding | None],
        compile_log: CompileLog,
        max_truncated: int,
        find_cut: Callable[[Any], Cut | None],
        aside: Aside | None,
        cache: Callable[[str], VersionCache],
    ) -> BackwardVersions:
        """Those of a backward that another process has traced. dense: the dense version, which that has compiled."""
        self = cls.__new__(cls)
        self._find_cut = find_cut
        self._aside = aside
        self._handle, self.slot = facts.handle, facts.slot
        self._places = GradPlaces(facts.places, facts.deepest)
        source = StoredSource(
            facts.source, settings, donated=facts.donated, compile_inner=compile_inner, compile_log=compile_log
        )
        maker = MaskedMaker(source, facts.plan, torch.device(facts.device))
        self._prepare(source, maker, facts.layout, on_masked, find_binding, max_truncated)
        self._dense = Version(dense)
        self._keep_versions(cache, facts.versions)
        return self

    def _prepare(
        self,
        source: BackwardSource,
        maker: MaskedMaker,
        layout: MaskLayout,
        on_masked: Callable[[Plan], MaskLayout],
        find_binding: Callable[[Any], GraphBinding | None],
        max_truncated: int,
    ) -> None:
        self._source = source
        self._layout = layout
        self._on_masked = on_masked
        self._find_binding = find_binding
        self._log = source.log
        self._plan = maker.plan
        self.truncated = TruncatedVersions(source, max_truncated, maker.device) if max_truncated else None
        self._maker: MaskedMaker | None = maker
        self.host = maker.wants_host
        """Whether the masked version takes, or would take, the flags in CPU memory too."""
        self._masked: Version | None = None
        # in __dict__, because wrappers copy it from there
        boxed(self)

    def _keep_versions(self, cache: Callable[[str], VersionCache] | None, identity: str | None) -> None:
        self._identity = identity
        self._source.cache = cache(identity) if cache is not None and identity is not None else None

    def stored(self) -> tuple[BackwardFacts, Any]:
        """What another process needs in order to go on from here, and the dense version's code.

        Raises ValueError where Inductor itself does not cache it, and whatever pickling the graph raises.
        """
        if self._identity is None or self._maker is None:
            raise ValueError("Inductor does not cache it")
        facts = BackwardFacts(
            handle=self._handle,
            slot=self.slot,
            plan=without_nodes(self._plan),
            layout=self._layout,
            places=self._places.by_position,
            deepest=self._places.deepest,
            device=str(self._maker.device),
            donated=self._source.donated,
            settings=plain_settings(self._source.settings),
            source=self._source.stored(),
            versions=self._identity,
        )
        return facts, self._dense.run

    def __call__(self, args: list[Any]) -> list[Any]:
        handle = args.pop(self._handle)
        version, flags, none, zeros = self._choose(handle, args)
        if is_profiling():
            with profiled(self._layout, version.name, version.masked, flags):
                grads = list(version.run(args))
        else:
            grads = list(version.run(args))
        for place in none:
            grads[place] = None
        for place, param in zeros:
            grads[place] = torch.zeros_like(param)
        if self.slot is not None:
            grads.insert(self.slot, None)
        return grads

    def _choose(self, handle: Any, args: list[Any]) -> Choice:
        """The version to run, whose flags are added to `args`; dense, or that of its cut, where anything fails."""
        count, cut = len(args), self._find_cut(handle)
        whole = self._dense if cut is None or self.truncated is None else self.truncated.again(cut.places)
        try:
            binding = self._find_binding(handle)
            if binding is not None:
                sizes = self._layout.sizes_in(args)
                binding.count_backward(sizes)
                if (binding.wants_masked() or binding.frozen) and is_read(binding.live_inputs()):
                    self._places.count_cut(binding, sizes, whole.truncated)
                    return Choice(whole)
                masked = self._ready_masked(binding) if binding.wants_masked() else None
                none = self._places.none(binding, handle) | whole.truncated
                zeros = self._places.zeros(binding, none, self.truncated) if masked is not None else ()
                version = masked or whole
                places = none | {place for place, _ in zeros}
                if places and self.truncated is not None:
                    self.truncated.tick()
                    found = self.truncated.find(
                        places, self._plan if masked is not None else None, self.aside_for(binding)
                    )
                    version = found or version
                if not version.unread >= whole.unread:
                    masked, version = None, whole
                if binding.ran != (name := version.name):
                    binding.ran = name
                    self._log.switched(name)
                zeros = tuple(each for each in zeros if each[0] in version.truncated)
                zeros += self._places.waited_for(binding, handle) if none else ()
                flags = None
                if masked is not None:
                    on_device = binding.leave_out(sizes)
                self._places.count_cut(binding, sizes, none & version.truncated)
                if version.masked:
                    args += [on_device, binding.host_flags] if version.host else [on_device]
                    flags = binding.host_flags.numpy()
                return Choice(version, flags, none, zeros)
        except Exception:
            del args[count:]
            warn_of_fault(log, "choosing the version of a backward", "this backward computes all weight gradients")
        return Choice(whole)

    def truncated_version(self, binding: GraphBinding, dead: frozenset[int]) -> Version | None:
        """The version for what is frozen now and these inputs, by position, before any mask; None for the dense one."""
        places = self._places.of((*binding.frozen, *dead))
        if not places or self.truncated is None:
            return None
        return self.truncated.find(places, None, self.aside_for(binding))

    def aside_for(self, binding: GraphBinding) -> Aside | None:
        """Where versions for these parameters are compiled; None where their step waits.

        Ranks that hold copies must do alike, and threads are not as fast on all of them.
        """
        return self._aside if binding.alone else None

    def _ready_masked(self, binding: GraphBinding) -> Version | None:
        """The masked version; None too while it is being compiled aside."""
        aside = self.aside_for(binding)
        if aside is None or self._maker is None:
            return self.masked_version()
        aside.start("masked", self.masked_version)
        return None

    def masked_version(self) -> Version | None:
        """The masked version, compiled when first asked for; None if nothing of this graph can be masked."""
        if self._maker is not None:
            with compile_lock:  # one thread makes it, the others wait; no lock of our own, which could cross with this
                if self._maker is not None:
                    try:
                        plan, self._masked = self._maker.make()
                        self._layout = self._on_masked(plan)
                    finally:
                        self._maker = None  # and all that only it has held
                        if self.truncated is None:
                            self._source.release()
        return self._masked

    @property
    def graph(self) -> fx.Graph:
        """The backward graph as it came, without our handle and the tensors of its constants: to be looked at."""
        return copy.deepcopy(self._source.module.graph)
