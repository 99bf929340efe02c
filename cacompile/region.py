"""One compiled graph: its plan, the hooks it gives the inner compiler, and the module instances that run through it."""

from __future__ import annotations

import copy
import functools
import logging
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import fx
from torch._dynamo.utils import counters
from torch._functorch import config as functorch_config
from torch._logging import warning_once
from torch._subclasses import FakeTensor

from .config import Config
from .inner import Compile, Inner, inner_of
from .joint import GraphInputs, find_frozen, find_handle, find_params, save_handle, with_handle
from .passes import make_plan, mark_products
from .plan import Plan
from .runtime.instance import Instance
from .runtime.stepping import follow_optimizers
from .trail import Trail
from .versions import BackwardVersions, compile_without_handle

log = logging.getLogger(__name__)

_alive: weakref.WeakSet[Region] = weakref.WeakSet()


def regions() -> Iterator[Region]:
    """All graphs that are compiled, whichever model they are of."""
    yield from list(_alive)


def compile_region(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    config: Config,
    patches: dict[str, Any],
    *,
    compile_inner: Compile | None = None,
) -> tuple[Region, Callable[..., Any]]:
    """Compile one of Dynamo's graphs through the whole pipeline of the inner compiler, with our two hooks in it.

    patches: of Inductor's configuration; compile_inner: for those who only look, what turns a finished graph into a
    callable in place of the inner compiler's own last step.
    Returns the region, and the compiled callable, which takes one more input than the graph: the handle.
    """
    inner = inner_of(config, patches, compile_inner)
    region = Region(GraphInputs.of(gm, example_inputs), config, inner, Trail(quiet=compile_inner is not None))
    graph, handle = with_handle(gm, example_inputs)
    theirs = functorch_config.joint_custom_pass

    def joint_pass(joint: fx.GraphModule, joint_inputs: Any) -> fx.GraphModule:
        return region.joint_pass(theirs(joint, joint_inputs) if callable(theirs) else joint, joint_inputs)

    # on a hit in AOTAutograd's cache none of our hooks would run, and what they return cannot be pickled;
    # Inductor's own cache still serves each version
    with functorch_config.patch(joint_custom_pass=joint_pass, enable_autograd_cache=False):
        compiled = inner.pipeline(graph, [*example_inputs, handle], region.inner_compile)
    return region, compiled


def _look_for_compiled_autograd() -> None:
    """For an instance that has run forward before, but never backward through us: say why, if that is why."""
    if counters["compiled_autograd"]["captures"]:
        warning_once(
            log,
            "compiled autograd traces the backward into a graph of its own, where nothing can be skipped: "
            "all weight gradients stay dense. Train without compiled autograd to skip those that have converged",
        )


class Region:
    """Watches one graph being compiled (`joint_pass`, `inner_compile`), then runs it (`bind`)."""

    def __init__(self, inputs: GraphInputs, config: Config, inner: Inner, trail: Trail) -> None:
        self.inputs = inputs
        self.config = config
        self.plan = Plan()
        self.forward: fx.Graph | None = None
        """As Inductor got it, which edits what it gets."""
        self.backward: BackwardVersions | None = None
        self.instances: dict[tuple[int, ...], Instance] = {}
        self._inner = inner
        self._trail = trail
        _alive.add(self)

    def joint_pass(self, gm: fx.GraphModule, joint_inputs: Any) -> fx.GraphModule:
        """Hook 1, on the joint graph before the partitioner: find the weight gradients, have the handle saved."""
        try:
            plan = make_plan(
                find_params(gm.graph, self.inputs),
                block_rows=self.config.block_rows,
                graphs=self._inner.captured(),
                frozen=find_frozen(gm.graph, self.inputs),
            )
            if plan.grads:
                mark_products(plan)
                save_handle(gm, self.inputs)
        except Exception:
            log.warning("the joint graph could not be analysed, so this graph stays dense", exc_info=True)
            return gm
        self._trail.planned(plan)
        self.plan = plan
        return gm

    def inner_compile(self, gm: fx.GraphModule, inputs: Sequence[Any], **settings: Any) -> Any:
        """Hook 2, instead of the inner compiler's last step, for the forward, the backward or an inference graph."""
        handle = find_handle(gm.graph, self.inputs)
        if handle is None:
            return self._inner.compile(gm, inputs, **settings)
        if not settings.get("is_backward", False):
            self.forward = copy.deepcopy(gm.graph)
            return compile_without_handle(gm, inputs, settings, handle=handle, compile_inner=self._inner.compile)
        self.backward = BackwardVersions(
            gm,
            inputs,
            settings,
            handle=handle,
            plan=self.plan,
            compile_inner=self._inner.compile,
            on_guarded=self._take_over,
            trail=self._trail,
        )
        return self.backward

    def _take_over(self, plan: Plan) -> None:
        """The guarded version was made: the plan now says what it really masks."""
        self.plan = plan
        for instance in self.instances.values():
            instance.plan = plan

    def bind(self, compiled: Callable[..., Any]) -> Callable[..., Any]:
        """The callable for Dynamo: adds the handle of the instance whose parameters it is called with."""
        positions = [grad.param.index for grad in self.plan.grads]
        instances = self.instances

        def run(*args: Any) -> Any:
            instance = instances.get(tuple([id(args[i]) for i in positions]))
            if instance is None:
                instance = self._instance(args, positions)
            elif not instance.spent.total:
                _look_for_compiled_autograd()
            return compiled(*args, instance.handle if type(instance) is Instance else instance)

        return run

    def _instance(self, args: Sequence[Any], positions: list[int]) -> Instance | torch.Tensor:
        """The new instance for these inputs; for traced inputs only a handle that leads nowhere."""
        fake = next((arg for arg in args if isinstance(arg, FakeTensor)), None)
        if fake is not None:
            with fake.fake_mode:
                return torch.tensor(0, device="cpu")
        follow_optimizers()
        key = tuple(id(args[i]) for i in positions)
        instance = self.instances[key] = Instance(self.plan, args, self.config)
        forget = functools.partial(_forget, weakref.ref(self), key)
        for i in positions:
            weakref.finalize(args[i], forget).atexit = False
        return instance


def _forget(region: weakref.ref[Region], key: tuple[int, ...]) -> None:
    """A parameter has died, and its id may be given to another."""
    if (alive := region()) is not None:
        alive.instances.pop(key, None)
