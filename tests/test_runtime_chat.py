"""Chat: templates, streamed text that splits no character, reuse between turns, saving."""

import types

import numpy as np
import pytest
from fake_artifact import SPECIALS, TEMPLATE, NumpySession, edit_manifest, write_artifact
from hypothesis import given
from hypothesis import strategies as st

from edge_kv.artifact import read_artifact
from edge_kv.cli.repl import figures
from edge_kv.errors import (
    ArtifactError,
    ConfigError,
    ContextFullError,
    PromptError,
    SnapshotError,
)
from edge_kv.runtime.chat import RAW_TEMPLATE, Chat, Generator, Message, Options, Template
from edge_kv.runtime.sampling import Sampling
from edge_kv.runtime.text import TextStream, Tokenizer

END = SPECIALS.index("<end_of_turn>")


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    root = tmp_path_factory.mktemp("chat") / "a"
    return read_artifact(write_artifact(root, ctx=512, programs=False, verify=False))


@pytest.fixture(scope="module")
def tokenizer(artifact):
    return Tokenizer.of(artifact)


class Scripted(NumpySession):
    """Says a given text, one byte a token, then ends its turn."""

    def __init__(self, artifact, *replies):
        super().__init__(artifact)
        self.replies = list(replies)
        self.left, self.said = [], []

    def say(self, tokenizer):
        text = self.replies.pop(0)
        self.left = [*tokenizer.encode(text, start=False), END]

    def stop_of(self, chat):
        return END

    def _run_decode(self, ids, pos):
        logits = super()._run_decode(ids, pos)
        for row in logits:
            self.said.append(self.left.pop(0) if self.left else END)
            row[self.said[-1]] = 1e6
        return logits

    def refuse(self, n):
        super().refuse(n)
        self.left = self.said[-n:] + self.left
        del self.said[-n:]


def ask(chat, text):
    chat.session.say(chat.tokenizer)
    return list(chat.send(text))


@given(st.text(max_size=30))
def test_pieces_join_to_the_text_and_split_no_character(tokenizer, text):
    stream = TextStream(tokenizer)
    pieces = [stream.feed(t) for t in tokenizer.encode(text, start=False)]
    last = stream.flush()
    if "\ufffd" not in text:
        assert all("\ufffd" not in p for p in pieces) and last == ""
    assert "".join(pieces) + last == tokenizer.decode(tokenizer.encode(text, start=False))


def test_bytes_that_are_no_character_come_out_at_the_end(tokenizer):
    ids = tokenizer.encode("aé", start=False)
    stream = TextStream(tokenizer)
    assert [stream.feed(t) for t in ids[:-1]] == ["a", ""]
    assert stream.done == 1
    assert stream.flush() == "\ufffd" and stream.done == 2


def test_special_tokens_make_no_text(tokenizer):
    stream = TextStream(tokenizer)
    ids = [*tokenizer.encode("a", start=False), END, *tokenizer.encode("b", start=False)]
    assert "".join(stream.feed(t) for t in ids) + stream.flush() == "ab"


def test_start_token_goes_first_once(tokenizer):
    bos = tokenizer.bos_id
    assert tokenizer.encode("a")[0] == bos
    assert tokenizer.encode("<bos>a").count(bos) == 1
    assert bos not in tokenizer.encode("a", start=False)


def test_template_follows_hugging_face_conventions():
    source = (
        "{%- for m in messages -%}{% if m.role == 'bad' %}{{ raise_exception('no ' + m.role) }}"
        "{% endif %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m | tojson }}{%- endfor %}\n"
        "  {% if add_generation_prompt %}\n{{ bos_token }}{{ strftime_now('%Y')[:1] }}{% endif %}"
    )
    template = Template(source)
    messages = [{"role": "user", "content": "<é>"}, {"role": "user", "content": "b"}]
    text = template.render(messages, bos_token="<bos>")
    assert text == '{"role": "user", "content": "<é>"}<bos>2'
    with pytest.raises(PromptError, match="refuses this conversation: no bad"):
        template.render([{"role": "bad", "content": ""}])


