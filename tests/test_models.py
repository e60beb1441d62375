"""Page geometries, against figures worked out by hand from the models' configurations."""

from __future__ import annotations

import pytest

from triton_offload.cli.models import MODELS, geometry


@pytest.mark.parametrize(
    ("model", "bytes_of_a_token"),
    [
        ("llama-3-8b", 128 << 10),
        ("llama-3-70b", 320 << 10),
        ("qwen2.5-7b", 56 << 10),
        ("mistral-7b", 128 << 10),
        ("smollm2-135m", 45 << 9),
        ("deepseek-v3", 70272),  # its report: 70.272 KB a token in 16 bits
    ],
)
def test_a_token_takes_what_the_configuration_says(model, bytes_of_a_token):
    shape = geometry(model)
    assert shape.num_layers * shape.token_bytes == bytes_of_a_token
    assert shape.page_bytes(16) == 16 * shape.token_bytes


def test_every_model_says_where_its_figures_come_from():
    assert all("config.json" in shape.source for shape in MODELS.values())


def test_an_unknown_model_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"model: expected one of llama-3-8b, .*got 'gpt-0'"):
        geometry("gpt-0")
