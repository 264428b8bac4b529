"""One measurement of one runtime in this process; or the making of its model.

`peers.py` starts it with the Python of the environment that has the runtime, so it needs nothing
but that runtime. A job comes as JSON on stdin; the last line of stdout is its row as JSON. Another
prompt is read first and two tokens are made from it: the first pass of some runtimes packs weights.

    PEER/bin/python benchmarks/peer_worker.py make openvino-genai HF_DIR OUT
"""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from importlib.metadata import version
from importlib.util import module_from_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

CTX = 1024  # tokens of state where a runtime allocates it up front
Tick = Callable[[], None]


class Stepwise:
    """A runtime that is fed by this process: `feed` takes ids and returns the likeliest next."""

    def reset(self) -> None:
        """Forget all tokens."""

    def feed(self, ids: list[int]) -> int:
        raise NotImplementedError

    def generate(self, ids: list[int], tokens: int, tick: Tick) -> None:
        """Read `ids`, decode `tokens` greedily; `tick` as each of the 1 + `tokens` is known."""
        self.reset()
        token = self.feed(ids)
        tick()
        for _ in range(tokens):
            token = self.feed([token])
            tick()


class EdgeKV(Stepwise):
    """An artifact of this project."""

    def __init__(self, model: str, threads: int, engine: str) -> None:
        from edge_kv.runtime import load

        self.session = load(model, engine, threads=threads)

    def reset(self) -> None:
        self.session.reset()

    def feed(self, ids: list[int]) -> int:
        self.session.prefill(ids[:-1])
        return int(self.session.decode(ids[-1]).argmax())


class Transformers(Stepwise):
    """The eager model; safetensors are mapped, so weights of the file's dtype are not copied."""

    def __init__(self, model: str, threads: int, dtype: str, attention: str) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(threads)
        self.torch = torch
        self.model: Any = AutoModelForCausalLM.from_pretrained(
            model, dtype=getattr(torch, dtype), attn_implementation=attention
        ).eval()

    def reset(self) -> None:
        self.cache: Any = None

    def feed(self, ids: list[int]) -> int:
        with self.torch.inference_mode():
            out = self.model(
                input_ids=self.torch.tensor([ids]), cache=self.cache, use_cache=True,
                logits_to_keep=1,
            )  # fmt: skip
        self.cache = out.cache
        return int(out.logits[0, -1].argmax())

    @staticmethod
    def make(source: str, out: str) -> None:
        """bfloat16 safetensors and tokenizer from a GGUF file: what the other peers start from."""
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

        folder, file = os.path.split(os.path.abspath(source))
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            gguf_file=file,
            dtype=torch.bfloat16,
            quantization_config=GgufConfig(dequantize=True),
        )
        model.save_pretrained(out)
        AutoTokenizer.from_pretrained(folder, gguf_file=file).save_pretrained(out)


class OnnxGenAI:
    """onnxruntime-genai on the directory that its builder wrote."""

    def __init__(self, model: str, threads: int) -> None:
        import onnxruntime_genai

        config = onnxruntime_genai.Config(model)
        options = {"intra_op_num_threads": threads}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
        self.genai: Any = onnxruntime_genai
        self.model: Any = onnxruntime_genai.Model(config)

    def generate(self, ids: list[int], tokens: int, tick: Tick) -> None:
        parameters = self.genai.GeneratorParams(self.model)
        # The least length keeps an end token from ending the run.
        parameters.set_search_options(max_length=CTX, min_length=CTX, do_sample=False)
        generator = self.genai.Generator(self.model, parameters)
        generator.append_tokens(ids)
        for _ in range(1 + tokens):
            generator.generate_next_token()
            tick()

    @staticmethod
    def make(source: str, out: str) -> None:
        """int4 in blocks of 32, head included.

        The builder takes Gemma 3's two ropes from `rope_parameters` and `rope_local_base_freq`;
        transformers 5 has both in one dictionary.
        """
        import onnxruntime_genai

        models = Path(onnxruntime_genai.__file__).parent / "models"
        sys.path.insert(0, str(models))
        from builders import base

        begin = base.Model.make_config_init

        def flat(model: Any, config: Any) -> None:
            ropes = config.rope_parameters
            config.rope_parameters = ropes["full_attention"]
            config.rope_local_base_freq = ropes["sliding_attention"]["rope_theta"]
            begin(model, config)

        base.Model.make_config_init = flat
        sys.argv = ["builder", "-i", source, "-o", out, "-p", "int4", "-e", "cpu"]
        sys.argv += ["-c", f"{out}.cache", "--extra_options", "int4_block_size=32"]
        runpy.run_path(str(models / "builder.py"), run_name="__main__")


