"""The command line: every command, its JSON, and one line for everything that can go wrong."""

import contextlib
import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
from fake_artifact import edit_manifest, write_artifact
from typer.testing import CliRunner

from edge_kv import models, request
from edge_kv.amounts import size
from edge_kv.artifact import read_artifact
from edge_kv.cli import app
from edge_kv.cli.export_screen import print_summary
from edge_kv.cli.terminal import layers
from edge_kv.tensors import weight_formats


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_artifact(tmp_path_factory.mktemp("cli") / "toy", ctx=256)


def invoke(*args, **kwargs):
    return CliRunner().invoke(app, [str(a) for a in args], **kwargs)


def good(*args, **kwargs):
    result = invoke(*args, **kwargs)
    assert result.exit_code == 0, result.stderr
    return result


def test_plan_json_is_the_plan():
    data = json.loads(good("plan", "--model", "e2b", "--ctx", "32k", "--json").stdout)
    plan = models.plan(models.get_row("e2b").config, ctx=32_768)
    assert [b["name"] for b in data["buffers"]] == [t.name for t in plan.tables]
    assert set(data["buffers"][0]) == {
        "name", "shape", "dtype", "bytes", "stride", "keep", "writer", "readers",
    }  # fmt: skip
    assert sum(b["bytes"] for b in data["buffers"]) == data["totals"]["bytes"] == plan.bytes
    assert data["totals"]["baselines_f16"]["sharing_and_rings"] == 2 * (3_072 * 32_768 + 3_145_728)
    assert data["memory"]["phases"]["decode"]["total"] == data["memory"]["peak"]
    assert data["memory"]["state"] == plan.bytes


def test_a_preset_is_meant_where_a_folder_has_its_name(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "e2b").mkdir()
    data = json.loads(good("plan", "--model", "e2b", "--ctx", "2k", "--json").stdout)
    assert data["totals"]["bytes"] == models.plan(models.get_row("e2b").config, ctx=2048).bytes


def test_plan_leads_with_the_answer_and_ends_with_the_tables():
    args = ["plan", "--model", "e2b", "--ctx", "32768", "--kv", "f16"]
    short, out = good(*args).stdout, good(*args, "--buffers").stdout
    assert re.match(r"Needs 1\.\d+ GB of RAM: [345]\d\d MB that stays, and 1", out.splitlines()[1])
    assert "Fits: Pi 4/5, 4 GB" in out
    assert "639×1×256" in out and "0-3, 5-8, 10-13" in out and "639×1×256" not in short
    for number in ("1.41 GB", "604 MB", "484 MB", "208 MB"):  # the four baselines
        assert number in out
    for phase in ("load", "prefill", "decode"):
        assert phase in out
    assert "484 MB of state" in out  # read traffic equals the unshared rings: 0.484 GB


@pytest.mark.parametrize("quant", ["int4", "int8", "none"])
def test_plan_follows_its_options(quant):
    args = ["plan", "--model", "e4b", "--ctx", "4k", "--chunk", "64", "--quant", quant, "--json"]
    data = json.loads(good(*args, "--store", "embed=int8-f16").stdout)
    assert (data["chunk"], data["quant"]) == (64, quant)
    assert data["memory"]["formats"] == weight_formats(quant, {"embed": "int8-f16"})


def test_plan_finds_what_fits():
    args = ["plan", "--model", "e2b", "--fits", "2g"]
    data = json.loads(good(*args, "--json").stdout)
    found = {(c["quant"], c["kv"]): c for c in data["choices"]}
    assert data["limit"] == 2 << 30 and len(found) == 9
    assert found["int4", "int8"]["ctx"] == 131_072 > found["int4", "f32"]["ctx"] > 0
    assert found["none", "f32"]["ctx"] == 0
    chosen = found["int4", "f32"]
    for ctx, fits in ((chosen["ctx"], True), (chosen["ctx"] + 1024, False)):
        one = ["plan", "--model", "e2b", "--kv", "f32", "--ctx", ctx, "--json"]
        assert (json.loads(good(*one).stdout)["memory"]["resident"] <= 2 << 30) == fits
    out = good(*args).stdout
    assert "up to 131,072 tokens" in out
    assert "edge-kv export --model e2b --ctx 131072 --kv int8 --quant int4" in out
    assert (
        len(json.loads(good(*args, "--kv", "f16", "--quant", "int4", "--json").stdout)["choices"])
        == 1
    )
    none = invoke("plan", "--model", "e2b", "--fits", "100m")
    assert none.exit_code == 1 and "more than 105 MB" in none.stderr