def test_template_is_sandboxed():
    spy = Template("{{ messages.__class__.__mro__ }}")
    with pytest.raises(PromptError, match="unsafe"):
        spy.render([{"role": "user", "content": ""}])
    with pytest.raises(PromptError):
        Template("{{ messages.append(1) }}").render([])


def test_broken_template_is_an_artifact_error(tmp_path):
    with pytest.raises(ArtifactError, match="not a valid Jinja template"):
        Template("{% for %}")
    root = write_artifact(tmp_path / "a", programs=False, verify=False)
    path = root / "chat_template.jinja"
    path.write_bytes(b"\xff" * path.stat().st_size)
    with pytest.raises(ArtifactError, match="Cannot read the chat template"):
        Chat(NumpySession(read_artifact(root)))


def test_turns_are_templated_streamed_and_remembered(artifact):
    session = Scripted(artifact, "Grüße, 世界! 🎉", "Fine.")
    chat = Chat(session, system="Be brief.")
    pieces = ask(chat, "Hello")
    assert "".join(pieces) == "Grüße, 世界! 🎉" and "世" in pieces and "🎉" in pieces
    assert chat.last.text == "Grüße, 世界! 🎉" and chat.last.first_token_seconds > 0
    assert [m["role"] for m in chat.messages] == ["system", "user", "assistant"]
    ask(chat, "How are you?")
    assert [m["content"] for m in chat.messages][-2:] == ["How are you?", "Fine."]
    # what was fed is exactly the template's text of the conversation so far
    want = Template(TEMPLATE).render(chat.messages[:-1], bos_token="<bos>") + "Fine."
    assert session.tokens == tuple(chat.tokenizer.encode(want))


def test_second_turn_reads_only_what_is_new(artifact):
    session = Scripted(artifact, "One two three.", "Four.")
    chat = Chat(session)
    ask(chat, "Count to three, please")
    read = session.stats.prefill_tokens
    ask(chat, "Next")
    # the end of the last turn, the new one, the model's mark; its last token is decoded
    new = chat.tokenizer.encode(
        "<end_of_turn>\n<start_of_turn>user\nNext<end_of_turn>\n<start_of_turn>model\n", start=False
    )
    assert session.stats.prefill_tokens - read == len(new) - 1
    assert chat.last.reused_tokens == chat.last.prompt_tokens - len(new)


def test_a_reply_the_template_trims_is_encoded_anew(artifact):
    session = Scripted(artifact, "padded  ", "ok")
    chat = Chat(session)
    ask(chat, "x")
    ask(chat, "y")
    want = Template(TEMPLATE).render(chat.messages[:-1], bos_token="<bos>") + "ok"
    assert session.tokens == tuple(chat.tokenizer.encode(want))


def test_stopping_a_reply_keeps_what_was_said(artifact):
    session = Scripted(artifact, "One two €", "Then.")
    chat = Chat(session)
    session.say(chat.tokenizer)
    pieces = chat.send("x")
    said = [next(pieces) for _ in range(5)]
    pieces.close()
    assert chat.messages[-1] == {"role": "assistant", "content": "".join(said)} and said
    ask(chat, "y")
    want = Template(TEMPLATE).render(chat.messages[:-1], bos_token="<bos>") + "Then."
    assert session.tokens == tuple(chat.tokenizer.encode(want))


def test_a_question_that_cannot_be_asked_is_not_in_the_history(artifact):
    chat = Chat(Scripted(artifact, "ok"))
    with pytest.raises(ContextFullError):
        chat.send("long " * 200)
    assert chat.messages == []
    assert "".join(ask(chat, "short")) == "ok"


def test_reset_starts_over_and_keeps_the_system_prompt(artifact):
    chat = Chat(Scripted(artifact, "a", "b"), system="S")
    ask(chat, "x")
    chat.reset()
    assert chat.messages == [{"role": "system", "content": "S"}] and chat.last is None
    ask(chat, "y")
    assert len(chat.messages) == 3


