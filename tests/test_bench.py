"""edge-kv bench: the document, its depths and judgements. Nothing here is timed."""

import json
import subprocess
import sys

import numpy as np
import pytest
from fake_artifact import write_artifact
from typer.testing import CliRunner

from edge_kv import models, runtime
from edge_kv.artifact import read_artifact
from edge_kv.cli import app
from edge_kv.cli.plots import plot_bench
from edge_kv.errors import ArtifactError, ConfigError, RuntimeFault
from edge_kv.needs import count_needs
from edge_kv.runtime import bench as module
from edge_kv.tensors import stored_format, weight_formats

DEPTHS = (40, 512)


@pytest.fixture(scope="module")
def tiny(tiny_artifact):
    return tiny_artifact


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory, compiled):
    """Of this worker alone: what one has filled, another would find."""
    folder = tmp_path_factory.mktemp("cache")
    compiled(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGE_KV_CACHE", str(folder))
        yield


@pytest.fixture(scope="module")
def document(tiny):
    return module.bench(read_artifact(tiny), DEPTHS, threads=1, prompt=64, tokens=6, repeats=2)


def test_document_is_json_with_everything_a_result_needs(document):
    assert json.loads(json.dumps(document)) == document
    assert set(document) == {
        "schema_version", "edge_kv", "artifact", "machine", "conditions", "bandwidth", "plan",
        "runs", "failures",
    }  # fmt: skip
    assert document["failures"] == []
    assert document["conditions"]["threads"] == 1
    assert document["machine"]["versions"]["onnxruntime"]
    assert document["bandwidth"]["best"] >= document["bandwidth"]["median"] > 1e8
    assert [r["ctx"] for r in document["runs"]] == list(DEPTHS)


def test_depths_are_real_and_say_where_they_come_from(document, tiny):
    shallow, deep = document["runs"]
    assert (shallow["depth"], shallow["filled"]) == (0, "empty")
    assert (deep["depth"], deep["filled"]) == (448, "prefilled in this run")
    assert (shallow["prefill"]["tokens"], deep["prefill"]["tokens"]) == (40, 64)
    assert len(deep["prefill"]["seconds"]) == 2 and deep["decode"]["tokens"] == 12
    artifact = read_artifact(tiny)
    job = module.Job("fill", str(tiny), "onnx", 1, True, (448,), 64, 6, 2)
    path = module.snapshot_path(artifact, job, 448)
    with runtime.load(artifact, threads=1) as session:
        session.restore(path)
        want = module.prompt_ids(session.artifact.tokens.vocab, 512)[:448]
        assert session.tokens == tuple(want.tolist())


def test_latencies_are_ordered_and_rates_are_their_inverse(document):
    for run in document["runs"]:
        seconds = run["decode"]["seconds"]
        assert 0 < seconds["p50"] <= seconds["p95"] <= seconds["p99"]
        assert run["prefill"]["rate"] == pytest.approx(
            run["prefill"]["tokens"] / np.median(run["prefill"]["seconds"])
        )
        assert run["load"]["start_to_first_token"] > run["load"]["seconds"] > 0
        assert run["first_token"] > seconds["p50"]


@pytest.mark.usefixtures("compiler")
def test_memory_of_every_phase_beside_the_plan(document):
    for run in document["runs"]:
        assert list(run["memory"]) == list(module.PHASES)
        for m in run["memory"].values():
            assert m["anon_peak"] >= m["anon"] > 1e7
            assert m["rss_peak"] >= m["anon"] and m["pss"] > 0
            assert m["anon_error"] == pytest.approx(m["anon_planned"] / m["anon_peak"] - 1)
            assert m["total_error"] == pytest.approx(m["total_planned"] / m["rss_peak"] - 1)
            assert abs(m["anon_planned"] - m["anon_peak"]) < 8e6
            assert abs(m["total_planned"] - m["rss_peak"]) < 16e6


def test_roofline_is_bytes_over_bandwidth(document, tiny):
    plan = read_artifact(tiny).plan
    for run in document["runs"]:
        roof = run["roofline"]
        total = roof["weight_bytes"] + roof["state_bytes"]
        passes = roof["passes"]
        assert len(passes) == 2 and all(p["read"] > 1e8 for p in passes)
        assert roof["seconds"] == pytest.approx(np.median([total / p["read"] for p in passes]))
        fractions = [total / p["read"] / p["seconds"] for p in passes]
        assert roof["fraction"] == pytest.approx(np.median(fractions))
    assert document["bandwidth"]["buffer"] >= min(512 << 20, document["machine"]["memory"] // 8)
    assert document["runs"][1]["roofline"]["state_bytes"] == plan.read_traffic(448 + 6)


def test_streamed_weights_are_every_matrix_once():
    rows_of = models.weights(models.get_row("e2b").config)
    counts = {}
    for spec in rows_of:
        counts[spec.kind] = counts.get(spec.kind, 0) + spec.elements
    want = 4 * counts["float"]
    for spec in rows_of:
        if fmt := stored_format(spec, weight_formats("int4")):
            rows, cols = spec.shape
            want += (
                rows * cols * (fmt.bits + 0.25) / 8 + 4 * rows if spec.kind != "ple_table" else 0
            )
    assert count_needs(models.get_row("e2b").config).read_weights == want
    needs = count_needs(models.get_row("26b-a4b").config, "none")
    assert needs.read_weights < needs.weight_file / 4


def test_a_second_run_takes_up_the_snapshots(tiny, document):
    again = module.bench(
        read_artifact(tiny), [512], threads=1, prompt=64, tokens=2, repeats=1, cache=False
    )
    assert again["runs"][0]["filled"] == "kept from an earlier run"


def test_random_rows_fill_a_depth(tiny, tmp_path, monkeypatch, compiled):
    compiled(tmp_path)
    monkeypatch.setenv("EDGE_KV_CACHE", str(tmp_path))
    found = module.bench(
        read_artifact(tiny), [512], threads=1, prompt=8, tokens=2, repeats=1, cache=False,
        fill="random",
    )  # fmt: skip
    (run,) = found["runs"]
    assert (run["filled"], run["depth"]) == ("random rows", 504)
    (kept,) = (tmp_path / "bench").iterdir()
    with runtime.load(tiny) as session:
        session.restore(kept)
        assert session.pos == 504
        for name in ("l0.k", "l0.v"):  # every row of a ring that has wrapped, none twice
            rows = session.state[name].reshape(-1, session.state[name].shape[-1])
            assert len(np.unique(rows, axis=0)) == len(rows)
        assert np.isfinite(session.decode(1)).all()


def test_unknown_fill_is_refused(tiny):
    with pytest.raises(ConfigError, match="'zeros'"):
        module.bench(read_artifact(tiny), [512], fill="zeros")


def test_torch_is_compared_and_drawn(tiny, tmp_path):
    args = ["bench", tiny, "--ctx", "48", "--compare", "torch", "--threads", 1, "--prompt", 16]
    args += ["--tokens", 3, "--repeats", 1, "--json", tmp_path / "b.json"]
    args += ["--plot", tmp_path / "b.png"]
    result = CliRunner().invoke(app, [str(a) for a in args])
    assert result.exit_code == 0, result.stderr
    data = json.loads((tmp_path / "b.json").read_text())
    assert [r["engine"] for r in data["runs"]] == ["onnx", "torch"]
    assert "anon_planned" not in data["runs"][1]["memory"]["decode"]
    assert "torch" in result.stdout and "of the speed that this memory allows" in result.stdout
    assert (tmp_path / "b.png").read_bytes().startswith(b"\x89PNG")


def test_eager_session_computes_what_the_programs_do(tiny):
    from edge_kv.compare import EagerSession

    artifact = read_artifact(tiny)
    ids = module.prompt_ids(artifact.tokens.vocab, 90)
    with runtime.load(artifact, threads=1) as ours, EagerSession(artifact, 1) as eager:
        for session in (ours, eager):
            session.prefill(ids[:-1])
        a, b = ours.decode(int(ids[-1])), eager.decode(int(ids[-1]))
    assert np.abs(a - b).max() < 0.05 * np.abs(b).max()
    assert a.argmax() == b.argmax()


def test_requests_that_cannot_be_measured(tiny):
    artifact = read_artifact(tiny)
    for depths in ([513], [1], []):
        with pytest.raises(ConfigError):
            module.bench(artifact, depths)
    for options in (["--compare", "jax"], ["--plot", "x.bmp"], ["--ctx", "much"]):
        result = CliRunner().invoke(app, ["bench", str(tiny), *options])
        assert result.exit_code == 1 and result.stderr.startswith("Error: ")


def test_error_of_a_measuring_process_is_passed_on(tmp_path):
    root = write_artifact(tmp_path / "a", programs=False)
    with pytest.raises(ArtifactError, match="no programs for 'onnx'"):
        module.bench(read_artifact(root), [32], threads=1)
    with pytest.raises(RuntimeFault, match="measuring process failed"):
        module._ask("edge_kv.no_such_module", {})


def test_what_is_measured_is_kept_when_a_later_run_fails(tiny, tmp_path, monkeypatch):
    ask = module._ask

    def fails_at_the_second(name, request):
        if request["task"] == "measure" and request["depths"] == (8,):
            raise RuntimeFault("The measuring process failed: it was killed")
        return ask(name, request)

    monkeypatch.setattr(module, "_ask", fails_at_the_second)
    args = ["bench", tiny, "--ctx", "16,24", "--threads", 1, "--prompt", 16, "--tokens", 2]
    args += ["--repeats", 1, "--json", tmp_path / "b.json"]
    result = CliRunner().invoke(app, [str(a) for a in args])
    assert result.exit_code == 1 and "1 measurement(s) failed" in result.stderr
    data = json.loads((tmp_path / "b.json").read_text())
    assert [r["ctx"] for r in data["runs"]] == [16]
    assert data["failures"] == [
        {"engine": "onnx", "ctx": 24, "error": "The measuring process failed: it was killed"}
    ]
    assert "onnx at 24 tokens" in result.stdout


def test_interrupted_runs_are_kept_too(tiny, monkeypatch):
    ask = module._ask

    def interrupts(name, request):
        if request["task"] == "measure" and request["depths"] == (8,):
            raise KeyboardInterrupt
        return ask(name, request)

    monkeypatch.setattr(module, "_ask", interrupts)
    found = module.bench(
        read_artifact(tiny), [16, 24, 32], threads=1, prompt=16, tokens=2, repeats=1
    )
    assert [r["ctx"] for r in found["runs"]] == [16]
    assert [f["ctx"] for f in found["failures"]] == [24]


def test_an_interrupt_before_any_run_is_no_failed_measurement(tiny, monkeypatch):
    def interrupts(name, request):
        if request["task"] == "fill":
            raise KeyboardInterrupt
        return {}

    monkeypatch.setattr(module, "_ask", interrupts)
    with pytest.raises(KeyboardInterrupt):
        module.bench(read_artifact(tiny), [16], threads=1, prompt=16, tokens=2, repeats=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--engine onnx,tensorrt", "Unknown engine 'tensorrt'"),
        ("--engine executorch", "no programs for 'executorch'"),
        ("--json {tmp}/no/b.json", "its directory does not exist"),
        ("--json {tmp}", "it is a directory"),
        ("--plot {tmp}/no/b.png", "its directory does not exist"),
        ("--plot {tmp}/b.gif", "name a .png, .svg or .pdf"),
    ],
)
def test_what_would_lose_a_measurement_is_found_first(
    tiny, tmp_path, monkeypatch, options, message
):
    monkeypatch.setattr(module, "_ask", None)  # nothing is measured
    words = options.format(tmp=tmp_path).split()
    result = CliRunner().invoke(app, ["bench", str(tiny), *words])
    assert result.exit_code == 1 and message in result.stderr


def test_a_missing_matplotlib_is_found_first(tiny, tmp_path, monkeypatch):
    from edge_kv.cli import plots

    monkeypatch.setattr(module, "_ask", None)
    monkeypatch.setattr(plots, "find_spec", lambda _: None)
    result = CliRunner().invoke(app, ["bench", str(tiny), "--plot", str(tmp_path / "b.png")])
    assert result.exit_code == 1 and "needs matplotlib" in result.stderr


def test_bench_processes_do_not_import_torch():
    code = (
        "import sys, edge_kv.runtime.bench, edge_kv.runtime.onnx_session; "
        "assert not {'torch', 'onnx', 'matplotlib'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.usefixtures("compiler")
def test_plot_without_measured_memory(document, tmp_path):
    """As on systems that do not tell anonymous memory apart."""
    blank = json.loads(json.dumps(document))
    for run in blank["runs"]:
        for m in run["memory"].values():
            m["anon_peak"] = None
    plot_bench(blank, tmp_path / "p.svg")
    assert "planned" in (tmp_path / "p.svg").read_text()
    with pytest.raises(ConfigError, match="Cannot write"):
        plot_bench(document, tmp_path / "none" / "p.png")
