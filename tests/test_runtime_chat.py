"""Chat: templates, streamed text that splits no character, reuse between turns, saving."""

import pytest
from fake_artifact import SPECIALS, TEMPLATE, NumpySession, edit_manifest, write_artifact
from hypothesis import given
from hypothesis import strategies as st

from edge_kv.artifact import read_artifact
from edge_kv.errors import ArtifactError, ConfigError, ContextFullError, PromptError
from edge_kv.runtime.chat import RAW_TEMPLATE, Chat, Options, Template
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
        self.left = []

    def say(self, tokenizer):
        text = self.replies.pop(0)
        self.left = [*tokenizer.encode(text, start=False), END]

    def _run_decode(self, token, pos):
        logits = super()._run_decode(token, pos)
        logits[self.left.pop(0)] = 1e6
        return logits


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