def test_sliding_keeps_the_system_prompt(artifact):
    slides = []
    system = "Always answer in rhyme."
    chat = Chat(
        NumpySession(artifact), system=system, on_slide=slides.append,
        options=Options(max_new_tokens=600, on_full="slide"),
    )  # fmt: skip
    for _ in chat.send("go"):
        pass
    head = chat.tokenizer.encode(f"<bos><start_of_turn>system\n{system}")
    assert slides and slides[0].kept_first == len(head)
    assert chat.session.tokens[: len(head)] == tuple(head)


def test_saved_conversations_go_on_elsewhere(artifact, tmp_path):
    first = Chat(Scripted(artifact, "One.", "Two."))
    ask(first, "x")
    first.save(tmp_path / "c.kv")
    second = Chat(Scripted(artifact, "Two."))
    second.load(tmp_path / "c.kv")
    assert second.messages == first.messages
    ask(first, "y")
    ask(second, "y")
    assert second.session.tokens == first.session.tokens
    assert second.last.reused_tokens == first.last.reused_tokens > 0


def test_a_bare_snapshot_is_text_already_read(artifact, tmp_path):
    session = NumpySession(artifact)
    tokenizer = Tokenizer.of(artifact)
    document = tokenizer.encode("A long document.")
    session.prefill(document)
    session.snapshot(tmp_path / "d.kv")
    chat = Chat(Scripted(artifact, "ok"))
    chat.load(tmp_path / "d.kv")
    ask(chat, "What is it?")
    turn = "<start_of_turn>user\nWhat is it?<end_of_turn>\n<start_of_turn>model\nok"
    assert chat.session.tokens == (*document, *tokenizer.encode(turn, start=False))


def test_raw_continues_the_text(artifact):
    session = Scripted(artifact, " upon", " time")
    chat = Chat(session, template=Template(RAW_TEMPLATE))
    ask(chat, "Once")
    ask(chat, " a")
    assert chat.tokenizer.decode(list(session.tokens)) == "Once upon a time"
    assert session.tokens[0] == chat.tokenizer.bos_id


def test_base_models_and_missing_tokenizers_say_so(tmp_path):
    root = write_artifact(tmp_path / "a", programs=False, verify=False, template=False)
    with pytest.raises(ConfigError, match=r"no chat template.*--raw"):
        Chat(NumpySession(read_artifact(root)))
    edit_manifest(root, tokenizer=None)
    with pytest.raises(ArtifactError, match="has no tokenizer"):
        Chat(NumpySession(read_artifact(root)), template=Template(RAW_TEMPLATE))


def test_broken_tokenizer_is_an_artifact_error(tmp_path):
    root = write_artifact(tmp_path / "a", programs=False, verify=False)
    path = root / "tokenizer.json"
    path.write_bytes(b"{" + b" " * (path.stat().st_size - 1))
    with pytest.raises(ArtifactError, match=r"tokenizer.json is not a tokenizer"):
        Chat(NumpySession(read_artifact(root)))


CHANNELS = """{{ bos_token }}{% for m in messages %}<|turn>{{ m.role }}
{{ m.content }}<turn|>
{% endfor %}{% if add_generation_prompt %}<|turn>assistant
{% if not enable_thinking %}<|channel><channel|>{% endif %}{% endif %}"""
MARKS = ["<|turn>", "<turn|>", "<|channel>", "<channel|>"]


@pytest.fixture
def thinker(tmp_path):
    """An artifact whose vocabulary has marks for thoughts, and a template that drops thoughts."""
    root = write_artifact(
        tmp_path / "a", ctx=512, programs=False, verify=False, marks=MARKS, template=CHANNELS
    )
    return read_artifact(root)


