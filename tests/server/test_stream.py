"""What leaves as a stream: every event once, in order, whatever the client takes and whoever carries it."""

import asyncio
import json
from contextlib import contextmanager

import pytest
from hypothesis import given
from hypothesis import strategies as st

from alisa.outputs import TextDelta
from alisa.server.connection import EXPRESS, GuardedConnection
from alisa.server.frames import TextFrames, to_frame
from alisa.server.reply import EventStream
from tests.server.test_life import LONG, everything, send


class OneText:
    """Stands for `Texts`: events are put into the reader by the test."""

    def __init__(self):
        self.reader = None

    async def __aenter__(self):
        return self

    async def __aexit__(self, *_):
        pass

    def __len__(self):
        return 1

    def number(self, event):
        return 0

    @contextmanager
    def reading(self, reader):
        self.reader = reader
        yield


class Words:
    """An event is its words; the end is an error of its own kind."""

    def frame(self, number, event):
        if not event.text:
            raise ValueError("the end")
        return event.text.encode()

    def closing(self):
        return b""


class Client:
    """Takes what it is sent, at once or when it is told to; the express is open or not."""

    def __init__(self):
        self.pieces = []
        self.taking = asyncio.Event()
        self.taking.set()
        self.lends = True

    async def send(self, message):
        await self.taking.wait()
        if message["type"] == "http.response.body":
            self.pieces.append(message["body"])

    def write(self, data):
        if self.lends and self.taking.is_set():
            assert data, "an empty piece ends a chunked reply"
            self.pieces.append(bytes(data))
            return True
        return False

    async def receive(self):
        await asyncio.Event().wait()


def delta(text):
    return TextDelta(0, text, "a")


STEPS = st.lists(
    st.one_of(st.integers(1, 3), st.sampled_from(["turn", "slow", "fast", "closed", "open"])), min_size=1, max_size=30
)


@given(steps=STEPS, has_express=st.booleans())
def test_every_event_leaves_once_and_in_order(steps, has_express):
    async def run():
        client, texts = Client(), OneText()
        scope = {"extensions": {EXPRESS: {"write": client.write}}} if has_express else {}
        stream = EventStream(Words(), texts, send_timeout_s=30)
        task = asyncio.ensure_future(stream(scope, client.receive, client.send))
        await asyncio.sleep(0)
        put = []
        for step in steps:
            match step:
                case int():
                    events = [delta(f"<{len(put) + place}>") for place in range(step)]
                    put += [event.text for event in events]
                    texts.reader.put(events)
                case "slow":
                    client.taking.clear()
                case "fast":
                    client.taking.set()
                case "closed" | "open":
                    client.lends = step == "open"
                case "turn":
                    for _ in range(3):
                        await asyncio.sleep(0)
        client.taking.set()
        texts.reader.put([delta("<last>"), delta(""), delta("<too late>")])
        texts.reader.put([delta("<too late>")])
        await task
        return b"".join(client.pieces).decode(), "".join(put)

    said, put = asyncio.run(run())
    assert said.startswith(put + "<last>data: {")
    assert "the end" not in said, "what nobody expected is told to nobody"
    assert said.endswith("data: [DONE]\n\n")
    assert "too late" not in said


def test_what_waits_for_a_slow_client_leaves_in_one_piece():
    async def run():
        client, texts = Client(), OneText()
        task = asyncio.ensure_future(EventStream(Words(), texts, send_timeout_s=30)({}, client.receive, client.send))
        await asyncio.sleep(0.01)
        client.taking.clear()
        for number in range(5):
            texts.reader.put([delta(f"<{number}>")])
            await asyncio.sleep(0)
        client.taking.set()
        await asyncio.sleep(0.01)
        pieces = list(client.pieces)
        task.cancel()
        return pieces

    # The first was on its way when the client became slow.
    assert asyncio.run(run()) == [b"<0>", b"<1><2><3><4>"]


def test_events_of_a_server_take_the_express(address, monkeypatch):
    taken, write = [], GuardedConnection._write

    def counted(self, cycle, data):
        taken.append(write(self, cycle, data))
        return taken[-1]

    monkeypatch.setattr(GuardedConnection, "_write", counted)
    data = everything(send(address, {**LONG, "max_tokens": 200, "stream": True}, headers=["Connection: close"]))
    # The first steps may be over before the head of the reply is out.
    assert any(taken)
    assert data.count(b'"finish_reason":null') == 200
    assert data.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")


@pytest.mark.parametrize(
    "event", [lambda text: {"a": 1, "text": text, "b": None}, lambda text: {"deep": [{"t": text}]}]
)
@given(text=st.text())
def test_an_event_written_around_its_text_is_the_event(event, text):
    frame = TextFrames(event).write(text)
    assert frame == to_frame(event(text))
    assert json.loads(frame.removeprefix(b"data: ")) == event(text)
