"""Train `tiny`, the Gemma-4-architecture language model that ships inside the package.

    apt-get install bible-kjv bible-kjv-text      # the corpus, public domain, and its reader
    python benchmarks/train_tiny.py --out edge_kv/data/tiny

The model has every feature of Gemma 4 E2B at small scale (sliding and full layers, KV sharing,
per-layer embeddings, multi-query attention, double-wide MLPs, partial rotary embedding) and
learns the King James Bible with its own byte-level BPE tokenizer. Five books are held out for
validation. Initial weights, batches and samples all follow from --seed.

Written to --out: config.json, model.safetensors (bf16), tokenizer.json, chat_template.jinja and
README.md; the training record goes to --report. A running average of the weights is saved every
--save-every steps, so a usable model exists long before the last step.
"""

import argparse
import json
import math
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers.models.gemma4 import Gemma4ForCausalLM, Gemma4TextConfig

SPECIAL = ["<pad>", "<eos>", "<bos>", "<|turn>", "<turn|>"]  # ids 0 to 4
PAD, EOS, BOS = 0, 1, 2
VOCAB = 2048
HELD_OUT = ("Ruth", "Eccl", "Hos", "Jonah", "Jas")
PROMPTS = ("In the beginning", "And the king said unto his servants,", "Blessed is the man that")

CHAT_TEMPLATE = """\
{#- The model continues text, so a conversation is the text written so far: what the user wrote
    is followed directly by its continuation, and the next user message starts a new line. -#}
{{- bos_token -}}
{%- for message in messages -%}
{%- if not loop.first and message['role'] == 'user' %}{{ '\\n' }}{% endif -%}
{{- message['content'] -}}
{%- endfor -%}
"""

README = """\
# tiny

A language model of {params:.2f} million parameters with the architecture of Gemma 4 E2B, trained
from scratch for edge-kv. It continues text in the style of the King James Bible; it follows no
instructions. It contains no weights and no text of any released Gemma model.

- Made by: `{command}`
  (seed {seed}; saved after {steps_done} of {steps} steps, {tokens:,} training tokens,
  {minutes:.0f} minutes on {threads} thread(s) of a shared {machine}).
- Corpus: the Authorized (King James) Version as packed in Debian's `bible-kjv-text` {package}.
  The copyright of the text is expired (public domain); the weights fall under the licence of
  edge-kv. Book, chapter and verse numbers are removed; one verse per line, an empty line between
  chapters.
- Held out for validation: {held_out} ({held_bytes:,} bytes, {held_share:.1%} of the corpus).
- Validation: perplexity {ppl:.2f} per token, {word_ppl:.1f} per word, {bpb:.3f} bits per byte
  (bf16-rounded weights, windows of 512 tokens).
- Layers: {layers} ({pattern}; S = sliding window of {window}, F = full), of which the last
  {shared} share keys and values; hidden {hidden}, MLP {mlp} (doubled in the sharing layers),
  {heads} query heads and 1 key/value head of {hd} (sliding) or {ghd} (full) dimensions,
  per-layer embeddings of {ple}.
- Tokenizer: byte-level BPE of {vocab} entries, so every string survives a round trip;
  `<pad>` 0, `<eos>` 1, `<bos>` 2, `<|turn>` 3, `<turn|>` 4. Every text starts with `<bos>`; a book
  ends with `<eos>`. The turn marks were never trained.
- Trained on windows of up to {longest:,} tokens; longer contexts run, but their
  quality is not claimed.

The full record (loss curve, samples) is `benchmarks/results/tiny_training.json`.
"""


def model_config() -> Gemma4TextConfig:
    """Gemma 4 E2B in miniature."""
    return Gemma4TextConfig(
        vocab_size=VOCAB,
        vocab_size_per_layer_input=VOCAB,
        hidden_size=128,
        hidden_size_per_layer_input=32,
        intermediate_size=256,
        use_double_wide_mlp=True,
        num_hidden_layers=8,
        layer_types=(["sliding_attention"] * 3 + ["full_attention"]) * 2,
        num_kv_shared_layers=4,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=32,
        global_head_dim=64,
        sliding_window=64,
        final_logit_softcapping=30.0,
        max_position_embeddings=32768,
        tie_word_embeddings=True,
        pad_token_id=PAD,
        eos_token_id=EOS,
        bos_token_id=BOS,
        initializer_range=0.05,
        dtype="float32",
    )


