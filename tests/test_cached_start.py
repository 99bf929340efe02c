"""A start from torch's caches: nothing is traced or compiled again, and all is as it was, to the last bit."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import OPTIONS, Block, Step, assert_bits, assert_same, compile_all, pin_mixed, square_mean, train_step
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._functorch import config as functorch_config
from torch._functorch._aot_autograd import autograd_cache
from torch._inductor import codecache

import cacompile
from cacompile import torch_internals
from cacompile.config import Config
from cacompile.errors import ConvAwareError
from cacompile.explanation.graphs import mark_of
from cacompile.explanation.look import running
from cacompile.graph import cache_key, truncated

pytestmark = pytest.mark.skipif(
    bool(torch_internals.broken_contracts(torch_internals.CACHE)), reason="this torch cannot: `doctor` says why"
)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """No graphs in the caches, and AOTAutograd's turned on. Compiled C++ is found by its text, wherever it is from."""
    for place, kind in ((codecache.FxGraphCache, "fxgraph"), (autograd_cache.AOTAutogradCache, "aotautograd")):
        monkeypatch.setattr(place, "_get_tmp_dir", staticmethod(lambda kind=kind: str(tmp_path / kind)))
    codecache.PyCodeCache.cache_clear()
    with functorch_config.patch(enable_autograd_cache=True):
        yield tmp_path


@dataclasses.dataclass
class Run:
    """What one start gave."""

    steps: list[Step]
    status: str
    explained: dict[str, Any]
    layouts: list[Any]
    torchs: dict[str, int]
    """torch's counters: of AOTAutograd's cache, and of Inductor's."""
    ours: dict[str, int]

    @property
    def compiled(self) -> dict[str, int]:
        return {name: count for name, count in self.ours.items() if name.startswith("versions compiled")}