def test_plan_reads_the_config_of_random_weights():
    args = ["plan", "--model", "gemma3-270m", "--weights", "random", "--ctx", "2k", "--json"]
    assert json.loads(good(*args).stdout)["model"] == "gemma3-270m"


@pytest.mark.usefixtures("compiler")
def test_run_streams_a_reply_and_ends_with_a_summary(root):
    result = good("run", root, "hello", "--max-new-tokens", "5", "--threads", "1")
    assert result.stdout.strip()
    assert re.search(r"first token .* prefill .* decode .* peak RSS .* planned", result.stderr)


@pytest.mark.usefixtures("compiler")
def test_run_json_is_one_document_that_a_seed_repeats(root):
    args = ["run", root, "hello", "--json", "--max-new-tokens", "9", "--temperature", "3"]
    one, two, other = (json.loads(good(*args, "--seed", str(seed)).stdout) for seed in (1, 1, 2))
    assert one["ids"] == two["ids"] != other["ids"] and len(one["ids"]) == 9
    assert one["prefill_tokens"] == one["prompt_tokens"] - 1 and one["decode_tokens"] == 9
    assert one["ctx_used"] == one["prompt_tokens"] + 8
    assert one["first_token_seconds"] > 0 and one["planned_peak_bytes"] > 0


def test_run_takes_the_prompt_from_a_file_or_a_pipe(root, tmp_path):
    (tmp_path / "p.txt").write_text("héllo")
    options = ["--json", "--max-new-tokens", "4"]
    texts = [
        json.loads(good("run", root, "héllo", *options).stdout),
        json.loads(good("run", root, "--file", tmp_path / "p.txt", *options).stdout),
        json.loads(good("run", root, *options, input="héllo").stdout),
    ]
    assert texts[0]["ids"] == texts[1]["ids"] == texts[2]["ids"]


def test_run_raw_feeds_the_bare_text(root):
    data = json.loads(good("run", root, "abc", "--raw", "--json", "--max-new-tokens", 1).stdout)
    assert data["prompt_tokens"] == 4  # the start token and three bytes


def test_run_saves_and_takes_up_a_conversation(root, tmp_path):
    options = ["--json", "--max-new-tokens", "4"]
    good("run", root, "one", *options, "--snapshot", tmp_path / "c.kv")
    data = json.loads(good("run", root, "two", *options, "--restore", tmp_path / "c.kv").stdout)
    assert data["reused_tokens"] > 10
    whole = good("run", root, "one", *options, "--restore", tmp_path / "c.kv")
    assert json.loads(whole.stdout)["prompt_tokens"] == data["prompt_tokens"]


def test_run_slides_and_says_so(root):
    args = ["run", root, "x" * 200, "--max-new-tokens", "90", "--on-full", "slide"]
    assert "context full: kept the first 1 and the last 127 tokens, forgot" in good(*args).stderr


def test_inspect(root):
    out = good("inspect", root).stdout
    for part in ("toy", "onnx/decode.onnx", "verify.npz", "parity"):
        assert part in out
    lines = [line.split() for line in out.splitlines()]
    assert [
        "k",
        "ring",
        "7×2×4",
        "f32",
        "224",
        "B",
        "224",
        "B",
        "0",
        "2",
    ] in lines  # 2 reads it too
    data = json.loads(good("inspect", root, "--json").stdout)
    assert data["state_bytes"] == sum(b["bytes"] for b in data["buffers"])
    assert data["files"]["onnx/decode.onnx"] == (root / "onnx/decode.onnx").stat().st_size


