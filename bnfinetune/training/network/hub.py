"""The hub that pretrained weights come from: asked once whether it answers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import constants
from timm.models import get_pretrained_cfg, parse_model_name

from bnfinetune.recipe import Model
from bnfinetune.source_paths import hub_answers


@contextmanager
def cache_if_unreachable(section: Model) -> Iterator[None]:
    """Within this context only the hub's cache is looked into if weights come from there and it does not answer.

    huggingface_hub would try six times for each file, a minute in all, before it looks there.
    """
    before = constants.HF_HUB_OFFLINE
    fetches = section.pretrained and section.checkpoint is None and _is_of_hub(section.name)
    constants.HF_HUB_OFFLINE = before or (fetches and not hub_answers())
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _is_of_hub(name: str) -> bool:
    try:
        source, model_id = parse_model_name(name)
        config = get_pretrained_cfg(model_id) if source is None else None
    except (ValueError, RuntimeError):  # a name or tag that timm does not know, as is said where the network is built
        return False
    return source == "hf-hub" or (config is not None and config.hf_hub_id is not None)