class OpenVINO:
    """OpenVINO GenAI, timed by the calls of its streamer."""

    def __init__(self, model: str, threads: int) -> None:
        import numpy
        import openvino
        import openvino_genai

        class Clock(openvino_genai.StreamerBase):  # type: ignore[misc]
            """Ticks at every token; a subclass because the pipeline streams text otherwise."""

            def __init__(self, tick: Tick) -> None:
                super().__init__()
                self.tick = tick

            def write(self, token: Any) -> Any:
                self.tick()
                return openvino_genai.StreamingStatus.RUNNING

            def end(self) -> None: ...

        self.clock = Clock
        self.tensor = lambda ids: openvino.Tensor(numpy.array([ids], numpy.int64))
        self.model: Any = openvino_genai.LLMPipeline(model, "CPU", INFERENCE_NUM_THREADS=threads)

    def generate(self, ids: list[int], tokens: int, tick: Tick) -> None:
        self.model.generate(
            self.tensor(ids), streamer=self.clock(tick), max_new_tokens=1 + tokens,
            ignore_eos=True, do_sample=False, apply_chat_template=False,
        )  # fmt: skip

    @staticmethod
    def make(source: str, out: str) -> None:
        """int4 in groups of 32, head included."""
        program = Path(sys.executable).with_name("optimum-cli")
        task = ["--task", "text-generation-with-past"]
        store = ["--weight-format", "int4", "--group-size", "32", "--ratio", "1.0"]
        subprocess.run(
            [program, "export", "openvino", "--model", source, *task, *store, out],
            check=True,
            env=os.environ | {"HF_HUB_OFFLINE": "1"},
        )


class LiteRT:
    """LiteRT-LM. It takes text: the prompt's ids are turned back into it, its start token apart."""

    def __init__(self, model: str, threads: int) -> None:
        import litert_lm

        self.greedy = litert_lm.SamplerConfig(top_k=1)
        self.engine: Any = litert_lm.Engine(
            model, backend=litert_lm.Backend.CPU(thread_count=threads), max_num_tokens=CTX
        )

    def generate(self, ids: list[int], tokens: int, tick: Tick) -> None:
        text = self.engine.detokenize(ids[1:])
        session = self.engine.create_session(
            apply_prompt_template=False, sampler_config=self.greedy, max_output_tokens=1 + tokens
        )
        with session:
            session.run_prefill([text])
            for _ in session.run_decode_async():
                tick()

    @staticmethod
    def make(source: str, out: str) -> None:
        """int8 weights, activations quantised as they come.

        The exporter imports TensorFlow's schema of the file format, which ai-edge-litert has too.
        """
        from ai_edge_litert import schema_py_generated

        for name in ("tensorflow", "tensorflow.lite", "tensorflow.lite.python"):
            sys.modules[name] = module_from_spec(ModuleSpec(name, None))
        sys.modules["tensorflow.lite.python"].schema_py_generated = schema_py_generated  # type: ignore[attr-defined]
        from litert_torch.generative.export_hf.export import export

        export(
            source,
            out,
            prefill_lengths=[512],
            cache_length=CTX,
            quantization_recipe="dynamic_wi8_afp32",
        )


# Runtime -> its class and the package whose version counts.
RUNTIMES: dict[str, tuple[type[Any], str]] = {
    "edge-kv": (EdgeKV, "edge-kv"),
    "transformers": (Transformers, "transformers"),
    "onnxruntime-genai": (OnnxGenAI, "onnxruntime-genai"),
    "openvino-genai": (OpenVINO, "openvino-genai"),
    "litert-lm": (LiteRT, "litert-lm"),
}


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Seconds of the load, up to the first token, and between the tokens after it."""
    runtime, package = RUNTIMES[job["runtime"]]
    begin = time.perf_counter()
    subject = runtime(job["model"], job["threads"], **job["options"])
    load = time.perf_counter() - begin
    subject.generate(job["warm"], 2, lambda: None)
    times = [time.perf_counter()]
    subject.generate(job["prompt"], job["tokens"], lambda: times.append(time.perf_counter()))
    first, *others = (b - a for a, b in pairwise(times))
    return {"load": load, "first": first, "others": others, "version": version(package)}


if __name__ == "__main__":
    if sys.argv[1:2] == ["make"]:
        RUNTIMES[sys.argv[2]][0].make(*sys.argv[3:])
    else:
        print(json.dumps(measure(json.load(sys.stdin))))
