"""What stands behind the app's screens, in a desktop JVM; and rules that its layouts keep."""

import re
import xml.etree.ElementTree as ET

import pytest
from android_artifacts import export
from android_host import DEMO, HostError
from test_android_text import MARKS, THINKER

from edge_kv.runtime import load
from edge_kv.runtime.chat import Chat, Options

ANDROID = "{http://schemas.android.com/apk/res/android}"
RES = DEMO / "src/main/res"
FORM = ["", "", "", "", "", "", "", "0"]  # the settings form, empty


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    greedy = {"temperature": 0.0}
    return export(
        "laguna-element", tmp_path_factory.mktemp("tiny") / "tiny", ctx=512, chunk=32, marks=MARKS,
        template=THINKER, sampling=greedy,
    )  # fmt: skip


@pytest.fixture
def storage(tiny, tmp_path):
    """App storage with tiny in it, and a directory that is not an artifact."""
    (tmp_path / "storage" / "empty").mkdir(parents=True)
    (tmp_path / "storage" / "tiny").symlink_to(tiny)
    (tmp_path / "cache").mkdir()
    return {"storage": str(tmp_path / "storage"), "cache": str(tmp_path / "cache")}


def act(host, action, **fields):
    return host.ask("act", action=action, **fields)


def form(**texts):
    names = ["system", "temperature", "top_k", "top_p", "min_p", "penalty", "longest", "think"]
    return [texts.get(name, empty) for name, empty in zip(names, FORM, strict=True)]


def test_a_screen_chats_and_takes_a_conversation_up_again(host, storage, tiny, tmp_path):
    (model,) = host.ask("assistant", **storage)
    assert model[0] == "tiny" and re.fullmatch(r"tiny\n[\d.]+ MB · remembers 512 tokens", model[1])
    act(host, "change", texts=form(longest="20", system="Be brief."))
    screen = act(host, "load", name="tiny")
    assert screen["model"] == "tiny" and screen["ctx"] == 512 and screen["problem"] is None
    screen = act(host, "send", content="And it came to pass")
    with load(tiny, "onnx-stock", threads=1) as session:
        chat = Chat(session, options=Options(max_new_tokens=20), system="Be brief.")
        list(chat.send("And it came to pass"))
        first = chat.last
        chat.save(tmp_path / "chat.kv")
        chat.load(tmp_path / "chat.kv")
        list(chat.send("Behold"))
        second = chat.last
    turns = screen["turns"]
    assert [t["role"] for t in turns] == ["system", "user", "assistant"]
    assert [t["text"] for t in turns] == ["Be brief.", "And it came to pass", first.text]
    assert turns[2]["thinking"] == first.thinking
    assert re.fullmatch(
        r"20 tokens · [\d.]+ tokens/s · first after [\d.]+ s · read \d+ of \d+ · "
        r"stopped at the limit of 20 tokens",
        turns[2]["figures"],
    )
    assert screen["speed"] > 0 and screen["position"] > 20 and screen["activity"] is None
    act(host, "save")
    host.ask("assistant", **storage)  # the system ended the app, the user opens it again
    again = act(host, "load", name="tiny")
    assert [t["text"] for t in again["turns"]] == [t["text"] for t in turns]
    again = act(host, "send", content="Behold")
    assert again["turns"][-1]["text"] == second.text
    assert again["turns"][-2]["text"] == "Behold"
    other = act(host, "again")["turns"]
    assert [t["text"] for t in other[:-1]] == [t["text"] for t in again["turns"][:-1]]
    assert other[-1]["role"] == "assistant" and other[-1]["figures"].startswith("20 tokens · ")
    assert [t["text"] for t in act(host, "new chat")["turns"]] == ["Be brief."]


def test_other_instructions_begin_a_new_conversation(host, storage):
    host.ask("assistant", **storage)
    act(host, "load", name="tiny")
    act(host, "change", texts=form(longest="5"))
    screen = act(host, "send", content="Hi")
    assert len(screen["turns"]) == 2
    assert act(host, "change", texts=form(longest="6"))["turns"] == screen["turns"]
    (told,) = act(host, "change", texts=form(system="Be kind."))["turns"]
    assert (told["role"], told["text"]) == ("system", "Be kind.")


def test_the_first_start_shows_a_reply(host, tiny, tmp_path):
    for name in ("storage", "cache"):
        (tmp_path / name).mkdir()
    assert (
        host.ask("assistant", storage=str(tmp_path / "storage"), cache=str(tmp_path / "cache"))
        == []
    )
    screen = act(host, "welcome", name="tiny", question="Hello", **{"from": str(tiny)})
    assert screen["problem"] is None and screen["model"] == "tiny" and screen["models"] == ["tiny"]
    assert [t["role"] for t in screen["turns"]] == ["user", "assistant"]
    assert screen["turns"][1]["figures"].startswith("60 tokens · ")