def test_inspect_shows_what_the_checkpoint_says_of_sampling(tmp_path):
    root = write_artifact(tmp_path / "a", programs=False)
    assert "Sampling: greedy. Ids" in good("inspect", root).stdout
    sampling = {"temperature": 1.0, "top_k": 64, "top_p": 0.95}
    tokens = json.loads((root / "manifest.json").read_text())["tokens"]
    edit_manifest(root, sampling=sampling, tokens={**tokens, "eos": [1, 4], "suppress": [7, 9]})
    out = " ".join(good("inspect", root).stdout.split())
    assert "Sampling: temperature 1, top_k 64, top_p 0.95, min_p 0, repetition_penalty 1." in out
    assert "Ids that end a reply: 1, 4; never drawn: 2 ids (7, 9)." in out
    edit_manifest(root, sampling={"repetition_penalty": 1.1})
    assert "greedy, repetition_penalty 1.1." in good("inspect", root).stdout


def test_inspect_shows_quantisation_errors_and_memory(tmp_path):
    root = write_artifact(tmp_path / "a", programs=False)
    tensors = {f"t{i}": {"format": "int4-s8", "error": i / 100} for i in range(9)}
    formats = {"linear": "int4-s8", "kv": "int8-s8"}
    edit_manifest(root, quant={"scheme": "int4", "formats": formats, "tensors": tensors})
    out = " ".join(good("inspect", root).stdout.split())
    assert "9 tensors, relative error 0.04 (median); worst: t8 0.08" in out
    assert "Stored as: linear int4-s8, kv int8-s8." in out


def test_an_export_says_that_its_template_is_no_template(tmp_path):
    lines = []
    root = write_artifact(tmp_path / "a", programs=False, template="{% if")
    print_summary(read_artifact(root), 3.0, lines.append)
    assert any("cannot chat: The chat_template.jinja is not a valid Jinja" in x for x in lines)
    assert lines[-1] == f"Next: edge-kv run {root} --raw 'Once upon a time'"


def test_inspect_shows_parity_as_a_table(tmp_path):
    root = write_artifact(tmp_path / "a", programs=False)
    parity = json.loads((root / "manifest.json").read_text())["parity"]
    parity["onnx"] |= {
        "lowering": {"mean_kl": 1e-9, "max_kl": 2e-9, "top1": 1.0, "max_abs": 3e-4},
        "quantisation": {"mean_kl": 0.0125},  # another version may have said less
        "perplexity": {"float": 14.9, "stored": 16.01},
        "verify": {"max_kl": 0.004, "min_top1": 0.7},
    }
    edit_manifest(root, parity=parity)
    lines = [" ".join(line.split()) for line in good("inspect", root).stdout.splitlines()]
    at = lines.index("parity of KL mean KL max top-1 max |Δlogit|")
    assert lines[at + 1 : at + 5] == [
        "onnx lowering 1e-09 2e-09 100.0% 0.0003",
        "kernels – 0 – 0",
        "quantisation 0.013 – – –",
        "limits – 0.004 70.0% –",
    ]
    assert "Perplexity of the gate's text: 14.9 as floats, 16.01 as stored." in lines


def test_verify(root):
    assert "6 files unchanged; max |Δlogit|" in good("verify", root).stdout
    data = json.loads(good("verify", root, "--json").stdout)
    assert data["passed"] and data["top1"] == 1.0 and data["files"] == 6


@pytest.mark.usefixtures("compiler")
def test_verify_fails_beyond_the_limits(tmp_path):
    root = write_artifact(tmp_path / "a")
    parity = json.loads((root / "manifest.json").read_text())["parity"]
    parity["onnx"]["verify"] = {"max_kl": 0.0, "min_top1": 1.0}
    edit_manifest(root, parity=parity)
    result = invoke("verify", root, "--json")
    assert result.exit_code == 1 and not json.loads(result.stdout)["passed"]
    assert result.stderr.startswith("Error: ") and "computes something else" in result.stderr