def test_thinking_is_apart_and_not_fed_back(thinker):
    session = Scripted(thinker, "<|channel>thought\nlet me see<channel|>Four.", "Five.")
    chat = Chat(session, options=Options(think=True))
    assert "".join(ask(chat, "2 + 2?")) == "Four."
    assert chat.last.text == "Four." and chat.last.thinking == "let me see"
    session.say(chat.tokenizer)
    pieces = list(chat.ask(Message("user", "2 + 3?")))
    assert [p.text for p in pieces] == list("Five.")
    told = chat.tokenizer.decode(session.tokens, special=True)
    assert "let me see" not in told and "<|turn>assistant\nFour.<turn|>" in told


@pytest.mark.parametrize("think", [None, False, True])
def test_turns_that_history_writes_otherwise_cost_the_reply_again_and_no_more(thinker, think):
    """The generation prompt opens a thought that history leaves out; replies outrun the rings."""
    replies = [f"Answer {i} is rather longer than the rings reach." for i in range(6)]
    session = Scripted(thinker, *replies)
    chat = Chat(session, options=Options(think=think))
    read = []
    for i in range(6):
        before = session.stats.prefill_tokens
        ask(chat, f"Question {i}?")
        read.append(session.stats.prefill_tokens - before)
        assert chat.last.reused_tokens <= chat.last.prompt_tokens - 1
    assert max(read[1:]) < 100 and len(set(read[1:])) == 1, read
    wanted = chat.template.render(
        chat.messages[:-1], bos_token="<bos>", enable_thinking=bool(think)
    )
    assert session.tokens == tuple(chat.tokenizer.encode(wanted + replies[-1]))


def test_answers_are_fed_as_they_were_generated(thinker):
    """A model may spell a text otherwise than its tokenizer would; history keeps the ids."""
    session = Scripted(thinker, "x", "y")
    chat = Chat(session)
    chat.generator.tokenizer._engine.add_tokens(["Fo"])
    odd = [chat.tokenizer.id_of(c) for c in "Four"]
    assert chat.tokenizer.encode("Four", start=False) != odd
    session.left = [*odd, session.stop_of(chat)]
    assert "".join(chat.send("2 + 2?")) == "Four"
    session.left = [session.stop_of(chat)]
    list(chat.send("sure?"))
    assert any(list(session.tokens[i : i + 4]) == odd for i in range(len(session.tokens)))


def test_a_slide_gives_half_a_context_of_peace(tmp_path):
    root = write_artifact(tmp_path / "a", ctx=128, programs=False, verify=False)
    session = NumpySession(read_artifact(root))
    slides = []
    chat = Chat(session, options=Options(max_new_tokens=6, on_full="slide"), on_slide=slides.append)
    read = []
    for i in range(24):
        held, before = session.pos, session.stats.prefill_tokens
        for _ in chat.send(f"q{i:02}"):
            pass
        read.append(session.stats.prefill_tokens - before)
        assert chat.last.reused_tokens <= held
    assert len(slides) >= 5 and sum(n > 40 for n in read) == len(slides)
    assert max(n for n in read if n <= 40) == 20  # the new turn alone


def test_a_generator_recognises_conversations(artifact):
    session = Scripted(artifact, "One.", "Two.", "Three.")
    generator = Generator(session)

    def say(messages):
        session.say(generator.tokenizer)
        turn = generator.reply(messages)
        assert "".join(p.text for p in turn) == turn.reply.text
        return turn.reply

    first = [Message("user", "a long first question")]
    reply = say(first)
    other = say([Message("user", "another")])
    again = say([*first, reply.message, Message("user", "more")])
    assert other.finish == again.finish == "stop" and again.text == "Three."
    wanted = generator.template.render(
        [m.as_dict() for m in [*first, reply.message, Message("user", "more")]], bos_token="<bos>"
    )
    assert session.tokens == tuple(generator.tokenizer.encode(wanted + "Three."))


def test_stop_texts_end_a_reply_and_are_hidden(artifact):
    session = Scripted(artifact, "one STOP two", "a ST b")
    chat = Chat(session, options=Options(stop=("STOP", "zzz")))
    pieces = ask(chat, "x")
    assert "".join(pieces) == "one " and not any("S" in p for p in pieces)
    assert (chat.last.finish, chat.last.stopped_by) == ("stop", "STOP")
    session.left = []
    assert "".join(ask(chat, "y")) == "a ST b" and chat.last.stopped_by == ""


