"""The conversation on a terminal: what its commands do, driven by scripted lines."""

import re

import pytest
from fake_artifact import NumpySession, write_artifact

from edge_kv.artifact import read_artifact
from edge_kv.cli import repl
from edge_kv.runtime.chat import Chat, Message, Options, ToolCall
from edge_kv.runtime.constraints import Grammar


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    root = tmp_path_factory.mktemp("repl") / "a"
    return read_artifact(write_artifact(root, programs=False, verify=False, ctx=256))


@pytest.fixture
def talk(artifact, monkeypatch):
    """A function that types lines at a chat and returns what was said to the user."""

    def typing(lines, chat):
        left, said = iter(lines), []

        def read():
            try:
                return next(left)
            except StopIteration:
                raise EOFError from None

        def show(pieces):
            for _ in pieces:
                pass

        monkeypatch.setattr(repl, "_reader", lambda: read)
        repl.converse(chat, repl.Terminal(show, said.append, lambda: "figures"))
        return said

    return typing


@pytest.fixture
def chat(artifact):
    return Chat(NumpySession(artifact), options=Options(max_new_tokens=4, temperature=0))


def called(*names):
    calls = tuple(ToolCall(name, {}, f"call_{i}") for i, name in enumerate(names))
    return [Message("user", "x"), Message("assistant", "", calls=calls)]


def test_results_of_tools_are_given_one_by_one(chat, talk):
    chat.history = called("first", "second")
    said = talk(["/result one"], chat)
    assert "(give the result of second with /result TEXT)" in said
    assert [m.role for m in chat.history] == ["user", "assistant", "tool"]
    talk(["/result two"], chat)
    assert [m.role for m in chat.history] == ["user", "assistant", "tool", "tool", "assistant"]
    results = chat.history[2:4]
    assert [(m.content, m.name, m.call_id) for m in results] == [
        ("one", "first", "call_0"), ("two", "second", "call_1"),
    ]  # fmt: skip


def test_a_result_that_nothing_waits_for_is_said(chat, talk):
    said = talk(["hello", "/result 5"], chat)
    assert any("no call waits" in line for line in said)
    chat.history = called("first")
    assert any("needs the text" in line for line in talk(["/result"], chat))


def test_commands_that_say_something(chat, talk):
    said = talk(["hello", "/context", "/stats", "/think on", "/think", "/helo", "/save"], chat)
    text = "\n".join(said)
    assert "cut off at --max-new-tokens 4" in text
    assert f"{chat.session.pos:,} of 256 tokens" in text and "2 messages" in text
    assert "figures" in text and "Thinking is on." in text
    assert text.count("does not ask whether to think") == 2  # the toy's template
    assert "Did you mean" in text and "/save needs a file name." in text


def test_a_saved_conversation_is_taken_up_and_a_new_one_forgets_it(chat, talk, tmp_path):
    kept = tmp_path / "talk.kv"
    said = talk(["hello", f"/save {kept}", "/reset", "/context"], chat)
    assert chat.history == [] and said[-1].startswith("0 of 256 tokens")
    talk([f"/load {kept}"], chat)
    assert [m.role for m in chat.history] == ["user", "assistant"]
    talk(["/system be brief"], chat)
    assert [m.role for m in chat.history] == ["system"]


def test_help_fits_a_terminal(chat, talk):
    assert max(map(len, talk(["/help"], chat)[-1].split("\n"))) < 80


def test_a_full_context_says_what_to_do_where_it_can_be_done(chat):
    chat.options = Options(max_new_tokens=1000, temperature=0)
    list(chat.ask(Message("user", "x")))
    assert "/reset" in repl.ended(chat, goes_on=True)
    alone = repl.ended(chat, goes_on=False)
    assert "/reset" not in alone and "is full; --on-full slide" in alone


def test_an_interrupt_ends_the_reply_and_not_the_conversation(chat, talk, monkeypatch):
    prefill = chat.session.prefill

    def interrupted(ids):
        monkeypatch.setattr(chat.session, "prefill", prefill)
        raise KeyboardInterrupt

    monkeypatch.setattr(chat.session, "prefill", interrupted)
    said = talk(["hello there", "hello there"], chat)
    assert "(stopped)" in said
    assert [m.role for m in chat.history] == ["user", "assistant"]


def test_a_grammar_holds_for_every_answer_of_a_conversation(artifact, talk):
    options = Options(max_new_tokens=9, temperature=1.0, seed=1)
    chat = Chat(NumpySession(artifact), options=options, grammar=Grammar.regex("[ab]{3}"))
    talk(["hello", "and", "/regen"], chat)
    answers = [m.content for m in chat.history if m.role == "assistant"]
    assert len(answers) == 2 and all(re.fullmatch("[ab]{3}", a) for a in answers)


def test_a_stop_text_that_ended_a_reply_is_said(artifact, talk):
    plain = Chat(NumpySession(artifact), options=Options(max_new_tokens=6, temperature=0))
    talk(["hello"], plain)
    stop = plain.last.text[2:4]
    chat = Chat(NumpySession(artifact), options=Options(temperature=0, stop=(stop,)))
    assert f"(ended at the stop text {stop!r})" in talk(["hello"], chat)
