"""Drafts on real text: tokens a second with and without them, on copied, edited and free text.

Every prompt is answered in turns without drafts and with `--drafts`; llama.cpp takes its turns with
and without its own prompt lookup where `--peer` names the GGUF file of the model. Replies are
greedy, but for free prose, which is sampled as well: small models repeat themselves when they are
greedy. Texts are those that the package ships, and a module of it; a model without a chat template
goes on with the beginning of an answer. A rate is that of the tokens behind the first one; the
median of the rounds counts. Greedy replies with and without drafts are compared: where they part,
the result says by how much plain decoding preferred its id, beside what counts as a tie.

    python benchmarks/drafts.py ARTIFACT --name gemma3_270m --peer gemma3-270m.gguf
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from statistics import geometric_mean, median
from typing import Any

from common import say, write_result

from edge_kv import amounts
from edge_kv.parity import lead
from edge_kv.runtime import Generator, Message, Options, Session, load
from edge_kv.runtime.template import RAW_TEMPLATE, Template

CTX = 2048
LOOKUP = 7  # ids that llama.cpp's prompt lookup guesses: as many as a pass of ours takes


@dataclass(frozen=True)
class Case:
    """A prompt, how its reply begins where a model only goes on with texts, and how it is drawn."""

    kind: str  # "copy" or "prose"
    name: str
    prompt: str
    begun: str
    temperature: float = 0.0

    @property
    def text(self) -> str:
        """What a model without a chat template goes on with."""
        return f"{self.prompt}\n\n{self.begun}"


def cases() -> tuple[Case, ...]:
    passage = (files("edge_kv") / "data" / "passage.txt").read_text(encoding="utf-8")
    parts = [" ".join(p.split()) for p in passage.split("\n\n")]
    code = Path(amounts.__file__).read_text(encoding="utf-8")
    code = code[code.index("def parse_bytes") :]
    shelf = "\n\n".join(f"[{n}] {part}" for n, part in enumerate(parts, 1))
    question = "Which document tells of the flood? Quote its sentences."
    edit = "Write this file again with `unit` renamed to `suffix`."
    return (
        Case("copy", "repeat", f"{parts[0]} {parts[1]}\n\nRepeat this text word for word.",
             f"{parts[0][:40]}"),
        Case("copy", "summary", f"{parts[1]}\n\nSummarise this text in its own sentences.",
             "In short:"),
        Case("copy", "answer from documents", f"{shelf}\n\n{question}", "It is document ["),
        Case("copy", "edit code", f"```python\n{code}\n```\n\n{edit}",
             f"```python\n{code[:20]}"),
        Case("prose", "story", "Tell a long story about a lighthouse keeper.",
             "There was a lighthouse keeper", 1.0),
        Case("prose", "explanation", "Explain to a friend how bread is made.", "First you", 1.0),
        Case("prose", "letter", "Write a letter to a city council about a park.", "Dear", 1.0),
        Case("prose", "greedy essay", "Write an essay about the history of glass.", "Glass"),
    )  # fmt: skip


class Ours:
    """An artifact, as a conversation runs it: what drafts have learnt stays from reply to reply."""

    def __init__(self, session: Session, drafts: str, tokens: int) -> None:
        self.session, self.tokens = session, tokens
        held = Template.of(session.artifact)
        template, self.raw = held or Template(RAW_TEMPLATE), held is None
        self.ways = {
            way: Generator(session, template=template, drafts=way) for way in ("off", drafts)
        }

    def answer(self, way: str, case: Case) -> dict[str, Any]:
        # No seed: sampling with one is fed no drafts whose number depends on time.
        options = Options(
            max_new_tokens=self.tokens, temperature=case.temperature, top_k=40, top_p=0.95,
            repetition_penalty=1.0,
        )  # fmt: skip
        generator = self.ways[way]
        generator.prompts.forget()
        prompt = case.text if self.raw else case.prompt
        turn = generator.reply([Message("user", prompt)], options=options)
        for _ in turn:
            pass
        reply = turn.reply
        assert reply
        seconds = reply.seconds - reply.first_token_seconds
        return {
            "prompt": self.session.tokens[: reply.prompt_tokens], "ids": reply.ids,
            "rate": (len(reply.ids) - 1) / seconds, "passes": reply.passes, "text": reply.text,
            "drafted": reply.drafted, "accepted": reply.accepted, "ties": reply.ties,
        }  # fmt: skip

    def parting(self, plain: dict[str, Any], ids: tuple[int, ...]) -> dict[str, Any]:
        """Where `ids` leave a plain reply, and how far its choice there was above the second."""
        pairs = zip(plain["ids"], ids, strict=False)
        shorter = min(len(plain["ids"]), len(ids))
        at = next((i for i, (a, b) in enumerate(pairs) if a != b), shorter)
        *read, last = [*plain["prompt"], *ids[:at]]
        self.session.reset()
        self.session.prefill(read)
        logits = self.session.decode(last)
        return {"at": at, "lead": round(lead(logits, int(logits.argmax())), 4)}


class LlamaCpp:
    """llama.cpp through llama-cpp-python, with and without its prompt lookup."""

    def __init__(self, path: str, threads: int, tokens: int) -> None:
        from llama_cpp import Llama
        from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

        self.tokens = tokens
        common: dict[str, Any] = {
            "model_path": path, "n_ctx": CTX, "n_threads": threads, "verbose": False,
        }  # fmt: skip
        lookup = LlamaPromptLookupDecoding(num_pred_tokens=LOOKUP)
        self.ways = {
            "off": Llama(**common),
            "lookup": Llama(**common, draft_model=lookup, logits_all=True),
        }
        self.raw = "tokenizer.chat_template" not in self.ways["off"].metadata

    def answer(self, way: str, case: Case) -> dict[str, Any]:
        model, moments = self.ways[way], []
        how: dict[str, Any] = {
            "max_tokens": self.tokens, "stream": True, "seed": 1, "temperature": case.temperature,
            "top_k": 40, "top_p": 0.95, "min_p": 0.0, "repeat_penalty": 1.0,
        }  # fmt: skip
        if self.raw:
            pieces = model.create_completion(case.text, **how)
        else:
            asked = [{"role": "user", "content": case.prompt}]
            pieces = model.create_chat_completion(asked, **how)
        for _ in pieces:
            moments.append(time.perf_counter())
        said = moments[0 if self.raw else 1 : -1]  # behind the role, before the end
        return {"rate": (len(said) - 1) / (said[-1] - said[0]) if len(said) > 1 else 0.0}


def measured(runtime: Ours | LlamaCpp, rounds: int) -> Iterator[dict[str, Any]]:
    """A row for every case: rates of both ways, alternating, after a reply that is not counted."""
    off, on = runtime.ways
    for case in cases():
        runs: dict[str, list[dict[str, Any]]] = {off: [], on: []}
        for turn in range(rounds + 1):
            for way in (off, on):
                answer = runtime.answer(way, case)
                if turn:
                    runs[way].append(answer)
        rates = {way: [r["rate"] for r in found] for way, found in runs.items()}
        plain, drafted = runs[off][-1], runs[on][-1]
        gains = [b / a for a, b in zip(rates[off], rates[on], strict=True)]
        row: dict[str, Any] = {
            "kind": case.kind, "case": case.name, "temperature": case.temperature,
            "rates": {way: round(median(found), 2) for way, found in rates.items()},
            "gain": round(median(gains), 3), "gains": [round(g, 3) for g in gains],
        }  # fmt: skip
        if isinstance(runtime, Ours):
            ids, others = plain["ids"], drafted["ids"]
            row |= {
                "tokens": len(others), "same": ids == others, "text": drafted["text"][:300],
                **{name: drafted[name] for name in ("passes", "drafted", "accepted", "ties")},
            }  # fmt: skip
            if ids != others and not case.temperature:
                row["parted"] = runtime.parting(plain, others)
        say(f"{case.kind:<6}{case.name:<22} {row['rates']} gain {row['gain']}")
        yield row


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--name", help="write results/drafts_NAME.json")
    parser.add_argument("--engine", default="onnx")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--drafts", default="auto")
    parser.add_argument("--tokens", type=int, default=128, help="most of a reply")
    parser.add_argument("--peer", help="the model's GGUF file, for llama.cpp")
    args = parser.parse_args()
    with load(args.artifact, args.engine, args.threads) as session:
        rows = list(measured(Ours(session, args.drafts, args.tokens), args.rounds))
        quant, rounding = session.artifact.manifest.quant.scheme, session.rounding
    document: dict[str, Any] = {
        "benchmark": "drafts", "engine": args.engine, "threads": args.threads, "quant": quant,
        "drafts": args.drafts, "tokens": args.tokens, "rounding": rounding, "rows": rows,
        "gain": gains(rows),
    }  # fmt: skip
    if args.peer:
        peer = list(measured(LlamaCpp(args.peer, args.threads, args.tokens), args.rounds))
        document["llama.cpp"] = {
            "by": f"llama-cpp-python {version('llama-cpp-python')}", "guessed": LOOKUP,
            "rows": peer, "gain": gains(peer),
        }  # fmt: skip
    say(f"gain {document['gain']}")
    if args.name:
        write_result(f"drafts_{args.name}", document)


def gains(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Geometric mean and least gain of each kind of text."""
    found: dict[str, float] = {}
    for kind in ("copy", "prose"):
        of_kind = [r["gain"] for r in rows if r["kind"] == kind]
        found[kind] = round(geometric_mean(of_kind), 3)
        found[f"{kind}_least"] = min(of_kind)
    return found


if __name__ == "__main__":
    main()