def test_export_passes_every_option_on(monkeypatch, tmp_path):
    seen = {}

    def export_model(**kwargs):
        seen.update(kwargs)
        return write_artifact(kwargs["out"], programs=False)

    stand_in = types.ModuleType("edge_kv.export")  # the real one imports torch, for seconds
    stand_in.export_model = export_model
    monkeypatch.setitem(sys.modules, "edge_kv.export", stand_in)
    out = tmp_path / "made"
    result = good(
        "export", "--model", "e2b", "--weights", "random", "--ctx", "4k", "--chunk", "64", "--kv",
        "f16", "--quant", "int8", "--store", "kv=int8-row", "--backend", "both",
        "--attention", "portable", "--calibration", "text.txt", "--device", "cuda", "--out", out,
    )  # fmt: skip
    assert result.stdout == f"{out}\n"
    assert {k: seen[k] for k in seen if k not in ("progress", "open_session", "out")} == {
        "model": "e2b", "weights": "random", "ctx": 4096, "chunk": 64, "kv": "f16",
        "quant": "int8", "store": ("kv=int8-row",), "backends": ("onnx", "executorch"),
        "attention": "portable", "calibration": "text.txt", "device": "cuda",
        "drafts": 7, "assistant": None,
    }  # fmt: skip
    monkeypatch.chdir(tmp_path)
    shutil.copytree(models.get_row("tiny").weights, "models/my-model")
    result = good("export", "--weights", "models/my-model", "--ctx", "2k", "--json")
    assert seen["out"] == Path("my-model-2048") and seen["backends"] == ("onnx",)
    assert seen["attention"] == "native"
    assert json.loads(result.stdout)["artifact"] == "my-model-2048"


def test_export_without_torch_says_what_to_install(monkeypatch):
    monkeypatch.setattr(request, "find_spec", lambda name: None if name == "torch" else name)
    result = invoke("export", "--model", "e2b", "--ctx", "4k")
    assert result.exit_code == 1 and "pip install '.[export]'" in result.stderr


def test_export_looks_at_the_target_before_it_downloads(monkeypatch, tmp_path):
    monkeypatch.setattr(request, "download", None)  # would be called with e2b's repository
    (tmp_path / "there").mkdir()
    usage = shutil.disk_usage(tmp_path)
    args = ["export", "--model", "e2b", "--ctx", "4k", "--out"]
    result = invoke(*args, tmp_path / "there")
    assert result.exit_code == 1 and "already exists" in result.stderr
    (tmp_path / "link").symlink_to(tmp_path / "nothing")  # a directory cannot be renamed to it
    result = invoke(*args, tmp_path / "link")
    assert result.exit_code == 1 and "already exists" in result.stderr
    (tmp_path / "file").write_text("")
    result = invoke(*args, tmp_path / "file" / "art")
    assert result.exit_code == 1 and "Cannot write in" in result.stderr
    monkeypatch.setattr(request.shutil, "disk_usage", lambda _: usage._replace(free=10**9))
    result = invoke(*args, tmp_path / "art")
    assert result.exit_code == 1 and "has 1 GB left; free some space" in result.stderr
    assert (
        invoke("export", "--model", "e2b", "--ctx", "1m", "--out", tmp_path / "art").exit_code == 1
    )


def test_interrupted_export_says_how_to_go_on(monkeypatch, tmp_path):
    def export_model(out, **_):
        part = out.parent / f".{out.name}.part"
        part.mkdir()
        (part / "weights.bin").write_bytes(bytes(2_000_000))
        raise KeyboardInterrupt

    stand_in = types.ModuleType("edge_kv.export")
    stand_in.export_model = export_model
    monkeypatch.setitem(sys.modules, "edge_kv.export", stand_in)
    result = invoke("export", "--model", "tiny", "--ctx", "64", "--out", tmp_path / "art")
    assert result.exit_code == 130
    assert "the same command goes on where this one stopped" in result.stderr
    assert ".art.part holds 2 MB" in result.stderr