def test_a_bundle_that_is_damaged_leaves_nothing_behind(host, tiny, tmp_path):
    import shutil

    for name in ("storage", "cache"):
        (tmp_path / name).mkdir()
    bad = shutil.copytree(tiny, tmp_path / "bad")
    data = bytearray((bad / "onnx/weights.bin").read_bytes())
    data[9] ^= 1
    (bad / "onnx/weights.bin").write_bytes(data)
    host.ask("assistant", storage=str(tmp_path / "storage"), cache=str(tmp_path / "cache"))
    screen = act(host, "welcome", name="tiny", question="Hello", **{"from": str(bad)})
    assert screen["problem"] == "This model cannot be used. Copy it to the phone again."
    assert "weights.bin has SHA-256" in screen["detail"]
    assert screen["models"] == [] and not list((tmp_path / "storage").iterdir())


def test_a_model_is_deleted(host, tiny, tmp_path):
    import shutil

    (tmp_path / "cache").mkdir()
    shutil.copytree(tiny, tmp_path / "storage" / "tiny")
    host.ask("assistant", storage=str(tmp_path / "storage"), cache=str(tmp_path / "cache"))
    act(host, "load", name="tiny")
    screen = act(host, "delete", name="tiny")
    assert screen["model"] is None and screen["models"] == [] and screen["problem"] is None
    assert not (tmp_path / "storage" / "tiny").exists()


def test_a_screen_says_what_is_wrong_in_a_phones_words(host, storage):
    host.ask("assistant", **storage)
    assert act(host, "send", content="Hi")["problem"] == "Choose a model first."
    screen = act(host, "load", name="empty")
    assert screen["problem"] == "This model cannot be used. Copy it to the phone again."
    assert "is not an edge-kv artifact" in screen["detail"]
    host.ask("assistant", available=1_000_000, **storage)
    screen = act(host, "load", name="tiny")
    assert screen["model"] is None
    assert re.fullmatch(
        r"This model needs [\d.]+ MB of memory and the phone has 1.0 MB free. Close other apps, or "
        "choose a smaller model.",
        screen["problem"],
    )
    host.ask("assistant", **storage)
    act(host, "load", name="tiny")
    screen = act(host, "send", content="x" * 600)
    assert screen["problem"] == (
        "This conversation is longer than the model can remember. Start a new chat."
    )
    assert screen["turns"] == [] and "--" not in screen["problem"]


def test_stop_ends_a_reply_at_once(host, storage):
    host.ask("assistant", **storage)
    act(host, "change", texts=form(longest="400"))
    act(host, "load", name="tiny")
    act(host, "send", content="And it came", wait=False)
    while (
        len(act(host, "look", wait=False)["turns"]) < 2
        or not act(host, "look", wait=False)["position"]
    ):
        pass
    screen = act(host, "stop")
    assert screen["activity"] is None and screen["problem"] is None
    assert 0 < screen["position"] < 400 and screen["turns"][-1]["figures"].endswith("stopped")
    act(host, "change", texts=form(longest="5"))
    screen = act(host, "send", content="And")
    assert screen["problem"] is None and screen["turns"][-2]["text"] == "And"


def test_a_screen_measures_and_loads_its_model_again(host, storage):
    host.ask("assistant", **storage)
    act(host, "load", name="tiny")
    screen = act(host, "measure", depths=[100, 2048])
    assert screen["problem"] is None
    assert [r["ctx"] for r in screen["measurement"]["runs"]] == [100, 512]


def test_settings_come_back_as_they_were_typed(host, tmp_path):
    asked = {"file": str(tmp_path / "settings.json")}
    texts = form(
        system="Be brief.\nAlways.", temperature="0.7", top_k="40", min_p="0,05", think="2"
    )
    answer = host.ask("settings", texts=texts, sampling={"temperature": 0.8, "top_k": 64}, **asked)
    assert answer["same"] and answer["hints"] == ["0.8", "64", "1", "0", "1"]
    assert answer["texts"] == [
        "Be brief.\nAlways.", "0.7", "40", "", "0.05", "", "1024", "2",
    ]  # fmt: skip
    assert host.ask("settings", texts=FORM, **asked)["texts"] == form(longest="1024")


@pytest.mark.parametrize(
    "texts,words",
    [
        ({"temperature": "hot"}, "Temperature must be a number from 0"),
        ({"temperature": "-1"}, "Temperature must be"),
        ({"temperature": "nan"}, "Temperature must be"),
        ({"top_k": "1.5"}, "Top-k must be a whole number, 0 for off"),
        ({"top_p": "0"}, "Top-p must be a number above 0 and up to 1"),
        ({"min_p": "2"}, "Min-p must be a number from 0 to 1"),
        ({"penalty": "0"}, "Repetition penalty must be"),
        ({"longest": "0"}, "Longest reply must be a whole number of tokens from 1 on"),
    ],
)
def test_settings_out_of_range_are_named(host, tmp_path, texts, words):
    with pytest.raises(HostError, match=words):
        host.ask("settings", texts=form(**texts), file=str(tmp_path / "settings.json"))
    assert not (tmp_path / "settings.json").exists()


