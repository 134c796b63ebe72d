import backbones
import pytest
import timm


@pytest.mark.parametrize(
    ("name", "kind", "traits"),
    [
        ("vit_tiny_patch16_224", "plain", "learned positions; class token"),
        ("vit_small_patch16_dinov3", "rotary", "rotary positions; class token, 4 registers"),
        ("eva02_tiny_patch14_224", "rotary", "learned and rotary positions; class token"),
        ("levit_256d", "refused", "timm's Levit"),
    ],
)
def test_what_a_model_is_stands_in_its_row(name, kind, traits):
    assert backbones.verdict(name) == (kind, traits)


def test_the_page_lists_the_models_that_people_ask_for():
    page = backbones.written()
    for name in ("vit_small_patch16_dinov3", "eva02_base_patch14_448", "vit_pe_core_base_patch16_224", "levit_128"):
        assert f"`{name}`" in page


@pytest.mark.slow
@pytest.mark.skipif(timm.__version__ != "1.0.31", reason="the page was made with this version")
def test_the_page_is_what_the_tool_writes():
    assert backbones.written() == backbones.table().strip()