def test_pieces_carry_the_logprobs_of_what_they_show(thinker):
    session = Scripted(thinker, "<|channel>thought\nah, so \u00e9<channel|>T\u00fcr STO STOP x")
    chat = Chat(session, options=Options(stop=("STOP",), logprobs=2, think=True))
    session.say(chat.tokenizer)
    pieces = list(chat.ask(Message("user", "x")))
    assert [(p.kind, p.text) for p in pieces[-4:]] == [
        ("content", "\u00fc"), ("content", "r"), ("content", " "), ("content", "STO ")
    ]  # fmt: skip
    told = [chat.tokenizer.decode([t.id for t in p.logprobs]) for p in pieces]
    assert told == ["thought\na", *(p.text for p in pieces[1:])]  # a token of this toy is a byte
    joined = [t for p in pieces for t in p.logprobs]
    assert joined == list(chat.last.logprobs) and all(len(t.top) == 2 for t in joined)
    assert [t.id for t in joined] == list(chat.last.ids[: -len("STOP")])


def test_why_a_reply_ended(artifact):
    chat = Chat(Scripted(artifact, "abc", "abc"), options=Options(max_new_tokens=2))
    ask(chat, "x")
    assert chat.last.finish == "length" and chat.last.text == "ab"
    session = NumpySession(artifact)
    full = Chat(session, options=Options(max_new_tokens=999, logit_bias={1: -1e9, END: -1e9}))
    for _ in full.send("x"):
        pass
    assert full.last.finish == "full" and session.pos == session.plan.ctx
    session = Scripted(artifact, "abc")
    session.say(chat.tokenizer)
    stopped = Chat(session)
    pieces = stopped.send("x")
    next(pieces)
    pieces.close()
    assert stopped.last.finish == "cancelled" and stopped.last.text == "a"


def test_logprobs_and_bias(artifact):
    session = NumpySession(artifact)
    options = Options(max_new_tokens=4, logprobs=3, logit_bias={70: 1e4})
    chat = Chat(session, options=options)
    for _ in chat.send("x"):
        pass
    assert chat.last.ids == (70,) * 4 and len(chat.last.logprobs) == 4
    session.rewind(1)
    logits = session.decode(70).astype(np.float64)
    wanted = logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())
    session.reset()
    chat.reset()
    for _ in chat.send("x"):
        pass
    row = chat.last.logprobs[-1]
    assert len(row.top) == 3 and row.id == 70 and all(p <= 0 for _, p in row.top)
    assert row.top[0][1] == max(p for _, p in row.top)
    assert np.isfinite(wanted).all() and row.logprob <= row.top[0][1]
    with pytest.raises(ConfigError, match="logit_bias names token id 999999"):
        list(Chat(session, options=Options(logit_bias={999_999: 1.0})).send("x"))
    with pytest.raises(ConfigError, match="logprobs 101"):
        Chat(session, options=Options(logprobs=101)).send("x")


def test_sampling_is_the_checkpoints_unless_said_otherwise(artifact):
    chat = Chat(NumpySession(artifact))
    shipped = Sampling(temperature=0.7, top_k=40, top_p=0.9)
    assert Options().sampling(shipped) == shipped
    assert Options(temperature=0.0).sampling(shipped).temperature == 0.0
    assert chat.generator.sampling == Sampling()
    stored = types.SimpleNamespace(sampling={"temperature": 0.7, "top_k": 40, "x": 1})
    assert Sampling.of(stored) == Sampling(temperature=0.7, top_k=40)


