"""Clients of a server: they ask for an answer at once, piece by piece, or go away midway."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from http.client import HTTPResponse
from typing import Any

from served import Server
from served_model import OUTPUT_TOKENS, Prompt


class Manner(Enum):
    """How a client takes its answer."""

    WHOLE = "whole"
    STREAMED = "streamed"
    ABORTED = "aborted"  # the connection is closed after a few tokens


@dataclass(frozen=True)
class Asked:
    prompt: Prompt
    manner: Manner


def ask(server: Server, asked: Asked) -> list[int]:
    """The tokens of the greedy answer; of one that is aborted, the first of them."""
    streamed = asked.manner is not Manner.WHOLE
    # One that is aborted would go on for long, and holds blocks meanwhile.
    max_tokens = 10 * OUTPUT_TOKENS if asked.manner is Manner.ABORTED else OUTPUT_TOKENS
    body = {**asked.prompt.body, "max_tokens": max_tokens, "stream": streamed}
    with request(server, asked.prompt.path, body) as response:
        if not streamed:
            (choice,) = json.load(response)["choices"]
            return list(choice["token_ids"])
        token_ids: list[int] = []
        for choice in _pieces(response):
            token_ids += choice.get("token_ids") or []
            if asked.manner is Manner.ABORTED and len(token_ids) >= 3:
                break
        return token_ids


def ask_all(server: Server, asked: list[Asked], clients: int) -> list[list[int]]:
    """So many clients at once, each with the next of the requests when it has an answer."""
    with ThreadPoolExecutor(clients) as pool:
        return list(pool.map(lambda each: ask(server, each), asked))


@contextmanager
def request(server: Server, path: str, body: dict[str, Any]) -> Iterator[HTTPResponse]:
    """A greedy request; the connection is closed at the end, whatever was read of it."""
    everything = {"model": "tiny", "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    connection = server.connect()
    try:
        headers = {"Content-Type": "application/json"}
        connection.request("POST", path, json.dumps(everything | body), headers)
        response = connection.getresponse()
        assert response.status == 200, response.read()
        yield response
    finally:
        connection.close()


def _pieces(response: HTTPResponse) -> Iterator[dict[str, Any]]:
    """The choices of a stream; raises AssertionError where it breaks off or tells an error."""
    for line in response:
        data = line.decode().removeprefix("data: ").strip()
        if data == "[DONE]":
            return
        if data:
            event = json.loads(data)
            assert "error" not in event, event
            yield from event["choices"]
    raise AssertionError("the stream ended before its end was told")
