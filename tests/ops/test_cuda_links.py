"""A row of branches on a GPU: each goes back through the residual sum before it, with the norm's backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from conv2former.ops import autograd
from conv2former.ops.branch import BranchCall, BranchParams, SpatialMixing

from .interpreter import INTERPRETS
from .test_cuda_branch import TYPES, image_maps, make_call

if not INTERPRETS:
    pytest.skip("needs Triton, and its interpreter chosen", allow_module_level=True)

from conv2former.ops.cuda import branch, rows

pytestmark = pytest.mark.usefixtures("on_a_gpu")

MOD, MLP = SpatialMixing
FP32, BF16, FP16, ALL_BF16 = TYPES
CHANNELS = 3


def make_row(types=FP32, kinds=(MLP, MLP), **options: bool) -> list[BranchCall]:
    """Returns branches whose parameters want gradients."""
    calls = []
    for i, kind in enumerate(kinds):
        call = make_call(kind, types, channels=CHANNELS, **options)
        tensors = [None if t is None else t.requires_grad_() for t in call.params.tensors()]
        mask = None if call.mask is None else call.mask + i
        calls.append(call._replace(params=BranchParams.from_tensors(tensors), mask=mask))  # type: ignore[arg-type]
    return calls


def make_map(types=FP32) -> Tensor:
    return image_maps(0, 2, CHANNELS, 2, 2, dtype=types[1]).requires_grad_()


def parameters(calls: list[BranchCall]) -> list[Tensor]:
    return [t for call in calls for t in call.params.tensors() if t is not None and t.requires_grad]


def row_of(calls: list[BranchCall], x: Tensor) -> Tensor:
    return autograd.residual_branches(calls, x)


def apart(calls: list[BranchCall], x: Tensor) -> Tensor:
    """Computes a row in which no branch knows of another."""
    for call in calls:
        x = autograd.residual_branches([call], x)
    return x


def grads_of(calls: list[BranchCall], compute: Callable[[list[BranchCall], Tensor], Tensor], x: Tensor) -> list[Tensor]:
    y = compute(calls, x)
    return [*torch.autograd.grad(y, [x, *parameters(calls)], image_maps(20, *y.shape, dtype=y.dtype))]


@pytest.fixture
def launches(monkeypatch) -> list[str]:
    found: list[str] = []
    real = rows.launch

    def launch(kernel: Any, *args: Any, **options: Any) -> None:
        found.append(kernel.fn.__name__)
        real(kernel, *args, **options)

    monkeypatch.setattr(rows, "launch", launch)
    return found


def went_alone(launches: list[str]) -> int:
    """Returns how many branches went back through their own residual sum, and forgets it."""
    count = launches.count("branch_grad_kernel")
    launches.clear()
    return count


def assert_same(ours: list[Tensor], theirs: list[Tensor]) -> None:
    """The sums over pixels, of biases and layer scales, are added in another order; nothing else differs."""
    for a, b in zip(ours, theirs, strict=True):
        if a.dim() > 1:
            assert torch.equal(a, b)
        else:
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("types", "kinds", "gamma", "mask"),
    [
        (FP32, (MOD, MLP), True, True),
        (FP32, (MLP, MOD), False, False),  # where the gradient is what goes on
        (BF16, (MLP, MOD), True, True),
        (BF16, (MOD, MLP), False, False),
        (FP16, (MLP, MLP), True, True),
        (FP16, (MLP, MOD), True, False),
        (ALL_BF16, (MLP, MLP), True, False),
        (ALL_BF16, (MLP, MLP), False, True),
    ],
    ids=str,
)
def test_the_gradients_are_those_of_branches_apart(launches, types, kinds, gamma, mask):
    calls, x = make_row(types, kinds, gamma=gamma, mask=mask), make_map(types)
    expected = grads_of(calls, apart, x)
    assert went_alone(launches) == 2
    row = branch.prepare(calls)
    ours = grads_of(row, row_of, x)
    assert went_alone(launches) == 1, "the last one"
    assert_same(ours, expected)
    assert all(call.links.sum_grad is None or call.links.sum_grad.result is None for call in row), "nothing is kept"


def test_a_pass_repeats(launches):
    calls, x = make_row(BF16, (MLP, MLP, MLP)), make_map(BF16)
    y = row_of(calls, x)
    results = [torch.autograd.grad(y, [x, *parameters(calls)], y.detach(), retain_graph=True) for _ in range(2)]
    results.append(torch.autograd.grad(row_of(calls, x), [x, *parameters(calls)], y.detach()))
    assert went_alone(launches) == 3
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))


def doubled(grads: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(2 * grad for grad in grads)


def doubled_in_place(grads: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(grad.mul_(2) for grad in grads)


@pytest.mark.parametrize("hook", [doubled, doubled_in_place])
def test_a_gradient_that_a_hook_has_changed(launches, hook):
    calls, x = make_row(), make_map()

    def hooked(compute):
        def run(calls: list[BranchCall], x: Tensor) -> Tensor:
            y = compute(calls, x)
            ((node, _),) = [edge for edge in y.grad_fn.next_functions if type(edge[0]) is type(y.grad_fn)]
            node.register_prehook(hook)
            return y

        return run

    expected = grads_of(calls, hooked(apart), x)
    assert went_alone(launches) == 2
    assert all(map(torch.equal, grads_of(calls, hooked(row_of), x), expected))
    assert went_alone(launches) == 2


def test_a_map_that_is_used_twice(launches):
    """Then autograd adds the other gradient to what the branch after it returns."""
    calls, x = make_row(), make_map()

    def fork(calls: list[BranchCall], x: Tensor) -> Tensor:
        first, second = calls
        between = row_of([first], x)
        return row_of([second], between) + between.square()

    expected = grads_of(calls, fork, x)
    launches.clear()
    assert all(map(torch.equal, grads_of(branch.prepare(calls), fork, x), expected))
    assert went_alone(launches) == 2


@pytest.mark.parametrize("reentrant", [True, False])
def test_with_checkpointing(launches, reentrant):
    calls, x = make_row(), make_map()
    expected = grads_of(calls, row_of, x)
    launches.clear()
    masks = iter([1.0, 1.0, 5.0, 5.0])  # drop path draws others when it is computed again, without preserve_rng_state

    def run(x: Tensor) -> Tensor:
        drawn = [call._replace(mask=torch.full_like(call.mask, next(masks))) for call in calls]
        return row_of(drawn, x)

    def checkpointed(calls: list[BranchCall], x: Tensor) -> Tensor:
        return checkpoint(run, x, use_reentrant=reentrant, preserve_rng_state=False)

    y = checkpointed(calls, x)
    y.backward(image_maps(20, *y.shape, dtype=y.dtype))
    ours = [t.grad for t in (x, *parameters(calls))]
    assert went_alone(launches) == 1
    for t in (x, *parameters(calls)):
        t.grad = None
    fives = [call._replace(mask=torch.full_like(call.mask, 5.0)) for call in calls]
    assert all(map(torch.equal, ours, grads_of(fives, row_of, x)))
    assert not torch.equal(ours[0], expected[0])


def test_hooks_that_save_elsewhere(launches):
    """What comes back may lie in memory otherwise, and be no tensor that was known before."""
    calls, x = make_row(BF16), make_map(BF16)
    expected = grads_of(calls, row_of, x)
    launches.clear()
    with saved_tensors_hooks(lambda t: t.clone(memory_format=torch.contiguous_format), lambda t: t):
        ours = grads_of(calls, row_of, x)
    assert went_alone(launches) == 1
    assert all(map(torch.equal, ours, expected))


def test_nothing_goes_on_to_a_frozen_branch(launches):
    frozen, last = row = branch.prepare(make_row())
    for t in parameters([frozen]):
        t.requires_grad_(False)
    y = row_of(row, make_map().detach())
    y.backward(image_maps(20, *y.shape, dtype=y.dtype))
    assert all(t.grad is not None for t in parameters([last]))
    assert frozen.links.sum_grad is last.links.previous_sum_grad
    assert frozen.links.sum_grad.result is None
