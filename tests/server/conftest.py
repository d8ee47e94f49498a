"""A server on a real port of the loopback, with the model inside the package."""

from __future__ import annotations

import asyncio
import shutil
import threading
from contextlib import contextmanager
from queue import SimpleQueue

import pytest

from alisa import LLM
from alisa.config import EngineConfig
from alisa.engine.loaded import embedded_model
from alisa.server.config import ServerConfig
from alisa.server.run import ApiServer, build_service, serve

ENGINE = EngineConfig(dtype="float32", max_num_seqs=4, max_model_len=256, kv_device_memory="8MiB", prefill_chunk=64)


@contextmanager
def running(engine=ENGINE, config=None, prepare=lambda service: None):
    """A server in a thread; gives its address and the server, which says in `statuses` how it has ended."""
    service = build_service(engine, config or ServerConfig(port=0))
    prepare(service)
    addresses = SimpleQueue()
    server = ApiServer(service, addresses.put)
    statuses = SimpleQueue()
    thread = threading.Thread(target=lambda: statuses.put(asyncio.run(serve(server))))
    thread.start()
    try:
        server.statuses = statuses
        server.address = addresses.get(timeout=60)
        yield server
    finally:
        server.should_exit = True
        thread.join(timeout=60)
        assert not thread.is_alive()


CHAT_TEMPLATE = """{%- if tools %}<tool_call> takes {{ tools | tojson }}
{% endif %}{%- for message in messages %}
{%- if message.role == "refused" %}{{ raise_exception("no such role") }}{% endif -%}
{{ message.role }}: {{ message.content }}
{% endfor %}{%- if add_generation_prompt %}assistant:{% endif %}"""


@pytest.fixture(scope="session")
def chat_model(tmp_path_factory):
    """The model inside the package with a chat template, which knows tools."""
    directory = tmp_path_factory.mktemp("chat") / "talker"
    shutil.copytree(embedded_model(), directory)
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return directory


@pytest.fixture(scope="session")
def server():
    with running() as server:
        yield server


@pytest.fixture(scope="session")
def address(server):
    return server.address


@pytest.fixture(scope="session")
def llm():
    """The same model offline: what the server says must be what this says."""
    with LLM(config=ENGINE) as llm:
        yield llm
