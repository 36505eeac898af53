"""Pretrained weights from object storage."""

from __future__ import annotations

import hashlib

import pytest
from weights import assert_same, card_of, network_of, random_state, torch_bytes

from segpipe.config.train import InitConfig
from segpipe.errors import InputError
from segpipe.models.pretrained import load_start
from segpipe.storage import open_object

pytestmark = pytest.mark.s3


def test_weights_come_from_s3_and_their_digest_is_held(s3_prefix: str) -> None:
    card = card_of("unet")
    state = random_state(network_of(card))
    data, uri = torch_bytes(state), f"{s3_prefix}/models/unet.pth"
    storage, key = open_object(uri)
    storage.put(key, data)
    digest = hashlib.sha256(data).hexdigest()
    model = network_of(card)
    report = load_start(model, card, InitConfig(weights=uri, sha256=digest))
    assert_same(model.state_dict(), state)
    assert (report.source, report.sha256) == (uri, digest)
    with pytest.raises(InputError, match="sha256"):
        load_start(network_of(card), card, InitConfig(weights=uri, sha256="0" * 64))


def test_weights_that_are_not_on_s3_are_named(s3_prefix: str) -> None:
    card = card_of("unet")
    with pytest.raises(InputError, match=f"{s3_prefix}/none.pth"):
        load_start(network_of(card), card, InitConfig(weights=f"{s3_prefix}/none.pth"))
