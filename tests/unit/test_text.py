"""Stop strings: nothing of them is shown, nothing before them is lost, however the text is cut into tokens."""

from hypothesis import given
from hypothesis import strategies as st

from alisa import SamplingParams
from alisa.engine.output import RequestText


class Pieces:
    """A tokenizer whose token ids are indices into a list of strings; the last may come only with `flush`."""

    def __init__(self, pieces, rest="", special=()):
        self.pieces, self.rest, self.special = pieces, rest, special

    def detokenizer(self):
        return self

    def special_ids(self, texts):
        return {i: self.pieces[i] for i in self.special if self.pieces[i] in texts}

    def feed(self, token_id):
        return self.pieces[token_id]

    def flush(self):
        return self.rest


def text_of(tokenizer, stop):
    return RequestText("", SamplingParams(stop=tuple(stop)), tokenizer)


@given(
    pieces=st.lists(st.text("ab<>", max_size=4), max_size=12),
    rest=st.text("ab<>", max_size=3),
    stop=st.lists(st.text("ab<>", min_size=1, max_size=4), max_size=2),
)
def test_text_ends_before_the_first_stop_string(pieces, rest, stop):
    stream = text_of(Pieces(pieces, rest), stop)
    shown = []
    for i in range(len(pieces)):
        shown.append(stream.feed(i, ended=None))
        if stream.stopped:
            break
    shown.append(stream.flush())
    whole = "".join(pieces) + rest
    # the earliest moment at which a stop string is complete decides; within it, the earliest place
    ends = [whole.find(s) + len(s) for s in stop if s in whole]
    if not ends:
        assert "".join(shown) == stream.text == whole
        assert not stream.stopped
    else:
        assert stream.stopped
        assert "".join(shown) == stream.text
        assert whole.startswith(stream.text)
        assert not any(s in stream.text for s in stop)
        assert any(whole[len(stream.text) :].startswith(s) for s in stop)


def test_text_is_shown_as_soon_as_it_is_certain():
    stream = text_of(Pieces(["one <", "b", "> two <", "br> three"]), ["<br>"])
    assert [stream.feed(i, ended=None) for i in range(4)] == ["one ", "", "<b> two ", ""]
    assert stream.stopped


def test_a_special_token_ends_the_text_though_it_has_none():
    stream = text_of(Pieces(["one", "<end>", "two"], special=[1]), ["<end>"])
    assert stream.stop_ids == {1: "<end>"}
    assert [stream.feed(0, ended=None), stream.feed(1, ended="stop")] == ["one", ""]
    assert stream.text == "one"


def test_the_end_token_of_the_model_is_no_text():
    stream = text_of(Pieces(["one <", "eos"], rest="."), ["<br>"])
    assert [stream.feed(0, ended=None), stream.feed(1, ended="eos")] == ["one ", "<."]
