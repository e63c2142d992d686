# SPDX-License-Identifier: Apache-2.0
"""From what a user asks for to a plan."""

import pytest

from hf_autoround.errors import UnknownName, UnsupportedLayer, UnsupportedScheme
from hf_autoround.layers.sites import WeightSite
from hf_autoround.planning.resolve import matching, resolve_plan
from hf_autoround.scheme import integer_scheme, resolve_scheme

NAMES = [f"model.layers.{layer}.{part}" for layer in (0, 1, 10) for part in ("self_attn.q_proj", "self_attn.k_proj", "mlp.gate")]
SITES = [WeightSite(name, f"{name}.weight", (64, 64)) for name in NAMES]
W4 = integer_scheme(4)


def plan(**arguments):
    return resolve_plan(SITES, W4, blocks="model.layers", **arguments)


@pytest.mark.parametrize(
    ("key", "count"),
    [
        ("model.layers.1.mlp.gate", 1),
        ("q_proj", 3),
        ("layers.1", 3),
        ("layers.10.self_attn", 2),
        (r"layers\.\d+\.self_attn", 6),
        (r"layers\.(0|10)\..*k_proj$", 2),
        ("nothing", 0),
    ],
)
def test_keys_are_names_parts_or_expressions(key, count):
    assert len(matching(key, NAMES)) == count


def test_exact_names_beat_patterns_and_later_patterns_earlier_ones():
    chosen = plan(layer_config={NAMES[0]: "W2A16", "self_attn": "W8A16", "q_proj": {"bits": 3, "group_size": 32}}).schemes
    assert [chosen[name].name for name in NAMES[:2]] == ["W2A16", "W8A16"]
    assert chosen["model.layers.1.self_attn.q_proj"] == integer_scheme(3, 32)


def test_routers_stay_float_unless_they_are_named():
    assert {name for name in NAMES if name.endswith("gate")} == set(plan().kept)
    assert "model.layers.0.mlp.gate" in plan(layer_config={"mlp.gate": "W8A16"}).schemes


def test_ignored_layers_and_16_bits_are_kept():
    kept = plan(ignore_layers=["layers.1"], layer_config={"k_proj": {"bits": 16}}).kept
    assert kept["model.layers.1.self_attn.q_proj"] == "ignore_layers names it"
    assert kept["model.layers.0.self_attn.k_proj"] == "its scheme is 16 bits"


@pytest.mark.parametrize("arguments", [{"layer_config": {"q_porj": "W2A16"}}, {"ignore_layers": ["q_porj"]}])
def test_a_key_that_matches_nothing_names_near_ones(arguments):
    with pytest.raises(UnknownName, match=r"no layer matches 'q_porj'; did you mean q_proj"):
        plan(**arguments)


def test_what_formats_refuse_is_kept_or_an_error_if_it_was_named():
    def refuse(site, scheme):
        return {"some_format": "it is odd"} if site.name.endswith("k_proj") else {}

    assert plan(refuse=refuse).kept["model.layers.0.self_attn.k_proj"] == "some_format cannot store it: it is odd"
    with pytest.raises(UnsupportedScheme, match=r"some_format cannot store model\.layers\.0\.self_attn\.k_proj: it is odd"):
        plan(refuse=refuse, layer_config={"k_proj": "W8A16"})


def test_nothing_left_to_quantize_says_why():
    with pytest.raises(UnsupportedLayer, match=r"no layer is left to quantize: .*ignore_layers"):
        plan(ignore_layers=["model"])


def test_experts_of_a_layer_share_a_scheme():
    experts = [
        WeightSite(f"model.layers.0.experts.{expert}.up_proj", "model.layers.0.experts.up_proj", (64, 64), expert)
        for expert in (0, 1)
    ]
    with pytest.raises(UnsupportedLayer, match=r"experts\.1\.up_proj has scheme W4A16 and .*experts\.0\.up_proj has W8A16"):
        resolve_plan(experts, W4, blocks="model.layers", layer_config={"experts.0": "W8A16"})


@pytest.mark.parametrize(
    ("scheme", "overrides", "expected"),
    [
        ("w4a16", {}, integer_scheme(4)),
        ("W2A16G64", {"bits": 3}, integer_scheme(3, 64)),
        ("W4A16", {"sym": False, "group_size": -1}, integer_scheme(4, -1, False)),
        ({"bits": 5}, {}, integer_scheme(5)),
        ({"scheme": "W2A16G32", "sym": False}, {}, integer_scheme(2, 32, False)),
        (integer_scheme(6), {"group_size": 64}, integer_scheme(6, 64)),
    ],
)
def test_schemes(scheme, overrides, expected):
    assert resolve_scheme(scheme, **overrides) == expected


@pytest.mark.parametrize(
    ("scheme", "message"),
    [
        ("W4A61", "no scheme is called 'W4A61'; did you mean W4A16"),
        ({"bit": 4}, "no field 'bit'; did you mean bits"),
        ({"bits": 9}, "bits=9 is not supported: numbers have 2 to 8 bits"),
        ({"group_size": -2}, "group_size=-2"),
        ({"act_bits": 1}, "act_bits=1 is not supported"),
        ({"act_bits": 8, "act_dynamic": 1}, "act_dynamic=1"),
        ({"sym": "yes"}, "sym='yes'"),
    ],
)
def test_schemes_that_cannot_be(scheme, message):
    with pytest.raises((UnknownName, UnsupportedScheme), match=message):
        resolve_scheme(scheme)