def turn(role, text="", thinking="", calls=(), figures=""):
    return {
        "role": role,
        "text": text,
        "thinking": thinking,
        "calls": list(calls),
        "figures": figures,
    }


def test_streamed_text_is_appended(host):
    asked = turn("user", "Hi")
    shown = [asked, turn("assistant", "Hel", "hm")]
    wanted = [asked, turn("assistant", "Hello", "hmm", ["f(x: 1)"], "2 tokens")]
    assert host.ask("changes", shown=[], wanted=shown) == [["add", t] for t in shown]
    assert host.ask("changes", shown=shown, wanted=wanted) == [
        ["thinking", 1, "m"], ["text", 1, "lo"], ["annotate", 1, wanted[1]],
    ]  # fmt: skip
    assert host.ask("changes", shown=wanted, wanted=wanted) == []
    other = [asked, turn("assistant", "No")]
    assert host.ask("changes", shown=wanted, wanted=other) == [["drop", 1], ["add", other[1]]]
    assert host.ask("changes", shown=wanted, wanted=[]) == [["drop", 0]]


def test_who_scrolled_back_stays_there(host):
    at = [[0, 500, 400, 40], [500, 500, 1000, 40], [470, 500, 1000, 40], [300, 500, 1000, 40]]
    assert host.ask("at_end", scroll=at) == [True, True, True, False]


def test_a_conversation_is_shared_without_thoughts(host):
    turns = [turn("system", "Be brief."), turn("user", "Hi "), turn("assistant", "\nYes.", "hm")]
    assert host.ask("share", turns=turns) == "Instructions: Be brief.\n\nYou: Hi\n\nModel: Yes."


def test_the_meter_speaks_a_phones_words(host):
    memory = [
        {"anon": 340_000_000, "file": 1_200_000_000, "peak": 1_700_000_000, "available": 2_400_000},
        {"anon": None, "file": None, "peak": None, "available": None},
    ]
    assert host.ask("words", memory=memory) == [
        "Uses 1.5 GB now, 1.7 GB at most\n340 MB working memory · 1.2 GB model file · 2.4 MB free",
        "Uses – now, – at most\n– working memory · – model file · – free",
    ]


def layouts():
    return [(f, e) for f in sorted(RES.glob("layout*/*.xml")) for e in ET.parse(f).getroot().iter()]


def colours(folder):
    root = ET.parse(RES / folder / "colors.xml").getroot()
    return {e.attrib["name"]: e.text for e in root}


def luminance(colour):
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a, b):
    light, dark = sorted([luminance(a), luminance(b)], reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("folder", ["values", "values-night"])
def test_colours_can_be_read(folder):
    """WCAG AA: 4.5 for text, 3 for what is drawn."""
    found = colours(folder)
    for text in ("text", "faint", "accent", "problem"):
        for ground in ("ground", "card"):
            assert contrast(found[text], found[ground]) >= 4.5, (text, ground)
    for drawn in ("anonymous", "file_pages"):
        assert contrast(found[drawn], found["card"]) >= 3 or drawn == "file_pages"
    assert contrast(found["anonymous"], found["file_pages"]) >= 1.5
    assert colours("values").keys() == colours("values-night").keys()


def test_what_is_touched_is_large_enough_and_named():
    touched = [
        (f, e) for f, e in layouts()
        if e.tag in ("Button", "ImageButton", "EditText", "Spinner", "CheckBox")
        or e.get(f"{ANDROID}clickable") == "true"
    ]  # fmt: skip
    assert len(touched) > 8
    for file, element in touched:
        name = f"{file.name}: {element.get(ANDROID + 'id')}"
        height = element.get(f"{ANDROID}minHeight", "0dp")
        assert int(height.removesuffix("dp")) >= 48, name
        said = [element.get(ANDROID + a) for a in ("text", "hint", "contentDescription", "prompt")]
        assert any(said), name


def test_texts_are_resources_and_scale():
    names = {e.attrib["name"] for e in ET.parse(RES / "values/strings.xml").getroot()}
    for file, element in layouts():
        for attribute, value in element.attrib.items():
            if attribute.removeprefix(ANDROID) in ("text", "hint", "contentDescription"):
                assert value.startswith("@string/") and value[8:] in names, (file.name, value)
            assert not (attribute == ANDROID + "textSize" and not value.endswith("sp"))
            if value.startswith("#"):
                raise AssertionError(f"{file.name} has a colour of its own: {value}")
        if element.tag in ("ImageView", "ImageButton", "edgekv.app.MemoryGraph"):
            assert element.get(ANDROID + "contentDescription"), file.name


def test_the_meter_does_not_scroll_away():
    root = ET.parse(RES / "layout/main.xml").getroot()
    scrolled = {e.get(ANDROID + "id") for s in root.iter("ScrollView") for e in s.iter()}
    assert {"@+id/memory", "@+id/graph", "@+id/prompt", "@+id/send"}.isdisjoint(scrolled)
    assert "@+id/turns" in scrolled