def read_corpus(text: Path | None) -> dict[str, str]:
    """Book abbreviation -> its prose, from --text or from the Debian package's reader.

    Both give lines such as `Ge1:1 In the beginning ...`.
    """
    if text:
        dump = text.read_text(encoding="ascii")
    elif program := shutil.which("bible"):
        command = [program, "-f", "Gen1:1-Rev22:21"]
        dump = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    else:
        sys.exit(
            "The program `bible` is not installed: run `apt-get install bible-kjv bible-kjv-text`, "
            "or save the output of `bible -f Gen1:1-Rev22:21` and pass it with --text."
        )
    books: dict[str, str] = {}
    chapter = ""
    for book, number, verse in re.findall(r"^(\d?[A-Za-z]+)(\d+):\d+ +(.*)$", dump, re.MULTILINE):
        new_chapter = book in books and number != chapter
        books[book] = books.get(book, "") + ("\n" if new_chapter else "") + verse.strip() + "\n"
        chapter = number
    if missing := set(HELD_OUT) - set(books):
        sys.exit(f"The corpus lacks the books {', '.join(sorted(missing))}.")
    return books


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """A byte-level BPE that puts `<bos>` before every text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=VOCAB,
            special_tokens=SPECIAL,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", BOS)]
    )
    return tokenizer


def encode(tokenizer: Tokenizer, book: str) -> list[int]:
    """The tokens of a whole book, closed by `<eos>` and without the leading `<bos>`."""
    return [*tokenizer.encode(book, add_special_tokens=False).ids, EOS]


class Windows:
    """Random training windows: `<bos>`, then text from the start of a verse."""

    def __init__(self, books: list[list[int]], newlines: set[int], seed: int) -> None:
        self.tokens = torch.tensor([t for book in books for t in book])
        breaks = torch.tensor([t == EOS or t in newlines for t in self.tokens.tolist()])
        self.starts = torch.cat([torch.zeros(1, dtype=torch.long), breaks.nonzero()[:, 0] + 1])
        self.generator = torch.Generator().manual_seed(seed)

    def batch(self, count: int, length: int) -> torch.Tensor:
        """`count` rows of `length + 1` tokens: inputs and, shifted by one, targets."""
        starts = self.starts[self.starts <= len(self.tokens) - length]
        picks = starts[torch.randint(len(starts), (count,), generator=self.generator)]
        text = self.tokens[picks[:, None] + torch.arange(length)]
        return torch.cat([torch.full((count, 1), BOS), text], dim=1)


def initial_model(seed: int) -> Gemma4ForCausalLM:
    """A fresh model whose attention starts soft and whose layer scalars differ and can learn.

    Gemma 4 scores with a scale of 1, so the query and key norms share the usual 1/sqrt(head_dim).
    """
    torch.manual_seed(seed)
    model = Gemma4ForCausalLM(model_config())
    for layer in model.model.layers:
        attention = layer.self_attn
        for norm in (attention.q_norm, getattr(attention, "k_norm", None)):
            if norm is not None:
                torch.nn.init.constant_(norm.weight, attention.head_dim**-0.25)
        torch.nn.init.uniform_(layer.layer_scalar, 0.9, 1.1)
        layer.layer_scalar.requires_grad_(True)
    return model


def optimizers(model: Gemma4ForCausalLM, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the projection matrices, AdamW for embeddings, norms and layer scalars."""
    matrices, rest = [], [layer.layer_scalar for layer in model.model.layers]
    for name, parameter in model.named_parameters():
        (matrices if parameter.ndim == 2 and "embed" not in name else rest).append(parameter)
    return [
        torch.optim.Muon(matrices, lr=lr, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def schedule(step: int, steps: int) -> float:
    """Share of the peak learning rate: a short warm-up, then a cosine down to 3 %."""
    warm_up = min(1.0, (step + 1) / 40)
    return warm_up * (0.03 + 0.97 * 0.5 * (1 + math.cos(math.pi * step / steps)))


def window_length(step: int, steps: int) -> int:
    """Short windows first, then 512 tokens with every fourth step at 1,024."""
    if step < 0.6 * steps:
        return 256
    return 1024 if step % 4 == 0 else 512


def token_losses(model: Gemma4ForCausalLM, rows: torch.Tensor) -> torch.Tensor:
    """Cross entropy in nats of every target in rows of inputs and shifted targets."""
    logits = model(input_ids=rows[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1).float(), rows[:, 1:].flatten(), reduction="none")


@torch.inference_mode()
def validate(
    model: Gemma4ForCausalLM, books: list[list[int]], texts: list[str]
) -> dict[str, float]:
    """Perplexity on the held-out books, in consecutive windows of 512 tokens."""
    total, count = 0.0, 0
    for book in books:
        for i in range(0, len(book), 512):
            piece = book[i : i + 512]
            total += token_losses(model, torch.tensor([[BOS, *piece]])).sum().item()
            count += len(piece)
    characters, words = sum(map(len, texts)), sum(len(t.split()) for t in texts)
    return {
        "tokens": count,
        "nats_per_token": total / count,
        "perplexity_per_token": math.exp(total / count),
        "perplexity_per_word": math.exp(total / words),
        "perplexity_per_byte": math.exp(total / characters),
        "bits_per_byte": total / characters / math.log(2),
    }


def samples(model: Gemma4ForCausalLM, tokenizer: Tokenizer, seed: int) -> list[dict[str, str]]:
    """One continuation per prompt at temperature 0.8."""
    torch.manual_seed(seed)
    found = []
    for prompt in PROMPTS:
        ids = torch.tensor([tokenizer.encode(prompt).ids])
        out = model.generate(
            ids, do_sample=True, temperature=0.8, top_k=0, max_new_tokens=120, pad_token_id=PAD
        )
        text = tokenizer.decode(out[0, ids.shape[1] :].tolist())
        found.append({"prompt": prompt, "continuation": text})
    return found


def shipped_copy(model: Gemma4ForCausalLM) -> Gemma4ForCausalLM:
    """The model as readers will see it: weights rounded to bf16, computed in float32."""
    copy = Gemma4ForCausalLM(model_config())
    copy.load_state_dict({k: v.detach() for k, v in model.state_dict().items()})
    return copy.to(torch.bfloat16).float().eval()


def save(model: Gemma4ForCausalLM, tokenizer: Tokenizer, out: Path) -> None:
    """Config, bf16 weights (the tied head only once), tokenizer and chat template."""
    out.mkdir(parents=True, exist_ok=True)
    model.config.dtype = torch.bfloat16
    model.config.architectures = ["Gemma4ForCausalLM"]
    model.config.save_pretrained(out)
    state = {k: v.to(torch.bfloat16).clone() for k, v in model.state_dict().items()}
    state.pop("lm_head.weight")
    save_file(state, out / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save(str(out / "tokenizer.json"))
    (out / "chat_template.jinja").write_text(CHAT_TEMPLATE)


def machine() -> str:
    """The processor's name."""
    info = Path("/proc/cpuinfo").read_text() if os.path.exists("/proc/cpuinfo") else ""
    found = re.search(r"model name\s*: (.*)", info)
    return found.group(1) if found else platform.processor() or platform.machine()


def package_version() -> str:
    """The installed version of the corpus package, if dpkg knows it."""
    if not shutil.which("dpkg-query"):
        return ""
    query = ["dpkg-query", "-W", "-f", "${Version}", "bible-kjv-text"]
    return subprocess.run(query, capture_output=True, text=True).stdout.strip()


def write_readme(record: dict[str, Any], config: Gemma4TextConfig, out: Path) -> None:
    """README.md of the model, from the training record."""
    validation, run = record["validation"], record["run"]
    text = README.format(
        params=record["parameters"] / 1e6,
        command=record["command"],
        seed=run["seed"],
        steps=run["steps"],
        steps_done=run["steps_done"],
        tokens=run["tokens"],
        longest=max(window_length(i, run["steps"]) for i in range(run["steps_done"])),
        minutes=run["wall_seconds"] / 60,
        threads=record["machine"]["threads"],
        machine=record["machine"]["cpu"],
        package=record["corpus"]["package_version"],
        held_out=", ".join(HELD_OUT),
        held_bytes=record["corpus"]["held_out_bytes"],
        held_share=record["corpus"]["held_out_bytes"] / record["corpus"]["bytes"],
        ppl=validation["perplexity_per_token"],
        word_ppl=validation["perplexity_per_word"],
        bpb=validation["bits_per_byte"],
        layers=config.num_hidden_layers,
        pattern="".join(kind[0].upper() for kind in config.layer_types),
        window=config.sliding_window,
        shared=config.num_kv_shared_layers,
        hidden=config.hidden_size,
        mlp=config.intermediate_size,
        heads=config.num_attention_heads,
        hd=config.per_layer_config[0].head_dim,
        ghd=config.per_layer_config[config.layer_types.index("full_attention")].head_dim,
        ple=config.hidden_size_per_layer_input,
        vocab=config.vocab_size,
    )
    (out / "README.md").write_text(text)


def train(
    model: Gemma4ForCausalLM, average: AveragedModel, windows: Windows, args: argparse.Namespace
) -> Iterator[tuple[int, int, float]]:
    """Yield (steps done, tokens seen, loss) after every step; `average` follows the weights."""
    groups = optimizers(model, args.lr)
    tokens = 0
    for step in range(args.steps):
        length = window_length(step, args.steps)
        rows = windows.batch(args.batch_tokens // length, length)
        loss = token_losses(model, rows).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in groups:
            for group in optimizer.param_groups:
                group["lr"] = args.lr * schedule(step, args.steps)
            optimizer.step()
            optimizer.zero_grad()
        average.update_parameters(model)
        tokens += rows[:, 1:].numel()
        yield step + 1, tokens, loss.item()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--out", type=Path, default=Path("edge_kv/data/tiny"), help="directory of the model")
    add("--report", type=Path, default=Path("benchmarks/results/tiny_training.json"))
    add("--text", type=Path, help="output of `bible -f Gen1:1-Rev22:21` (default: run it)")
    add("--steps", type=int, default=1500)
    add("--batch-tokens", type=int, default=2048, help="tokens per step")
    add("--lr", type=float, default=6e-3, help="peak learning rate")
    add("--seed", type=int, default=1611)
    add("--threads", type=int, default=1)
    add("--save-every", type=int, default=450, help="steps between saved models")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    books = read_corpus(args.text)
    training = [text for name, text in books.items() if name not in HELD_OUT]
    held_out = [books[name] for name in HELD_OUT]
    tokenizer = train_tokenizer(training)
    newlines = {i for token, i in tokenizer.get_vocab().items() if token.endswith("Ċ")}
    windows = Windows([encode(tokenizer, text) for text in training], newlines, args.seed)
    held_out_tokens = [encode(tokenizer, text) for text in held_out]

    model = initial_model(args.seed)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.98), use_buffers=True)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters:,} parameters, {len(windows.tokens):,} training tokens", flush=True)

    began = time.monotonic()
    curve: list[dict[str, float]] = []
    recent: list[float] = []
    for step, tokens, loss in train(model, average, windows, args):
        recent.append(loss)
        if step % 20 == 0 or step == args.steps:
            point = {"step": step, "tokens": tokens, "loss": round(sum(recent) / len(recent), 4)}
            curve.append(point)
            recent.clear()
            print(point, f"{tokens / (time.monotonic() - began):.0f} tokens/s", flush=True)
        if step % args.save_every and step != args.steps:
            continue
        shipped = shipped_copy(average.module)
        record = {
            "command": shlex.join(["python", *sys.argv]),
            "machine": {
                "cpu": machine(),
                "cores": os.cpu_count(),
                "threads": args.threads,
                "load_average": [round(x, 1) for x in os.getloadavg()],
                "conditions": "shared with other jobs; the wall time is an upper bound",
            },
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
            "corpus": {
                "name": "King James Version, Debian bible-kjv-text",
                "package_version": package_version(),
                "bytes": sum(map(len, books.values())),
                "held_out": list(HELD_OUT),
                "held_out_bytes": sum(map(len, held_out)),
                "training_tokens": len(windows.tokens),
            },
            "parameters": parameters,
            "run": {
                "seed": args.seed,
                "steps": args.steps,
                "steps_done": step,
                "tokens": tokens,
                "peak_lr": args.lr,
                "wall_seconds": round(time.monotonic() - began, 1),
            },
            "validation": validate(shipped, held_out_tokens, held_out),
            "layer_scalars": [x.layer_scalar.item() for x in shipped.model.layers],
            "samples": samples(shipped, tokenizer, args.seed),
            "loss_curve": curve,
        }
        save(shipped, tokenizer, args.out)
        write_readme(record, shipped.config, args.out)
        args.report.parent.mkdir(parents=True, exist_ok=True)
        args.report.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")
        print("saved:", record["validation"], record["samples"][0], flush=True)


if __name__ == "__main__":
    main()