BAD = [  # arguments ({root}: an artifact, {tmp}: an empty directory), what the line says
    ("plan --ctx 4k", "Name a model: --model e2b"),
    ("plan --model e2b", "Say how much context (--ctx 32768), or how much RAM (--fits"),
    ("plan --model e2b --fits 2x", "not an amount of memory"),
    ("plan --model e2b --weights random --revision v1 --ctx 4k", "--revision is of a hub"),
    ("plan --model e2 --ctx 4k", "Unknown model 'e2'. Did you mean 'e2b'?"),
    ("plan --model zzz --ctx 4k", "Unknown model 'zzz'. Known: "),
    ("plan --model e2b --ctx 4kk", "'4kk' is not a size"),
    ("plan --model e2b --ctx 0", "'0' is not a size"),
    ("plan --model e2b --ctx 1m", "ctx 1048576 is outside 1 … 131072"),
    ("plan --model e2b --ctx 4k --chunk x", "'x' is not a size"),
    ("plan --model e2b --ctx 4k --kv int9", "Unknown KV storage 'int9'. Did you mean 'int8'?"),
    ("plan --model e2b --ctx 4k --quant int3", "Unknown quantisation 'int3'"),
    ("plan --weights {tmp}/none --ctx 4k", "does not exist"),
    ("export --ctx 4k", "Name a model"),
    ("export --model e2b --ctx many", "'many' is not a size"),
    ("run {tmp}/none hi", "is not a directory; give the directory `edge-kv export` made"),
    ("run {tmp} hi", "has no manifest.json; it is not an edge-kv artifact"),
    ("run {root} hi --engine onx", "Unknown engine 'onx'. Did you mean 'onnx'?"),
    ("run {root} hi --threads 0", "threads 0 must be at least 1"),
    ("run {root} hi --temperature -1", "temperature -1.0 must be 0"),
    ("run {root} hi --top-p 2", "top_p 2.0 must lie above 0"),
    ("run {root} hi --on-full slid", "Unknown on_full 'slid'. Did you mean 'slide'?"),
    ("run {root} hi --file {tmp}/p", "Both a prompt and --file were given"),
    ("run {root} --file {tmp}/none", "Cannot read"),
    ("run {root}", "The prompt is empty"),
    ("run {root} -", "The prompt is empty"),
    ("run {root} hi --think maybe", "Unknown --think 'maybe'. Known: auto, off, on"),
    ("run {root} hi --json-schema {tmp}/none", "Cannot read"),
    ("run {root} hi --regex a( ", "regular expression is not usable"),
    ("run {root} hi --regex a --grammar {tmp}/x", "Give one of --json-schema"),
    ("run {root} hi --logprobs 999", "logprobs 999 must lie in 0 … 100"),
    ("run {root} hi --ram-limit 1m", "planned to need"),
    ("run {root} hi --ram-limit 1m --huge-pages", "leave out --huge-pages"),
    ("run {root} hi --ram-limit lots", "'lots' is not an amount of memory"),
    ("run {root} hi --restore {tmp}/none.kv", "Cannot open the snapshot"),
    ("run {root} hi --restore {root}/tokenizer.json", "is not an edge-kv snapshot"),
    ("run {root} hi --max-new-tokens 1 --snapshot {tmp}/no/x.kv", "its directory does not exist"),
    ("run {root} " + "long" * 80, "The prompt has"),
    ("inspect {tmp}/none", "is not a directory"),
    ("verify {root} --engine executorc", "Unknown engine 'executorc'"),
]  # fmt: skip


@pytest.mark.parametrize(("line", "message"), BAD, ids=[line[:60] for line, _ in BAD])
def test_bad_input_is_one_line_and_exit_1(root, tmp_path, line, message, request):
    if line.startswith("run {root}"):  # without native operators another line comes before
        request.getfixturevalue("compiler")
    args = [part.format(root=root, tmp=tmp_path) for part in line.split()]
    result = invoke(*args, input="")
    assert result.exit_code == 1, (result.stdout, result.stderr)
    assert result.stderr.startswith("Error: ") and message in result.stderr
    assert result.stderr.count("\n") == 1 and "Traceback" not in result.stderr
    assert not list(tmp_path.iterdir())


def test_prompt_that_is_not_text(root):
    result = invoke("run", root, input=b"ab\xff")
    assert result.exit_code == 1 and "not UTF-8 text (byte 2)" in result.stderr


@pytest.mark.parametrize("line", ["plan --bogus", "run", "run x --top-k z"])
def test_wrong_usage_is_exit_2(line):
    result = invoke(*line.split())
    assert result.exit_code == 2 and result.stderr.startswith("Error: ")


