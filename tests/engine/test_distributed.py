from __future__ import annotations

import threading
import time

import pytest
import torch

from conv2former.engine import World, distributed
from conv2former.engine.watch import Watch
from conv2former.tasks.network import build_model

from .conftest import configure


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("channels_last", [True, False])
def test_gradients_come_in_the_strides_of_their_weights(raw_config, monkeypatch, fused, channels_last):
    """Else torch warns on every process, because its buffers for the exchange have the weights' strides."""
    config = configure(raw_config, model__fused=fused, model__drop_path_rate=0.0, model__drop_rate=0.0)
    model = build_model(config, 3)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    model.to(memory_format=memory_format)
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)).to(memory_format=memory_format)

    def gradients() -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = {}
        hooks = [
            parameter.register_hook(lambda gradient, name=name: found.update({name: gradient}))
            for name, parameter in model.named_parameters()
        ]
        model.train()(images).square().mean().backward()
        for hook in hooks:
            hook.remove()
        return found

    before = gradients()
    monkeypatch.setattr(distributed, "DistributedDataParallel", lambda wrapped, **_: wrapped)
    assert distributed.wrap(model, World(0, 2, torch.device("cpu"))) is model
    after = gradients()
    assert before.keys() == after.keys() == dict(model.named_parameters()).keys()
    for name, parameter in model.named_parameters():
        assert after[name].stride() == parameter.stride(), name
        assert torch.equal(after[name], before[name]), name
    # these differ without it, but for the plain formula with weights that lie as the images do
    same = all(before[name].stride() == parameter.stride() for name, parameter in model.named_parameters())
    assert same == (channels_last and not fused)


def test_the_watch_has_ended_when_it_is_stopped():
    """Else its thread may be inside of torch when Python ends, and the process aborts."""
    busy = threading.Event()

    class Slow:
        def set(self, key: str, value: str) -> None:
            busy.set()
            time.sleep(0.3)

    watch = Watch(Slow(), 0, 2, 60.0)
    assert busy.wait(10)
    watch.stop()
    assert not watch.is_alive()
