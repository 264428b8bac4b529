"""Template fidelity: generated conversations, rendered here and by transformers.

Conversations have system prompts, several turns, thinking, tools, calls and their results; every
template renders each of them with thinking asked for, forbidden and left open. What a template
refuses has to be refused in both. The templates are those of template_shapes.py, one in the shape
of each family that runs, and those of a folder: public projects ship such folders, for example
`models/templates` of llama.cpp.

python benchmarks/templates.py [DIR] --write
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import machine, write_result
from template_shapes import SHAPES

from edge_kv.errors import EdgeKVError
from edge_kv.runtime.messages import Message, Tool, ToolCall
from edge_kv.runtime.template import Template

WORDS = [
    "What is the weather in Oslo?", " padded \n", "ünï 🎉 世界", 'a "quoted" <b> & \\ thing', "",
    "{}", "two\n\nparagraphs", "1 < 2", "</think> in a text", "x" * 300,
]  # fmt: skip
TOOLS = (
    Tool(
        "get_weather",
        "The weather of a place.",
        {
            "type": "object",
            "properties": {
                "place": {"type": "string", "description": "Where?"},
                "days": {"type": "integer", "description": "How many?"},
                "unit": {"type": "string", "enum": ["C", "F"], "description": "Degrees."},
                "parts": {"type": "array", "items": {"type": "string"}, "description": "Which?"},
            },
            "required": ["place"],
        },
    ),
    Tool("now", "The time.", {"type": "object", "properties": {}}),
)


@dataclass(frozen=True)
class Conversation:
    """What is rendered: messages, tools, and whether the model is to think."""

    messages: tuple[Message, ...]
    tools: tuple[Tool, ...]
    variables: dict[str, Any]


def conversations(count: int, seed: int = 0) -> Iterator[Conversation]:
    """Generated conversations that end with a question or with the result of a tool."""
    rng = random.Random(seed)
    for _ in range(count):
        tools = TOOLS if rng.random() < 0.5 else ()
        messages = [Message("system", rng.choice(WORDS))] if rng.random() < 0.5 else []
        for turn in range(rng.randint(1, 4)):
            messages.append(Message("user", rng.choice(WORDS)))
            if tools and rng.random() < 0.5:
                messages += _called(rng, turn)
            if rng.random() < 0.3:
                break
            messages.append(Message("assistant", rng.choice(WORDS), _thought(rng)))
        if messages[-1].role == "assistant":
            messages.append(Message("user", rng.choice(WORDS)))
        think = rng.choice([{}, {"enable_thinking": True}, {"enable_thinking": False}])
        yield Conversation(tuple(messages), tools, think)


def compare(source: str, wanted: list[Conversation]) -> tuple[int, int, list[str]]:
    """How many conversations render alike, how many both refuse, and what differs."""
    from transformers.utils.chat_template_utils import render_jinja_template

    template = Template(source)
    alike, refused, differ = 0, 0, []
    for conversation in wanted:
        messages = [m.as_dict() for m in conversation.messages]
        tools = [t.as_dict() for t in conversation.tools] or None
        names = {"bos_token": "<bos>", "eos_token": "<eos>", **conversation.variables}
        try:
            texts, _ = render_jinja_template(
                [messages], tools=tools, chat_template=source, add_generation_prompt=True, **names
            )
            theirs = texts[0]
        except Exception:
            theirs = None
        try:
            ours = template.render(messages, tools=tools, **names)
        except EdgeKVError:
            ours = None
        if ours != theirs:
            differ.append(json.dumps(messages, ensure_ascii=False)[:200])
        elif ours is None:
            refused += 1
        else:
            alike += 1
    return alike, refused, differ


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("folder", type=Path, nargs="?", help="more templates: *.jinja")
    parser.add_argument("--count", type=int, default=200, help="conversations a template renders")
    parser.add_argument("--write", action="store_true", help="keep it as a result")
    args = parser.parse_args()
    wanted = list(conversations(args.count))
    sources = {f"in the shape of {family}": source for family, source in SHAPES.items()}
    for path in sorted(args.folder.glob("*.jinja")) if args.folder else []:
        sources[path.stem] = path.read_text(encoding="utf-8")
    rows, faults = {}, 0
    for name, source in sources.items():
        alike, refused, differ = compare(source, wanted)
        rows[name] = {"alike": alike, "refused_by_both": refused, "differ": len(differ)}
        faults += len(differ)
        print(name, rows[name], *differ[:2], file=sys.stderr)
    document = {
        "benchmark": "templates",
        "conversations": args.count,
        "templates": len(rows),
        "alike": sum(r["alike"] for r in rows.values()),
        "refused_by_both": sum(r["refused_by_both"] for r in rows.values()),
        "differ": faults,
        "rows": rows,
        "machine": machine(),
    }
    print(json.dumps({k: v for k, v in document.items() if k not in ("rows", "machine")}))
    if args.write:
        write_result("templates", document)
    sys.exit(faults > 0)


def _called(rng: random.Random, turn: int) -> list[Message]:
    """A turn of the model that calls a tool, and what the tool answers."""
    arguments: dict[str, Any] = {"place": rng.choice(WORDS)}
    if rng.random() < 0.5:
        arguments |= {"days": rng.randint(1, 9), "parts": rng.choices(WORDS, k=2)}
    call = ToolCall("get_weather", arguments, f"call_{turn}")
    said = rng.choice(["", "Let me look."])
    result = rng.choice(['{"degrees": 12}', "rain", ""])
    return [
        Message("assistant", said, _thought(rng), (call,)),
        Message("tool", result, name="get_weather", call_id=call.id),
    ]


def _thought(rng: random.Random) -> str:
    return rng.choice(["", "", "Hm.", "First\n\nthen <b>"])


if __name__ == "__main__":
    main()
