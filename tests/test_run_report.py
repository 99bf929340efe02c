"""What a run did, in every format: the numbers are the session's, and the page looks right in a real browser."""

from __future__ import annotations

import html
import io
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from browser import Browser
from helpers import Block
from matplotlib.image import imread
from torch import Tensor, nn

import cacompile
from cacompile.errors import ConvAwareError
from cacompile.pages.numbers import amount, duration
from cacompile.report.data import RunData
from cacompile.report.layers import short_names
from cacompile.sessions.session import Session

OPTIONS = {"block_rows": 16, "warmup_steps": 10, "monitor_every": 5, "tolerance": 0.3}


class Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (4, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        return x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Net(nn.Module):
    """Two layers of heads and neurons, tokens at the end, and an embedding that stays dense."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(48, 64)
        self.layers = nn.ModuleList(nn.Sequential(Attention(64), Block(64)) for _ in range(2))
        self.norm = nn.LayerNorm(64)
        self.head = nn.Linear(64, 48)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


class Trained:
    """A model in training and its session at some moments."""

    def __init__(self, **options: Any) -> None:
        torch._dynamo.reset()
        torch.manual_seed(0)
        self.model = Net()
        compiled = torch.compile(self.model, backend="convaware", options={**OPTIONS, "inner": "aot_eager", **options})
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=3e-3)
        self.session: Session = cacompile.session(self.model)
        self.states = {0: self.session.state_dict()}
        self.generator = torch.Generator().manual_seed(0)
        for step in range(1, 41):
            tokens = torch.randint(0, 48, (4, 12), generator=self.generator)
            loss = F.cross_entropy(compiled(tokens).flatten(0, 1), (tokens * 5 + 1).remainder(48).flatten())
            loss.backward()
            self.session.note_loss(loss.item())
            optimizer.step()
            optimizer.zero_grad()
            if step in (3, 5):
                self.states[step] = self.session.state_dict()
        self.states[step] = self.session.state_dict()
        self.explained = cacompile.explain(self.model)


@pytest.fixture(scope="module")
def trained() -> Iterator[Trained]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cacompile.controller.policy.FAST", np.inf)
        yield Trained()


@pytest.fixture(scope="module")
def dense() -> dict[str, Any]:
    """The state of a run in which nothing may be skipped."""
    return Trained(tolerance=0.0).states[40]


@pytest.fixture(scope="module")
def deep(trained: Trained) -> dict[str, Any]:
    """The state as it would be of 40 times as many layers, deep inside other modules."""
    state = trained.states[40]
    saved, layers = state["history"], 40
    called = [name.replace(".", "_", 2) for name in saved["families"]]
    families = [f"model.decoder.layers.{i}.{name}" for i in range(layers) for name in called]
    wide = {
        "families": families,
        "kinds": saved["kinds"] * layers,
        "groups": [f"{i}.{name}" for i in range(layers) for name in saved["groups"]],
        "family": torch.cat([saved["family"] + i * len(saved["families"]) for i in range(layers)]),
        "flops": saved["flops"].repeat(layers),
        **{name: saved[name].repeat(1, layers) for name in ("keep", "descent", "update_ratio")},
    }
    return {**state, "history": {**saved, **wide}}


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Browser:
    return Browser(tmp_path_factory.mktemp("browser"))


def written(state: dict[str, Any], folder: Path, name: str) -> str:
    cacompile.report_state(state, folder / name)
    return (folder / name).read_text(encoding="utf-8")


def test_the_page_says_what_the_session_says(trained: Trained, tmp_path: Path):
    session = trained.session
    session.report(tmp_path / "run.html")
    page = (tmp_path / "run.html").read_text(encoding="utf-8")
    total, saved = session.flops
    backwards, masked = session.backwards
    assert 0 < saved < total and 0 < masked < backwards == 40
    whole = session.step_flops
    assert f"{100 * saved / whole:.1f}% of the FLOPs of 40 steps were skipped, {100 * saved / total:.1f}% of dW" in page
    assert f"{amount(saved)} of {amount(whole)}" in page and f"{masked} of {backwards}" in page
    dx = 1 - (total + session.forward_flops) / whole
    assert f"dX {100 * dx:.1f}%, dW {100 * total / whole:.1f}%" in page
    assert all(f"<code>{name}</code>" in page for name in session.families)
    assert all(html.escape(row.reason) in page for row in trained.explained.rows if row.reason)
    assert '<td>0.3</td><td class="quiet">default: 0.05</td>' in page and str(torch.__version__) in page
    assert page.count("<svg") == 5 + 3 * 3, "of the whole run five, of each of three kinds three"
    about = session.about["run"]
    assert about.keys() == {"model", "began", "device", "optimizer"} and about["optimizer"] == "AdamW"
    assert all(html.escape(text) in page for text in about.values()) and about["model"].startswith("Net, ")
    steps, losses = session.losses
    assert steps.tolist() == list(range(40)) and f"{losses[-1]:.4g}" in page


def test_a_state_of_before_has_no_steps_and_says_so(trained: Trained, tmp_path: Path):
    """As format 7 was: FLOPs of forward passes, of steps at each measurement, reasons and losses are not known."""
    state = trained.states[40]
    history = {name: value for name, value in state["history"].items() if name != "step_flops"}
    about = {name: value for name, value in state["about"].items() if name not in ("why", "run")}
    kept = {name: value for name, value in state.items() if name not in ("forward_flops", "losses")}
    old = {**kept, "format": 7, "history": history, "about": about}
    page = written(old, tmp_path, "old.html")
    assert "Share of dW that was skipped" in page and "Share of the steps that" not in page
    assert "dX" not in page and page.count("<svg") == 4 + 3 * 3 and "nan" not in page.lower()
    nothing = written({**old, "flops": (old["flops"][0], 0.0)}, tmp_path, "nothing.html")
    assert "saved by an earlier version" in nothing
    assert written(state, tmp_path, "new.html").count("Share of the steps that") == 1


def test_a_file_is_enough(trained: Trained, tmp_path: Path):
    """The state that was saved to a file and read again gives the very page that the session writes."""
    trained.session.report(tmp_path / "live.html")
    torch.save(trained.session.state_dict(), tmp_path / "state.pt")
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    assert written(saved, tmp_path, "saved.html") == (tmp_path / "live.html").read_text(encoding="utf-8")


def test_rows_are_the_history(trained: Trained, tmp_path: Path):
    written(trained.states[40], tmp_path, "run.csv")
    rows, kept = pd.read_csv(tmp_path / "run.csv"), trained.session.history
    assert len(rows) == len(kept.step) * len(kept.groups)
    for name, table in (("keep", kept.keep), ("descent", kept.descent), ("update_ratio", kept.update_ratio)):
        wide = rows.pivot(index="step", columns="group", values=name)[list(kept.groups)]
        np.testing.assert_allclose(wide.to_numpy(), table, rtol=1e-6, err_msg=name)
    runs = rows.groupby("step").first()
    assert (runs.step_flops == kept.step_flops).all() and (kept.step_flops > 2.9 * kept.total).all()
    assert (runs.dw_flops == kept.total).all() and (runs.dw_flops_saved == kept.saved).all()
    assert (runs.backwards_masked == kept.masked).all() and (runs.groups_skipped == kept.skipped).all()
    assert set(rows.kind) == {"heads", "neurons", "tokens"}


def test_tensorboard_reads_it(trained: Trained, tmp_path: Path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    folder = tmp_path / "events"
    folder.mkdir()
    trained.session.report(folder)
    events = accumulator.EventAccumulator(str(folder), size_guidance={accumulator.HISTOGRAMS: 0}).Reload()
    run = RunData.of(trained.states[40])
    for family in run.families:
        for tag, values in (
            ("skipped", family.share),
            ("descent", family.descent),
            ("update ratio", family.update_ratio),
        ):
            found = {event.step: event.value for event in events.Scalars(f"{tag}/{family.name}")}
            known = np.isfinite(values)
            assert list(found) == run.history.step[known].tolist()
            np.testing.assert_allclose(list(found.values()), values[known], rtol=1e-5)
    for tag, values in (("dW", run.shares), ("step", run.step_shares)):
        shares = [event.value for event in events.Scalars(f"run/{tag} share skipped since the last measurement")]
        np.testing.assert_allclose(shares, values, rtol=1e-5, atol=1e-7)
    assert [event.value for event in events.Scalars("run/loss")] == pytest.approx(run.losses[1].tolist())
    assert [event.step for event in events.Histograms("groups/keep")] == run.history.step.tolist()


def test_the_terminal_shows_it(trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    trained.session.report()
    shown = capsys.readouterr().out
    assert RunData.of(trained.states[40]).headline in shown and "█" not in shown.splitlines()[0]
    assert all(name in shown for name in trained.session.families) and "an embedding" in shown
    assert written(trained.states[40], tmp_path, "run.txt") == shown
    assert max(map(len, shown.splitlines())) <= 120


@pytest.mark.parametrize(
    ("moment", "words"),
    [(0, "not been trained with backend"), (3, "first 10 steps"), (5, "first 10 steps"), ("dense", "tolerance is 0")],
)
def test_where_nothing_was_skipped_it_says_why(
    moment: int | str, words: str, trained: Trained, dense: dict[str, Any], tmp_path: Path
):
    state = dense if moment == "dense" else trained.states[moment]
    page = written(state, tmp_path, "run.html")
    assert words in html.unescape(page) and "nan" not in page.lower()
    assert words in written(state, tmp_path, "run.txt")
    assert ("<svg" in page) == (moment in (5, "dense")), "a picture of measurements that there are"
    rows = written(state, tmp_path, "run.csv").splitlines()
    assert len(rows) == 1 + len(RunData.of(state).history.step) * len(state["groups"])


@pytest.mark.parametrize(
    ("path", "format", "words"),
    [
        ("run.pdf", None, [".html", ".csv", "folder", "'run.pdf'"]),
        ("run", None, [".html", "html, csv, terminal, tensorboard", "'run'"]),
        ("run.html", "htlm", ["'htlm'", "did you mean 'html'", "tensorboard"]),
        ("-", "csv", ["'csv'", "path", "'-'"]),
        ("", None, ["path must be", "got ''"]),
        ("", "tensorboard", ["path must be", "got ''"]),
        (None, None, ["path must be", "os.PathLike, got None"]),
        (b"run.html", "html", ["path must be", "got b'run.html'"]),
        (Path(__file__).parent, "html", ["path must be a file's", "folder"]),
        (Path(__file__) / "run.html", None, ["through a file", "run.html"]),
        (Path(__file__), "tensorboard", ["through a file", "test_run_report.py"]),
    ],
)
def test_a_wrong_path_or_format_is_one_clear_error(trained: Trained, path: Any, format: str | None, words: list[str]):
    with pytest.raises(ConvAwareError) as error:
        trained.session.report(path, format)
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda s: None, ["format 4 to 8", "NoneType"]),
        (lambda s: {**s, "format": 3}, ["format 4 to 8", "got format 3"]),
        (lambda s: {k: v for k, v in s.items() if k != "history"}, ["lacks history"]),
        (lambda s: {**s, "history": {**s["history"], "stride": -1}}, ["history", "stride", "-1"]),
    ],
)
def test_what_is_no_state_is_one_clear_error(trained: Trained, spoil: Any, words: list[str]):
    with pytest.raises(ConvAwareError) as error:
        cacompile.report_state(spoil(trained.states[40]))
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize(
    ("name", "module", "extra"),
    [("run.html", "matplotlib", "report"), ("run.txt", "rich.console", "report"),
     ("events/", "torch.utils.tensorboard", "tensorboard")],
)  # fmt: skip
def test_a_library_that_is_missing_is_named(
    trained: Trained, name: str, module: str, extra: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    if not name.endswith("/"):
        (tmp_path / name).write_text("of before")
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConvAwareError, match=rf"cacompile\[{extra}\]"):
        trained.session.report(f"{tmp_path}/{name}")
    assert name.endswith("/") or (tmp_path / name).read_text() == "of before", "what is there is not emptied first"


@pytest.mark.slow
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_a_browser_shows_it_without_a_complaint(browser: Browser, trained: Trained, dark: bool, tmp_path: Path):
    written(trained.states[40], tmp_path, "run.html")
    picture = imread(browser.screenshot(tmp_path / "run.html", dark=dark))[..., :3]
    assert browser.console == []
    assert np.allclose(picture[1, 1] * 255, [11, 17, 32] if dark else [255, 255, 255], atol=1)
    ink = np.abs(picture - picture[1, 1]).max(-1) > 0.5
    for half in (ink[:, :640], ink[:, 640:]):
        assert 0.005 < half[150:].mean() < 0.6, "there is a picture on either side"


@pytest.mark.slow
def test_the_browser_would_complain_of_anything_from_outside(browser: Browser, trained: Trained, tmp_path: Path):
    page = written(trained.states[40], tmp_path, "run.html")
    assert not re.search(r"""(src|href|srcset|action)\s*=\s*["'](?!#|data:)|url\((?!["']?#)|@import""", page)
    for wrong in ('<img src="https://example.org/a.png">', '<script>console.log("on")</script>'):
        (tmp_path / "wrong.html").write_text(page.replace("</body>", f"{wrong}</body>"), encoding="utf-8")
        browser.dom(tmp_path / "wrong.html")
        assert any("Content Security Policy" in line for line in browser.console), wrong


MEASURE = """
const found = {inner: window.innerWidth, texts: 0, overlaps: [], outside: []};
found.wide = document.documentElement.scrollWidth - window.innerWidth;
for (const svg of document.querySelectorAll("svg")) {
  const boxes = [...svg.querySelectorAll("text")].map(t => [t.textContent.trim(), t.getBoundingClientRect()]);
  found.texts += boxes.length;
  boxes.forEach(([a, r], i) => {
    if (r.left < 0 || r.right > window.innerWidth) found.outside.push(a);
    boxes.slice(i + 1).forEach(([b, s]) => {
      const x = Math.min(r.right, s.right) - Math.max(r.left, s.left);
      const y = Math.min(r.bottom, s.bottom) - Math.max(r.top, s.top);
      if (x > 1 && y > 3) found.overlaps.push([a, b]);
    });
  });
  const box = svg.getBoundingClientRect();
  const small = Math.min(...boxes.map(([a, r]) => r.height));
  if (small < 9 || box.width < 350) found.outside.push(["small", small, box.width]);
}
parent.document.body.setAttribute("data-found", JSON.stringify(found));
"""


def measured(browser: Browser, page: str, folder: Path, width: int) -> dict[str, Any]:
    """What the browser says of a page in a window of that width."""
    page = re.sub(r"<meta http-equiv[^>]*>", "", page).replace("</body>", f"<script>{MEASURE}</script></body>")
    (folder / "measured.html").write_text(page, encoding="utf-8")
    dom = browser.dom(folder / "measured.html", width=width)
    return json.loads(html.unescape(re.search(r'data-found="([^"]*)"', dom)[1]))


@pytest.mark.slow
@pytest.mark.parametrize("width", [1200, 400])
def test_the_page_of_groups_is_as_wide_as_the_window(browser: Browser, trained: Trained, width: int, tmp_path: Path):
    found = measured(browser, trained.explained.to_html(), tmp_path, width)
    assert found["inner"] == width and found["texts"] > 30 and found["wide"] <= 0
    assert not [wrong for wrong in found["outside"] if wrong[0] == "small" and wrong[1] < 9]


@pytest.mark.slow
@pytest.mark.parametrize("width", [1200, 800, 400])
@pytest.mark.parametrize("which", ["trained", "deep"])
def test_no_text_is_on_another_or_outside(browser: Browser, which: str, width: int, request: Any, tmp_path: Path):
    value = request.getfixturevalue(which)
    page = written(value if which == "deep" else value.states[40], tmp_path, "run.html")
    found = measured(browser, page, tmp_path, width)
    assert found["inner"] == width and found["texts"] > 80 and found["wide"] <= 0
    assert found["overlaps"] == [] and found["outside"] == []


def test_names_of_layers_are_as_short_as_they_stay_different():
    assert short_names(["a.layers.0.mlp.neurons", "a.layers.1.mlp.neurons"]) == ["layers.0.mlp", "layers.1.mlp"]
    assert short_names(["head.tokens"]) == ["head"] and short_names(["neurons"]) == ["neurons"]
    (cut,) = short_names([f"{'x' * 50}.end.neurons"])
    assert cut.startswith("…") and cut.endswith("x.end") and len(cut) == 20


@pytest.mark.parametrize(
    ("number", "text"), [(0, "0"), (999, "999"), (50_734_301_184, "50.7 G"), (1e21, "1e+03 E"), (999_999, "1 M")]
)
def test_amounts_have_prefixes(number: float, text: str):
    assert amount(number) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0"), (0.0123, "12.3 ms"), (63.4, "63.4 s"), (600, "10 min"), (54_000, "15.0 h")]
)
def test_durations_have_units(seconds: float, text: str):
    assert duration(seconds) == text


def test_a_report_into_nowhere_is_made_there(trained: Trained, tmp_path: Path):
    trained.session.report(tmp_path / "new" / "folder" / "run.csv")
    assert pd.read_csv(io.StringIO((tmp_path / "new/folder/run.csv").read_text())).step.max() == 40