class Deep(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def start(
    make: Callable[[], nn.Module] = Deep,
    inputs: Sequence[Any] | Callable[[int], Sequence[Any]] = (),
    masked: bool = True,
    frozen: str = "",
    **settings: Any,
) -> Run:
    """Train a fresh model from a fresh Dynamo: dense, then with a mask, then with something frozen."""
    torch._dynamo.reset()
    counters.clear()
    torch.manual_seed(0)
    model = make()
    run = settings.pop("compile_it", compile_all)(model, "convaware", **settings)
    generator = torch.Generator().manual_seed(1)
    at = inputs if callable(inputs) else lambda _: inputs or [torch.randn(8, 32, generator=generator)]
    steps = [train_step((model, run), at(i)) for i in range(2)]
    session = cacompile.session(model)
    if masked:
        pin_mixed(session)
        steps += [train_step((model, run), at(2)), train_step((model, run), at(3))]
    if frozen:
        session.freeze(frozen)
        steps.append(train_step((model, run), at(4)))
    torchs = {**counters["aot_autograd"], **{k: v for k, v in counters["inductor"].items() if "fxgraph" in k}}
    explained = cacompile.explain(model).to_dict()
    layouts = [run.graph.layout for run in running(model.parameters()) if run.graph is not None]
    return Run(steps, str(cacompile.status(model)), explained, layouts, torchs, dict(counters["cacompile"]))


def assert_equal(warm: Run, cold: Run) -> None:
    assert len(warm.steps) == len(cold.steps)
    for ours, theirs in zip(warm.steps, cold.steps):
        assert_same(ours, theirs)
    assert warm.status == cold.status
    assert warm.layouts == cold.layouts
    assert warm.explained == cold.explained


def assert_hit(warm: Run, graphs: int = 1) -> None:
    assert warm.torchs.get("autograd_cache_hit") == graphs
    assert not warm.torchs.get("autograd_cache_miss") and not warm.torchs.get("autograd_cache_bypass")
    assert warm.ours["graphs found in the cache"] == warm.ours["graphs"] == graphs


def found_in(warm: Run) -> dict[str, int]:
    """Kind of version -> how many of it were found in the cache."""
    words = "versions found: "
    return {name.removeprefix(words): count for name, count in warm.ours.items() if name.startswith(words)}


def entries(cache: Path, kind: str) -> list[Path]:
    return [path for path in (cache / kind).rglob("*") if path.is_file()]


def test_a_second_start_compiles_nothing(cache: Path) -> None:
    cold = start(frozen="blocks.0")
    assert cold.torchs["autograd_cache_saved"] == 1
    # of a lean forward the truncated backward is made both unmasked, for what it reads, and masked
    made = {"dense": 1, "masked": 1, "truncated": 2, "lean forward": 1}
    assert cold.compiled == {f"versions compiled: {name}": count for name, count in made.items()}
    warm = start(frozen="blocks.0")
    assert_hit(warm)
    assert not warm.compiled and not warm.torchs.get("fxgraph_cache_miss")
    assert found_in(warm) == {"masked": 1, "truncated": 2, "lean forward": 1}
    assert_equal(warm, cold)


def test_it_is_as_without_a_cache() -> None:
    start()
    warm = start()
    assert_hit(warm)
    with functorch_config.patch(enable_autograd_cache=False):
        without = start()
    assert "graphs found in the cache" not in without.ours
    assert_equal(warm, without)


def test_versions_that_nobody_has_made_are_made_of_what_was_stored() -> None:
    start(masked=False)
    late = start(frozen="blocks.0")
    assert_hit(late)
    made = {"masked": 1, "truncated": 2, "lean forward": 1}
    assert late.compiled == {f"versions compiled: {name}": count for name, count in made.items()}
    with functorch_config.patch(enable_autograd_cache=False):
        assert_equal(late, start(frozen="blocks.0"))
    again = start(frozen="blocks.0")
    assert not again.compiled
    assert_equal(again, late)


def saved_bytes(model: nn.Module, run: Callable[[Tensor], Tensor], x: Tensor) -> int:
    """Of what a forward saves, but for parameters and inputs."""
    own = {p.untyped_storage().data_ptr() for p in (*model.parameters(), x)}
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if (at := tensor.untyped_storage().data_ptr()) not in own:
            storages[at] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = run(x)
    del loss
    return sum(storages.values())


@pytest.mark.parametrize("late", [False, True], ids=["found", "made of what was stored"])
@pytest.mark.parametrize("sizes", ["static", "dynamic"])
def test_forwards_are_lean_after_a_cached_start(sizes: str, late: bool) -> None:
    """Frozen from the start in the process that fills the cache, or never there; later in the other."""
    x = torch.randn(8, 32, generator=torch.Generator().manual_seed(1))
    saved, frozen, thawed = [], [], []
    for first in (True, False):
        torch._dynamo.reset()
        counters.clear()
        torch.manual_seed(0)
        model = Deep()
        freeze_first = first and not late
        options = {"frozen": ["blocks.0"] if freeze_first else []}
        run = compile_all(model, "convaware", options=options, dynamic=sizes == "dynamic")
        before = train_step((model, run), [x])
        session = cacompile.session(model)
        whole = saved_bytes(model, run, x) if not freeze_first else None
        if first and late:
            continue
        session.freeze("blocks.0")
        frozen.append(train_step((model, run), [x]))
        saved.append(saved_bytes(model, run, x))
        assert whole is None or saved[-1] < whole
        if freeze_first:
            assert_same(before, frozen[0])
        session.thaw()
        thawed.append(train_step((model, run), [x]))
        assert whole is None or saved_bytes(model, run, x) == whole
        made, found = (counters["cacompile"][f"versions {how}: lean forward"] for how in ("compiled", "found"))
        assert (made, found) == ((1, 0) if first or late else (0, 1))
        assert counters["cacompile"]["graphs found in the cache"] == (not first)
    assert frozen[-1].grads["blocks.0.up.weight"] is None
    with functorch_config.patch(enable_autograd_cache=False):
        torch._dynamo.reset()
        torch.manual_seed(0)
        theirs = Deep()
        plain = compile_all(theirs, "inductor")
        dense = train_step((theirs, plain), [x])
        theirs.blocks[0].requires_grad_(False)
        cut = train_step((theirs, plain), [x])
        saved.append(saved_bytes(theirs, plain, x))
    assert len({*saved}) == 1, "as with requires_grad=False"
    for ours in frozen:
        assert_same(ours, cut)
    for ours in (before, *thawed):
        assert_same(ours, dense)


def test_versions_outlive_their_entry(cache: Path) -> None:
    cold = start(masked=False, frozen="blocks.0")
    for path in entries(cache, "aotautograd"):
        path.unlink()
    warm = start(masked=False, frozen="blocks.0")
    assert found_in(warm) == {"truncated": 1, "lean forward": 1}
    assert warm.compiled == {"versions compiled: dense": 1}
    assert_equal(warm, cold)


class Chain(nn.Module):
    """Layers of which each set of the lowest that are frozen is a cut of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(32, 32) for _ in range(5))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.relu(layer(x))
        return x


def test_more_sets_than_are_held_are_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """As LISA draws them: what has gone out of memory comes back from the disk, for a forward that is open as well."""
    monkeypatch.setattr(truncated, "EARNED", 4)
    model, x = Chain(), torch.randn(8, 32)
    run = compile_all(model, "convaware", options={"max_truncated": 2})
    dense = train_step((model, run), [x])
    session = cacompile.session(model)
    sets = [[f"layers.{i}" for i in range(n)] for n in (2, 3, 4)]
    (graph,) = [run.graph for run in running(model.parameters()) if run.graph is not None]

    def held() -> list[int]:
        backward, lean = graph.backward and graph.backward.truncated, graph._cuts.lean
        assert backward is not None and lean is not None
        return [sum(one is not None for one in each._made.values()) for each in (backward, lean)]

    def check() -> None:
        for name, grad in dense.grads.items():
            frozen = session.params[name].is_frozen
            assert_bits(model.get_parameter(name).grad, None if frozen else grad, name)

    def visit(names: list[str]) -> int:
        """Bytes that are saved with these frozen."""
        session.thaw()
        session.freeze(*names)
        train_step((model, run), [x])
        check()
        return saved_bytes(model, run, x)

    saved = [[visit(names) for names in sets] for _ in range(8)]
    own = saved[-1]
    assert own[0] > own[1] > own[2], "each has a version of its own in the end"
    assert saved[0] == [own[0], own[1], own[1]], "the nearest one has served before"
    compiled = {name: counters["cacompile"][f"versions compiled: {name}"] for name in ("truncated", "lean forward")}
    assert compiled == {"truncated": 3, "lean forward": 3}
    assert held() == [2, 2]
    before = counters["cacompile"]["versions found: truncated"]
    assert before and [visit(names) for names in sets * 2] == own * 2
    assert counters["cacompile"]["versions found: truncated"] > before

    visit(sets[0])
    model.zero_grad(set_to_none=True)
    loss = square_mean(run(x))
    for names in sets[1:]:
        session.thaw()
        session.freeze(*names)
        square_mean(run(x)).backward()
        assert held() == [2, 2]
    session.thaw()
    session.freeze(*sets[0])
    model.zero_grad(set_to_none=True)
    loss.backward()
    check()
    now = {name: counters["cacompile"][f"versions compiled: {name}"] for name in compiled}
    assert now == compiled, "nothing is compiled twice"


def test_graphs_of_a_cached_start_can_be_looked_at() -> None:
    torch._dynamo.reset()
    start()
    torch.manual_seed(0)
    torch._dynamo.reset()
    model, x = Deep(), torch.randn(8, 32)
    run = compile_all(model, "convaware")
    run(x).sum().backward()
    assert counters["cacompile"]["graphs found in the cache"]
    found = cacompile.explain(model)
    (graphs,) = found.traced
    for version in ("backward", "masked"):
        assert "blocks.0.up.weight" in {
            mark.param for node in graphs.version("backward").nodes if (mark := mark_of(node))
        }
        assert graphs.version(version).nodes
    for version in ("joint", "forward"):
        with pytest.raises(ConvAwareError, match=r"found in torch's cache.*example inputs"):
            graphs.version(version)
    (traced,) = cacompile.explain(model, x).traced
    assert traced.version("joint").nodes and traced.version("forward").nodes


class Renamed(Deep):
    def __init__(self) -> None:
        super().__init__()
        self.others = self.blocks
        del self.blocks

    def forward(self, x: Tensor) -> Tensor:
        for block in self.others:
            x = block(x)
        return x


class Frozen(Deep):
    def __init__(self) -> None:
        super().__init__()
        self.blocks[0].up.weight.requires_grad_(False)


@pytest.mark.parametrize(
    ("make", "settings"),
    [(Renamed, {}), (Frozen, {}), (Deep, {"options": {"block_rows": 32}}), (Deep, {"options": {"max_fusion_size": 3}})],
    ids=["names", "what is trained", "block_rows", "inductor"],
)
def test_what_the_graph_depends_on_is_in_the_key(make: Callable[[], nn.Module], settings: dict[str, Any]) -> None:
    start(masked=False)
    other = start(make, masked=False, **settings)
    assert not other.torchs.get("autograd_cache_hit") and other.torchs["autograd_cache_miss"] == 1


def test_our_sources_are_in_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    start(masked=False)
    monkeypatch.setattr(cache_key, "package_key", lambda: "another version")
    assert start(masked=False).torchs["autograd_cache_miss"] == 1


def test_options_of_training_are_not() -> None:
    cold = start(options={"max_truncated": 8}, frozen="blocks.0")
    warm = start(options={"max_truncated": 0, "tolerance": 0.5, "seed": 7}, frozen="blocks.0")
    assert_hit(warm)
    assert "versions found: truncated" not in warm.ours, "the option that counts is the one of today"
    for ours, theirs in zip(warm.steps[:2], cold.steps):
        assert_same(ours, theirs)


def test_what_is_stored_is_for_all_options() -> None:
    """Of a process that cuts nothing, for one that does."""
    start(options={"max_truncated": 0}, frozen="blocks.0")
    warm = start(frozen="blocks.0")
    assert_hit(warm)
    made = {"truncated": 2, "lean forward": 1}
    assert warm.compiled == {f"versions compiled: {name}": count for name, count in made.items()}
    with functorch_config.patch(enable_autograd_cache=False):
        assert_equal(warm, start(frozen="blocks.0"))


def test_every_option_is_of_one_kind() -> None:
    """A new option must be looked at: does it decide what is compiled?"""
    training = {
        "tolerance",
        "budget",
        "max_skip",
        "warmup_steps",
        "monitor_every",
        "max_age",
        "estimate",
        "keep",
        "frozen",
    }
    assert {*cache_key.READ} | training | {"max_truncated", "switch", "seed", "inner"} == {*Config.__dataclass_fields__}


@pytest.mark.parametrize("uuid", [None, "one"])
def test_passes_of_the_users_need_a_uuid(uuid: str | None) -> None:
    def joint_pass(gm: Any, inputs: Any) -> Any:
        return gm

    if uuid is not None:
        joint_pass.uuid = lambda: uuid  # type: ignore[attr-defined]
    with functorch_config.patch(joint_custom_pass=joint_pass):
        cold, warm = start(), start()
    assert bool(warm.torchs.get("autograd_cache_hit")) == (uuid is not None)
    assert_equal(warm, cold)


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "cut off": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "empty": lambda path: path.write_bytes(b""),
    "foreign": lambda path: path.write_bytes(b"\x80\x04K\x01."),  # pickle's own, of an int
    "gone": Path.unlink,
}


@pytest.mark.thin(2)
@pytest.mark.parametrize("kind", ["aotautograd", "fxgraph"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_entry_is_a_miss(cache: Path, kind: str, damage: str) -> None:
    if (kind, damage, torch_internals.release()) == ("fxgraph", "foreign", "2.11"):
        pytest.skip("Inductor's own cache raises there, for plain Inductor as for us, who stay dense")
    cold = start()
    found = entries(cache, kind)
    assert found
    for path in found:
        DAMAGE[damage](path)
    warm = start()
    assert bool(warm.torchs.get("autograd_cache_hit")) == (kind == "fxgraph")
    assert bool(warm.compiled)
    assert_equal(warm, cold)


def test_a_disk_that_is_full(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    for place in (codecache.FxGraphCache, autograd_cache.AOTAutogradCache):
        monkeypatch.setattr(place, "_write_to_local_cache", staticmethod(full))
    cold, again = start(), start()
    assert not entries(cache, "aotautograd") and again.compiled
    assert_equal(again, cold)


class Sizes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = Block()

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x) * x.shape[0]


def _sized(step: int) -> list[Tensor]:
    return [torch.randn(8 + 3 * step, 32, generator=torch.Generator().manual_seed(step))]


def _marked(model: nn.Module, backend: str, **settings: Any) -> Callable[[Tensor], Tensor]:
    run = compile_all(model, backend, **settings)

    def call(x: Tensor) -> Tensor:
        torch._dynamo.mark_dynamic(x, 0)
        return run(x)

    return call


@pytest.mark.thin(2)
@pytest.mark.parametrize("by", ["asked for", "marked", "seen"])
@pytest.mark.parametrize("late", [False, True], ids=["all", "dense only"])
def test_dynamic_sizes(late: bool, by: str) -> None:
    dynamic = {"seen": {}, "asked for": {"dynamic": True}, "marked": {"compile_it": _marked}}[by]
    graphs = 1 if dynamic else 2  # from the second size on
    first = start(Sizes, _sized, masked=not late, **dynamic)
    warm = start(Sizes, _sized, **dynamic)
    assert_hit(warm, graphs)
    assert warm.compiled == ({"versions compiled: masked": 1} if late else {})
    with functorch_config.patch(enable_autograd_cache=False):
        assert_equal(warm, start(Sizes, _sized, **dynamic))
    assert first.layouts[0].monomials == warm.layouts[0].monomials


def _regions(model: Deep, backend: str, **settings: Any) -> nn.Module:
    for block in model.blocks:
        block.compile(backend=backend, options=OPTIONS)
    return model


def test_regions() -> None:
    cold = start(compile_it=_regions)
    warm = start(compile_it=_regions)
    assert_hit(warm, 2)  # the first block's input wants no gradient
    assert not warm.compiled
    assert_equal(warm, cold)


class Breaks(Deep):
    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
            torch._dynamo.graph_break()
        return x


def test_the_handles_of_one_process_are_not_those_of_another() -> None:
    """The cold process binds one model; the warm one binds another first, so that all its numbers differ."""
    cold = start(Breaks, frozen="blocks.0")
    other = Breaks()
    train_step((other, compile_all(other, "convaware")), [torch.randn(8, 32)])
    warm = start(Breaks, frozen="blocks.0")
    assert not warm.compiled
    assert_equal(warm, cold)


def test_nothing_to_skip_and_nothing_to_do() -> None:
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(32))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.scale

    cold, warm = start(Scale, masked=False), start(Scale, masked=False)
    assert_hit(warm)
    assert_equal(warm, cold)

    class Same(Scale):
        def forward(self, x: Tensor) -> Tensor:
            return self.scale.view(4, 8)

    assert_equal(start(Same, masked=False), start(Same, masked=False))


def test_a_torch_that_cannot_leaves_it_off() -> None:
    from cacompile.doctor import examine

    with torch_internals.taken_away("GraphPickler"):
        cold, warm = start(), start()
        lines = [check for check in examine() if "GraphPickler" in check.says]
        lines += [check for check in examine() if check.name == "AOTAutograd's cache"]
    assert not warm.torchs.get("autograd_cache_hit")
    assert_equal(warm, cold)
    assert [check.state for check in lines] == ["note", "note"] and "starting from a cache" in lines[0].says
