"""What the tests of kinds share: a file by LyCORIS, put on our networks, against LyCORIS on the peers' own."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peers
import pytest
import torch
from adapter_files import TINY, networks, outputs, put_on
from lycoris_files import Peers
from safetensors.torch import save_file

from sdxl_ref.adapters import lora
from sdxl_ref.adapters.lora import Adapter

TOLERANCE = 1e-5  # relative: float32 sums in another order


@pytest.fixture
def as_lycoris_does(tmp_path: Path) -> Callable[..., Adapter]:
    """Check that an adapter gives what it gives in LyCORIS, at scales 1 and -0.4, and goes without a trace."""

    @torch.no_grad()
    def check(kind: str, algo: str, **options: Any) -> Adapter:
        config = TINY[kind]
        peer = Peers(config, algo, **options)
        save_file(peer.state(), tmp_path / "lycoris.safetensors")
        adapter = lora.load(tmp_path / "lycoris.safetensors", config)
        assert adapter.is_whole, str(adapter)
        parts = networks(config)
        before = {part: {key: w.clone() for key, w in network.state_dict().items()} for part, network in parts.items()}
        plain = outputs(parts, config)
        for scale in (1.0, -0.4):
            put_on(parts, (adapter, scale))
            expected = peer.outputs(scale)
            found = outputs(parts, config)
            assert len(found) == len(expected)
            for ours, theirs, without in zip(found, expected, plain, strict=True):
                assert peers.distance(ours, theirs) <= TOLERANCE
                assert peers.distance(without, theirs) > 1e-2
        put_on(parts)
        for part, network in parts.items():
            assert all(torch.equal(w, before[part][key]) for key, w in network.state_dict().items())
        return adapter

    return check