def test_again_answers_the_same_question(artifact):
    session = Scripted(artifact, "One, and a long way to go.", "Two.")
    chat = Chat(session)
    with pytest.raises(PromptError, match="no question yet"):
        chat.again()
    ask(chat, "x")
    session.say(chat.tokenizer)
    read = session.stats.prefill_tokens
    assert "".join(p.text for p in chat.again()) == "Two."
    # only the mark of the model's turn, though the reply is longer than the rings reach
    assert session.stats.prefill_tokens - read < 10
    assert [m["content"] for m in chat.messages] == ["x", "Two."]


def test_what_was_reset_is_not_saved(artifact, tmp_path):
    chat = Chat(Scripted(artifact, "One.", "Two."))
    ask(chat, "secret")
    chat.reset()
    chat.save(tmp_path / "c.kv")
    assert b"secret" not in (tmp_path / "c.kv").read_bytes()
    other = Chat(Scripted(artifact, "Two."))
    other.load(tmp_path / "c.kv")
    assert other.messages == [] and other.session.pos == 0


@pytest.mark.parametrize(
    "note", [{"messages": 3}, {"messages": [{"role": "x"}]}, {"text": 3}, {"ids": ["a"]},
             {"ids": [1], "gap": [0, 9]}, {"gap": "x"}],
)  # fmt: skip
def test_notes_of_another_kind_are_refused(artifact, tmp_path, note):
    session = NumpySession(artifact)
    session.prefill([2, 3, 4])
    session.snapshot(tmp_path / "c.kv", note)
    with pytest.raises(SnapshotError, match="holds"):
        Chat(NumpySession(artifact)).load(tmp_path / "c.kv")


@pytest.fixture
def repeating(tmp_path):
    """Makes sessions whose passes take up to seven drafts, about a text that repeats itself."""
    root = write_artifact(tmp_path / "a", ctx=600, chunk=20, drafts=7, programs=False)
    said = ("to be, to be, to be, to be or not", "to be, to be, to be.")
    return lambda: Scripted(read_artifact(root), *said)


def test_a_stop_text_in_the_middle_of_a_pass_leaves_what_was_said(repeating):
    replies, held = [], []
    for drafts in ("off", 7):
        chat = Chat(repeating(), options=Options(stop=("be or",)), drafts=drafts)
        assert "".join(ask(chat, "to be?")) == "to be, to be, to be, to "
        assert chat.last.stopped_by == "be or"
        held.append(chat.session.tokens)
        assert list(held[-1]) == chat.generator.prompts.newest.ids[:-1]
        chat.options = Options()
        assert "".join(ask(chat, "again")) == "to be, to be, to be."
        replies.append(chat.last)
    plain, drafted = replies
    assert held[0] == held[1] and plain.ids == drafted.ids
    assert plain.reused_tokens == drafted.reused_tokens > 20
    assert plain.passes == len(plain.ids) + 1 and plain.drafted == 0  # the end of the turn is one
    assert drafted.passes < 10 < drafted.accepted <= drafted.drafted


def test_choices_near_a_tie_are_shown_with_the_drafts(repeating, monkeypatch):
    monkeypatch.setattr(Scripted, "rounding", np.inf, raising=False)
    chat = Chat(repeating(), drafts=7)
    "".join(ask(chat, "to be?"))
    reply = chat.last
    assert reply.accepted < reply.ties <= len(reply.ids) + 1  # all choices of passes with drafts
    assert f"{reply.accepted} of {reply.drafted} guesses right, {reply.ties} near ties" in figures(
        chat
    )
    monkeypatch.setattr(Scripted, "rounding", 0.0)
    "".join(ask(chat, "again"))
    assert chat.last.accepted > 0 and chat.last.ties == 0


def test_a_reply_that_is_stopped_early_keeps_what_was_shown(repeating):
    drafting = repeating()
    chat = Chat(drafting, drafts=7)
    drafting.say(chat.tokenizer)
    pieces = chat.send("to be?")
    shown = "".join(next(pieces) for _ in range(9))
    pieces.close()
    assert chat.last.text == shown and chat.last.finish == "cancelled"
    assert list(drafting.tokens) == chat.generator.prompts.newest.ids[:-1]
