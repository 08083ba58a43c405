"""The network through torch's ONNX exporter, compared with onnxruntime at several batch sizes and resolutions."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest
import timm
import torch

pytestmark = pytest.mark.slow


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
def test_onnx_with_dynamic_shapes(tiny, official_file, tmp_path):
    model = timm.create_model(tiny, num_classes=10, checkpoint_path=official_file).eval()
    dim = torch.export.Dim
    shapes = {0: dim("n", max=64), 2: dim("h", min=64, max=512), 3: dim("w", min=64, max=512)}
    path = tmp_path / "model.onnx"
    torch.onnx.export(model, (torch.randn(2, 3, 64, 64),), path, dynamo=True, dynamic_shapes=(shapes,), verbose=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for shape in ((1, 3, 64, 64), (3, 3, 96, 75)):
        x = torch.randn(*shape)
        (logits,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        np.testing.assert_allclose(logits, model(x).detach().numpy(), rtol=1e-3, atol=1e-4)