def test_damaged_artifact_is_found_by_verify(tmp_path):
    root = write_artifact(tmp_path / "a")
    raw = bytearray((root / "ple.bin").read_bytes())
    raw[0] ^= 1
    (root / "ple.bin").write_bytes(raw)
    result = invoke("verify", root)
    assert result.exit_code == 1 and "ple.bin has SHA-256" in result.stderr


def test_interrupt_is_exit_130(root, monkeypatch):
    def interrupted(*_args, **_kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("edge_kv.runtime.load", interrupted)
    result = invoke("run", root, "hi")
    assert result.exit_code == 130 and result.stderr.splitlines()[-1] == "Interrupted."


def interruptible():
    """In the child: a background job of a shell would inherit that SIGINT is ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_sigint_during_a_reply_is_exit_130(root):
    process = subprocess.Popen(
        [sys.executable, "-m", "edge_kv", "run", str(root), "x", "--max-new-tokens", "100000000",
         "--on-full", "slide", "--threads", "1"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=interruptible,
    )  # fmt: skip
    try:
        assert process.stdout.read(3)  # it streams
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130 and err.decode().splitlines()[-1] == "Interrupted."


def screen(output):
    """What a terminal shows after `output`: the few control sequences that are in use."""
    rows, row, column = [""], 0, 0
    for token in re.findall(r"\x1b\[[?0-9;]*[A-Za-z]|[^\x1b]", output):
        if token == "\r":
            column = 0
        elif token == "\n":
            row += 1
            rows += [""] * (row + 1 - len(rows))
        elif token.startswith("\x1b") and token.endswith("A"):
            row -= int(token[2:-1])
        elif token == "\x1b[2K":
            rows[row] = ""
        elif not token.startswith("\x1b"):
            rows[row] = rows[row].ljust(column)[:column] + token + rows[row][column + 1 :]
            column += 1
    return [r.rstrip() for r in rows]


STREAMED = """
import sys, time
from edge_kv.cli.terminal import Stream
with Stream(lambda: "status here") as stream:
    for piece in sys.argv[1].split("|"):
        stream.write(piece)
        time.sleep(0.005)
"""


def test_streamed_text_is_whole_on_the_screen():
    words = "|".join(f"word{i} " for i in range(60))
    terminal = Terminal(code=STREAMED, args=[words + "|\nse|cond\n|\nla|st"])
    shown = screen(terminal.rest())
    assert terminal.process.wait(20) == 0
    assert "status here" not in shown
    end = shown.index("second")
    assert " ".join(" ".join(shown[:end]).split()) == words.replace("|", "").strip()
    assert all(len(r) <= 100 for r in shown)
    assert shown[end : end + 3] == ["second", "", "last"]


class Terminal:
    """A pseudo-terminal of 100 columns running edge-kv, or some code."""

    def __init__(self, code="from edge_kv.cli import main; main()", args=()):
        self.master, slave = pty.openpty()
        environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, *map(str, args)],
            stdin=slave, stdout=slave, stderr=slave, env=environment, start_new_session=True,
        )  # fmt: skip
        os.close(slave)
        self.seen = ""

    def type(self, text):
        os.write(self.master, text.encode())

    def rest(self):
        """Everything written, after the process ended."""
        with contextlib.suppress(OSError):  # EIO: nobody holds the other end any more
            while data := os.read(self.master, 65536):
                self.seen += data.decode(errors="replace")
        return self.seen

    def wait_for(self, text, seconds=20):
        end = time.monotonic() + seconds
        while text not in self.seen:
            assert time.monotonic() < end, self.seen
            if select.select([self.master], [], [], 0.1)[0]:
                self.seen += os.read(self.master, 65536).decode(errors="replace")
        seen, self.seen = self.seen.split(text, 1)
        return seen


READY = "\x1b[?2004h"  # a line is being edited: pasted text comes marked


def test_conversation_on_a_terminal(root, tmp_path):
    terminal = Terminal(args=["run", root, "--max-new-tokens", "12", "--threads", "1"])
    terminal.wait_for("/help for commands", 300)  # native code may be compiled first
    terminal.wait_for(READY)
    terminal.type("hello\r")
    reply = terminal.wait_for("prompt tokens were in memory")
    assert "tokens/s" in reply and "/256 tokens" in reply  # the status line
    assert "cut off at --max-new-tokens 12" in reply
    terminal.wait_for(READY)
    for line, answer in (
        ("/help", "answer the last question again"),
        (f"/save {tmp_path}/c.kv", "Saved "),
        ("/context", "of 256 tokens"),
        ("/think on", "Thinking is on."),
        ("/think maybe", "takes on, off or auto"),
        ("/regen", "prompt tokens were in memory"),
        ("/stats", "peak RSS"),
        ("/reset", "New conversation."),
        (f"/load {tmp_path}/c.kv", "2 messages."),
        ("/system Be brief.", "with this system prompt"),
        ("/load", "needs a file name"),
        ("/load nowhere", "Error: Cannot open the snapshot"),
        ("/resett", "Did you mean '/reset'?"),
    ):
        terminal.type(line + "\r")
        terminal.wait_for(answer)
        terminal.wait_for(READY)
    terminal.type("\x1b[200~two\nlines\x1b[201~\r")  # a paste is one message
    terminal.wait_for("prompt tokens were in memory")
    terminal.wait_for(READY)
    terminal.type("/context\r")
    assert "3 messages" in terminal.wait_for("messages.") + "messages."
    terminal.wait_for(READY)
    terminal.type("/bye\r")
    terminal.wait_for("first token")
    assert terminal.process.wait(20) == 0


def test_what_is_piped_in_follows_the_prompt(root, tmp_path):
    options = ["--json", "--max-new-tokens", "1", "--raw"]
    both = json.loads(good("run", root, "one", *options, input="two\r\n").stdout)
    assert both["prompt_tokens"] == 1 + len("one\n\ntwo\n")
    alone = json.loads(good("run", root, "-", *options, input="two").stdout)
    assert alone["prompt_tokens"] == 1 + len("two")
    read, write = os.pipe()  # a pipe that nobody writes into does not hold a reply up
    command = [sys.executable, "-m", "edge_kv", "run", str(root), "one", *options]
    done = subprocess.run(command, stdin=read, capture_output=True, text=True, timeout=120)
    os.close(read)
    os.close(write)
    assert json.loads(done.stdout)["prompt_tokens"] == 1 + len("one")
    assert "Nothing came through the pipe" in done.stderr


def test_replies_of_a_grammar(root, tmp_path):
    schema = tmp_path / "s.json"
    schema.write_text('{"type": "array", "items": {"type": "boolean"}, "minItems": 2}')
    options = ["--max-new-tokens", "40", "--json"]
    data = json.loads(good("run", root, "x", "--json-schema", schema, *options).stdout)
    assert all(type(b) is bool for b in json.loads(data["text"])) and data["finish"] == "stop"
    data = json.loads(good("run", root, "x", "--regex", "[ab]{3}", *options).stdout)
    assert len(data["text"]) == 3 and set(data["text"]) <= {"a", "b"}
    lark = tmp_path / "g.lark"
    lark.write_text('start: "yes" | "no"')
    data = json.loads(good("run", root, "x", "--grammar", lark, *options).stdout)
    assert data["text"] in ("yes", "no")


def test_stops_and_logprobs(root):
    options = ["--json", "--max-new-tokens", "6", "--logprobs", "2"]
    data = json.loads(good("run", root, "hello", *options).stdout)
    assert data["finish"] == "length" and len(data["logprobs"]) == len(data["ids"]) == 6
    assert all(len(p["top"]) == 2 and p["logprob"] <= 0 for p in data["logprobs"])
    text = data["text"]
    stop = text[2:4]
    data = json.loads(good("run", root, "hello", *options, "--stop", stop).stdout)
    assert data["text"] == text[: text.index(stop)] and data["finish"] == "stop"
    assert data["stopped_by"] == stop
    said = good("run", root, "hello", "--max-new-tokens", "6", "--stop", stop).stderr
    assert f"ended at the stop text {stop!r}" in said
    biased = good("run", root, "hello", *options, "--logit-bias", "70=1000").stdout
    assert json.loads(biased)["ids"] == [70] * 6


def command(root, *words, **options):
    line = [sys.executable, "-m", "edge_kv", *words, str(root)]
    return subprocess.run(line, capture_output=True, timeout=120, check=False, **options)


def test_streams_of_other_characters(root):
    odd = {**os.environ, "PYTHONIOENCODING": "ascii"}
    table = command(root, "inspect", env=odd)
    assert table.returncode == 0 and b"ctx" in table.stdout and not table.stderr
    document = command(root, "inspect", "--json", env=odd)
    assert json.loads(document.stdout) == json.loads(command(root, "inspect", "--json").stdout)


@pytest.mark.parametrize("closed", [(0,), (1,), (2,), (0, 1, 2)])
def test_streams_that_are_closed(root, closed):
    def close():
        for descriptor in closed:
            os.close(descriptor)

    done = command(root, "inspect", preexec_fn=close)
    assert done.returncode == 0 and not done.stderr
    assert bool(done.stdout) == (1 not in closed)


@pytest.mark.parametrize(
    "line", ["inspect {long}", "plan --weights {long} --ctx 64", "list {long}", "run {long} hi"]
)
def test_what_the_system_refuses_is_one_sentence(root, line):
    result = CliRunner().invoke(app, line.format(long="a" * 5000).split())
    assert result.exit_code == 1
    assert re.fullmatch(
        r"Error: a{200} cannot be used \(File name too long\); [^\n]*\n", result.stderr
    )


@pytest.mark.usefixtures("compiler")
def test_what_a_message_quotes_does_not_steer_the_terminal(root):
    result = CliRunner().invoke(app, ["inspect", "a\nb\x1b[2J\u202eé"])
    assert result.stderr.startswith("Error: a\\nb\\x1b[2J\\u202eé is not a directory;")
    text = "{{ raise_exception('\\x1b[2J gone\\r\\n') }}"
    art = write_artifact(root.parent / "steering", template=text)
    result = CliRunner().invoke(app, ["run", str(art), "hi"])
    assert result.exit_code == 1 and result.stderr.count("\n") == 1
    assert "\\x1b[2J gone" in result.stderr and "\x1b" not in result.stderr


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("command", [("list",), ("--version",)])
def test_a_full_disk_behind_stdout_is_one_sentence(command, unbuffered, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONUNBUFFERED", unbuffered)
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "edge_kv", *command],
            stdout=full, stderr=subprocess.PIPE, text=True, timeout=120, check=False, cwd=tmp_path,
        )  # fmt: skip
    assert done.returncode == 1 and done.stderr == "Error: No space left on device.\n"


def test_a_reader_that_has_gone_is_told_nothing(tmp_path):
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "edge_kv", "list"],
        stdout=writer, stderr=subprocess.PIPE, text=True, timeout=120, check=False, cwd=tmp_path,
    )  # fmt: skip
    os.close(writer)
    assert done.returncode == 1 and done.stderr == ""


def test_only_the_answer_lands_in_a_pipe(root, tmp_path):
    """Status and figures go to the terminal on stderr, thinking and they never into stdout."""
    master, slave = pty.openpty()
    command = [sys.executable, "-m", "edge_kv", "run", str(root), "hello", "--max-new-tokens", "9"]
    done = subprocess.run(command, stdin=slave, stdout=subprocess.PIPE, stderr=slave, timeout=120)
    os.close(slave)
    os.close(master)
    plain = json.loads(good("run", root, "hello", "--json", "--max-new-tokens", "9").stdout)
    assert done.stdout.decode() == plain["text"] + "\n"


def test_sizes_and_layers_for_people():
    values = (0, 999, 1000, 12_345, 1.5e9, 2.6e12)
    assert [size(n) for n in values] == ["0 B", "999 B", "1 kB", "12.3 kB", "1.5 GB", "2600 GB"]
    assert layers([13, 15, 16, 17, 20]) == "13, 15-17, 20"
    assert layers(np.array([3]).tolist()) == "3"
